"""`surgery reproduce`: make an output again from its manifest, and compare."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import console
from cli import options as o
from cli.commands.run import commands
from surgery.recipes.types import NamesOutput

if TYPE_CHECKING:
    from surgery.recipes.reproduction import Reproduction, ReproductionRunner

NAME = "reproduce"
EPILOG = "Example: surgery reproduce reasoning-instruct"


def command(
    output: Annotated[
        str, typer.Argument(metavar="OUT", help="A folder that surgery wrote, or org/name[@revision] on the Hub.")
    ],
    scratch: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where to make it; removed at the end. As large as OUT."),
        NamesOutput("folder"),
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Make an output again from its surgery.json, and compare every tensor's hash; exit code 1 where one differs."""
    result = reproduce(output, run=_run, scratch=scratch, notify=console.message)
    if as_json:
        # `same` is a property, which `vars` leaves out.
        console.show_json({"same": result.same, **vars(result)})
    else:
        console.show(result.table())
    # After the table, which says what differs.
    if not result.same:
        raise typer.Exit(1)


def reproduce(
    ref: str,
    *,
    run: ReproductionRunner | None = None,
    scratch: Path | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> Reproduction:
    """Run the command that made `ref` again, and compare every tensor's hash with its manifest's.

    This function is not in `surgery.recipes`, because manifests name commands, and only the command line knows them
    all.

    Example:
        assert surgery.reproduce("OUT").same

    Args:
        ref: a folder with a surgery.json, or `org/name[@revision]` on the Hub.
        run: runs one of this tool's commands, given its arguments, and returns the exit code; by default in a process
            of its own.
        scratch: where the output is made, and removed at the end; by default among the system's temporary files.
        notify: called with a line for each file, folder or model that will be read.

    Raises:
        SurgeryError: `ref` has no manifest, or one without tensors or a command that can be run; an input is not there;
            the command failed.
    """
    from surgery.recipes.reproduction import reproduce_output, run_in_process

    return reproduce_output(ref, commands=commands(), run=run or run_in_process, scratch=scratch, notify=notify)


def _run(words: Sequence[str]) -> int:
    """Run one of our commands after printing it; return its exit code."""
    from surgery.recipes.reproduction import run_in_process

    console.message(f"$ surgery {shlex.join(words)}")
    # In a process of its own, as a user would run it: nothing that this one has loaded or set may have a part in it.
    return run_in_process(words)
