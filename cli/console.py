"""Print to the terminal: results on stdout (tables, or one JSON object), everything else on stderr."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from surgery.runtime.environment import is_main, rank

if TYPE_CHECKING:
    from surgery.reporting.report import Figure, Table

# In the environment, as `surgery run` starts its steps as processes, which are to show their tracebacks too.
DEBUG = "SURGERY_DEBUG"


def message(text: str) -> None:
    """Print a line for people on stderr."""
    # Under a launcher every process runs the command; one line each would say it many times.
    if is_main():
        typer.echo(text, err=True)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    if is_main():
        typer.secho("warning: ", fg="yellow", nl=False, err=True)
        typer.echo(text, err=True)


def scored_token(text: str, score: float) -> None:
    """Print a piece of generated text on stdout, coloured by its score from red (0) over yellow to green (1)."""
    if is_main():
        typer.secho(text, fg=_scale(score), nl=False)


def _scale(score: float) -> tuple[int, int, int]:
    # Short of the full 255, which is hard to read on a white terminal.
    return round(220 * min(1, 2 - 2 * score)), round(190 * min(1, 2 * score)), 60


def error(text: str) -> None:
    """Print the line that explains a failure; of several processes each explains its own."""
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(text if is_main() else f"process {rank()}: {text}", err=True)


def show(*tables: Table) -> None:
    """Print result tables on stdout."""
    from rich.console import Console

    if not is_main():
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=2000)  # a file or a pipe has no edge to wrap at
    for table in tables:
        console.print(table.to_rich())


def draw(figure: Figure, path: Path) -> None:
    """Write a picture to `path`."""
    if is_main():
        figure.save(path)
        message(f"Picture: {path}")


def show_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    from surgery.io.json_io import to_json

    if is_main():
        # The text ends with a line break already.
        typer.echo(to_json(value, indent=2), nl=False)


def show_preflight(facts: Mapping[str, str], warnings: Sequence[str]) -> None:
    """Print what was checked before the work began."""
    for label, value in facts.items():
        message(f"  {label:<14} {value}")
    for warning in warnings if is_main() else ():
        typer.secho(f"  warning        {warning}", fg="yellow", err=True)


def version(wanted: bool) -> None:
    """Print the version and exit; the callback of `--version`."""
    if wanted:
        from surgery.runtime.version import __version__

        typer.echo(__version__)
        raise typer.Exit
