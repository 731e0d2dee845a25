"""`surgery reproduce`: make an output again from its manifest, and compare."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli import options as o

EPILOG = "Example: surgery reproduce reasoning-instruct"


def reproduce(
    output: Annotated[
        str, typer.Argument(metavar="OUT", help="A folder that surgery wrote, or org/name[@revision] on the Hub.")
    ],
    scratch: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to make it; removed at the end. As large as OUT.")
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Make an output again from its surgery.json, and compare every tensor's hash; exit code 1 where one differs."""
    from surgery.recipes.reproduction import reproduce as again

    result = again(output, run=_run, scratch=scratch)
    if as_json:
        # `same` is a property, which `vars` leaves out.
        console.show_json({"same": result.same, **vars(result)})
    else:
        console.show(result.table())
    # After the table, which says what differs.
    if not result.same:
        raise typer.Exit(1)


def _run(words: Sequence[str]) -> int:
    """Run one of our commands after printing it; return its exit code."""
    from surgery.recipes.reproduction import run_in_process

    console.message(f"$ surgery {shlex.join(words)}")
    # In a process of its own, as a user would run it: nothing that this one has loaded or set may have a part in it.
    return run_in_process(words)
