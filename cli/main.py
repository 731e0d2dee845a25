"""The `surgery` command and its groups; one table turns every error into a line and an exit code."""

from __future__ import annotations

import gc
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cli import console, edit, grow, lab, merge, models, probe, push, recipes, reproduce, vector
from surgery import process
from surgery.errors import FAILED, SurgeryError


class _StoppedError(Exception):
    """Ctrl-C, by a name that Typer does not know: it would leave without a word."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            raise _StoppedError from stopped


app = typer.Typer(
    name="surgery",
    cls=_Commands,
    help="Takes language-model checkpoints apart and puts them together better, on the weights themselves.\n\n"
    "MODEL is a local folder, a single .safetensors file, org/name[@revision] on the Hub, a PEFT LoRA adapter "
    "folder, BASE+ADAPTER, or lab:NAME.\n\n"
    "Example: surgery vector transfer lab:grpo lab:sft lab:instruct -o reasoning-instruct",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models.register(app)
app.add_typer(vector.app, name="vector")
app.add_typer(merge.app, name="merge")
app.add_typer(probe.app, name="probe")
app.add_typer(edit.app, name="edit")
app.add_typer(grow.app, name="grow")
app.add_typer(lab.app, name="lab")
app.command(epilog=recipes.EPILOG)(recipes.run)
app.command(epilog=push.EPILOG)(push.push)
app.command(epilog=reproduce.EPILOG)(reproduce.reproduce)

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
    if process.n_processes() > 1:
        from surgery.parallel import meet

        meet()


def program() -> None:
    """The console script: `run`, and then the end of the process at once.

    Taking the interpreter and torch apart object by object takes a few tenths of a second and serves nobody: what a
    command writes is on the disk when it returns.
    """
    process.claim()
    try:
        run()
    except SystemExit as left:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(left.code if isinstance(left.code, int) else int(left.code is not None))


def run() -> None:
    """Runs the command line and leaves with its exit code."""
    gc.set_threshold(*RARE_COLLECTIONS)
    try:
        app()
    except SurgeryError as error:
        _leave(error, str(error), error.exit_code)
    except (_StoppedError, KeyboardInterrupt) as error:
        _leave(error, "stopped. The same command goes on where it was.", 130)
    except OSError as error:
        _leave(error, f"{error.filename or 'the system'}: {error.strerror or error}", FAILED)
    except MemoryError as error:
        _leave(error, "out of memory. Use fewer --threads.", FAILED)
    except Exception as error:  # a bug of ours: say so in one line, and how to see where
        _leave(
            error,
            f"internal error: {type(error).__name__}: {error}. Run `surgery --debug …` and report the traceback.",
            FAILED,
        )


def _leave(error: BaseException, line: str, code: int) -> None:
    if os.environ.get(console.DEBUG):
        raise error
    console.error(line)
    sys.exit(code)


if __name__ == "__main__":  # accelerate launch -m cli.main …
    program()
