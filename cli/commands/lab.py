"""`surgery lab …`: small real models, trained on the spot."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import console
from cli import options as o

app = typer.Typer(help="Small real models, trained on the spot, to try everything offline.", no_args_is_help=True)


@app.command("list", epilog="Example: surgery lab list")
def list_models(as_json: o.Json = False) -> None:
    """The lab's models, what each of them is, and whether it is built."""
    from surgery import lab
    from surgery.reporting.report import Column, Table

    rows = [(f"lab:{name}", lab.describe(name), lab.path_of(name).is_dir()) for name in lab.names()]
    if as_json:
        console.show_json({"models": [{"name": n, "description": d, "built": b} for n, d, b in rows]})
    else:
        columns = [Column("name"), Column("what it is"), Column("built")]
        console.show(Table("The lab", columns, [(n, d, "yes" if b else "no") for n, d, b in rows]))


@app.command(epilog="Example: surgery lab build grpo")
def build(
    names: Annotated[list[str], typer.Argument(metavar="NAME…", help="See `surgery lab list`.")],
    as_json: o.Json = False,
) -> None:
    """Trains the models that are not in the cache yet, and those they are trained from."""
    from surgery import lab
    from surgery.runtime.progress import terminal

    # Both NAME and lab:NAME are taken, as people copy either from a list.
    folders = {name: lab.build(name.removeprefix("lab:"), progress=terminal) for name in names}
    if as_json:
        console.show_json(folders)
    else:
        for name, folder in folders.items():
            console.message(f"{name}: {folder}")
