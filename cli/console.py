"""What people and programs see: results on stdout (tables, or one JSON object), everything else on stderr."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from surgery.runtime.environment import is_main, rank

if TYPE_CHECKING:
    from surgery.reporting.report import Figure, Table

DEBUG = "SURGERY_DEBUG"


def tell(text: str) -> None:
    """A line for people, on stderr."""
    if is_main():
        typer.echo(text, err=True)


def warn(text: str) -> None:
    """A line for people that asks for attention."""
    if is_main():
        typer.secho("warning: ", fg="yellow", nl=False, err=True)
        typer.echo(text, err=True)


def scored_token(text: str, score: float) -> None:
    """A piece of text that is being written, from red (0) over yellow to green (1), on stdout."""
    if is_main():
        typer.secho(text, fg=_scale(score), nl=False)


def _scale(score: float) -> tuple[int, int, int]:
    return round(220 * min(1, 2 - 2 * score)), round(190 * min(1, 2 * score)), 60


def error(text: str) -> None:
    """The one line that explains a failure; of several processes each explains its own."""
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(text if is_main() else f"process {rank()}: {text}", err=True)


def show(*tables: Table) -> None:
    """Result tables, on stdout."""
    from rich.console import Console

    if not is_main():
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=2000)  # a file or a pipe has no edge to wrap at
    for table in tables:
        console.print(table.to_rich())


def draw(figure: Figure, path: Path) -> None:
    """A picture in a file."""
    if is_main():
        figure.save(path)
        tell(f"Picture: {path}")


def show_json(value: Any) -> None:
    """One JSON object on stdout."""
    from surgery.io.json_io import to_json

    if is_main():
        typer.echo(to_json(value, indent=2), nl=False)


def show_preflight(facts: Mapping[str, str], warnings: Sequence[str]) -> None:
    """What was checked before the work began."""
    for label, value in facts.items():
        tell(f"  {label:<14} {value}")
    for warning in warnings if is_main() else ():
        typer.secho(f"  warning        {warning}", fg="yellow", err=True)


def version(wanted: bool) -> None:
    """Prints the version and leaves."""
    if wanted:
        from importlib.metadata import version as installed

        typer.echo(installed("model-surgery"))
        raise typer.Exit
