"""The `surgery` program: run a command, and turn every error into one line and an exit code."""

from __future__ import annotations

import errno
import gc
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.app import StoppedError
from cli.app import app as app
from cli.commands import push, reproduce
from cli.commands import run as recipes
from surgery.errors import FAILED, SurgeryError
from surgery.io.atomic import disk_error
from surgery.io.escaping import one_line
from surgery.runtime import environment as process
from surgery.runtime.interrupts import redeliver_dropped_interrupts, stop_at_termination, stopped_exit_code
from surgery.runtime.progress import print_lines_by
from surgery.runtime.terminal import escape_output

# Here, since these commands read or run the app's others: see `cli.app`.
app.command(epilog=recipes.EPILOG)(recipes.run)
app.command(epilog=push.EPILOG)(push.push)
app.command(name=reproduce.NAME, epilog=reproduce.EPILOG)(reproduce.command)

# Importing torch makes a few hundred thousand objects that stay; looking through them again and again for garbage takes
# a quarter of a second at the default of (700, 10, 10).
RARE_COLLECTIONS = 100_000, 50, 100


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=console.version, is_eager=True),
    ] = False,
) -> None:
    """What all commands share."""
    if debug:
        os.environ[console.DEBUG] = "1"
    # Under a launcher such as accelerate the processes must find each other before any command divides work.
    if process.n_processes() > 1:
        from surgery.runtime.collectives import connect

        connect()


def program() -> None:
    """Run the command line, then end the process at once: the console script.

    Taking the interpreter and torch apart object by object takes a few tenths of a second and serves nobody: what a
    command writes is on the disk when it returns.
    """
    # Before torch is imported, which reads its settings then.
    process.configure_cli_process()
    redeliver_dropped_interrupts()
    # A launcher ends all of its processes when one of them fails: those that wait for another would not notice.
    if process.n_processes() == 1:
        stop_at_termination()
    try:
        run()
    # As the interpreter does: None is success, a number the exit code, and anything else a failure.
    except SystemExit as exit_call:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_call.code if isinstance(exit_call.code, int) else int(exit_call.code is not None))


def run() -> None:
    """Run the command line and exit with its code."""
    gc.set_threshold(*RARE_COLLECTIONS)
    escape_output()
    print_lines_by(console.progress_line)
    try:
        # Typer itself prints wrong usage and exits with code 2; everything else arrives here.
        with console.shown_warnings():
            app()
    except SurgeryError as error:
        _leave(error, str(error), error.exit_code)
    except (StoppedError, KeyboardInterrupt) as error:
        _leave(error, "stopped. The same command goes on where it was.", stopped_exit_code())
    # From a library, of which our own code does not know what it was writing: a full disk, a pipe that was closed.
    except OSError as error:
        where = error.filename or "the system"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        said = str(disk_error(error, Path(where))) if full else f"{where}: {error.strerror or error}"
        _leave(error, one_line(said), FAILED)
    except MemoryError as error:
        _leave(error, "out of memory. Use fewer --threads.", FAILED)
    except Exception as error:  # a bug of ours: say so in one line, and how to see where
        _leave(
            error,
            f"internal error: {type(error).__name__}: {one_line(str(error))}. "
            "Run `surgery --debug …` and report the traceback.",
            FAILED,
        )
    # Libraries in Rust panic with a class of their own, no Exception: tokenizers does where a pattern of a
    # tokenizer.json goes back too often.
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        _leave(
            error,
            f"a library broke off: {one_line(str(error))}. Of a tokenizer's: get its files from their author again.",
            FAILED,
        )


def _leave(error: BaseException, line: str, code: int) -> None:
    if os.environ.get(console.DEBUG):
        raise error
    console.error(line)
    sys.exit(code)


if __name__ == "__main__":  # accelerate launch -m cli.main …
    program()
