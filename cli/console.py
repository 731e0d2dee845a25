"""What people and programs see: results on stdout (tables, or one JSON object), everything else on stderr."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
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
    json.dump(jsonable(value), sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")


def show_preflight(facts: Mapping[str, str], warnings: Sequence[str]) -> None:
    """What was checked before the work began."""
    for label, value in facts.items():
        tell(f"  {label:<14} {value}")
    for warning in warnings:
        typer.secho(f"  warning        {warning}", fg="yellow", err=True)


def jsonable(value: Any) -> Any:
    """`value` in JSON's own types; numbers that JSON lacks (NaN, infinities) become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_key(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def version(wanted: bool) -> None:
    """Prints the version and leaves."""
    if wanted:
        from importlib.metadata import version as installed

        typer.echo(installed("model-surgery"))
        raise typer.Exit


def _key(key: Any) -> str:
    return "/".join(map(str, key)) if isinstance(key, tuple) else str(key)
