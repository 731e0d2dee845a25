"""What people and programs see: results on stdout (tables, or one JSON object), everything else on stderr."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from surgery.report import Table

DEBUG = "SURGERY_DEBUG"


def tell(text: str) -> None:
    """A line for people, on stderr."""
    typer.echo(text, err=True)


def error(text: str) -> None:
    """The one line that explains a failure."""
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(text, err=True)


def show(*tables: Table) -> None:
    """Result tables, on stdout."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a file or a pipe has no edge to wrap at
    for table in tables:
        console.print(table.to_rich())


def show_json(value: Any) -> None:
    """One JSON object on stdout."""
    from surgery.jsonable import to_json

    typer.echo(to_json(value, indent=2), nl=False)


def show_preflight(facts: Mapping[str, str], warnings: Sequence[str]) -> None:
    """What was checked before the work began."""
    for label, value in facts.items():
        tell(f"  {label:<14} {value}")
    for warning in warnings:
        typer.secho(f"  warning        {warning}", fg="yellow", err=True)


def version(wanted: bool) -> None:
    """Prints the version and leaves."""
    if wanted:
        from importlib.metadata import version as installed

        typer.echo(installed("model-surgery"))
        raise typer.Exit
