"""Print to the terminal: results on stdout (tables, or one JSON object), everything else on stderr.

The only module that prints: what it is given may quote files of strangers, and passes `printable` on its way.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from surgery.errors import SurgeryWarning
from surgery.io.escaping import one_line
from surgery.runtime.environment import is_main, rank
from surgery.runtime.terminal import printable, rich_console, trusted_stream

if TYPE_CHECKING:
    from surgery.reporting.report import Figure, Table

# In the environment, as `surgery run` starts its steps as processes, which are to show their tracebacks too.
DEBUG = "SURGERY_DEBUG"
MOST_ROWS = 1_000  # of one table: a terminal takes a millisecond for each
MOST_CHARACTERS = 10_000  # of one message: longer ones hold what a file says, and nobody reads them


def message(text: str) -> None:
    """Print a line for people on stderr."""
    # Under a launcher every process runs the command; one line each would say it many times.
    if is_main():
        _write(one_line(text, MOST_CHARACTERS))


def progress_line(text: str, stream: TextIO) -> None:
    """Print a line on how far the work is to `stream`, which was stderr when the work began."""
    with suppress(OSError, ValueError):  # a pipe that nobody reads, or a stream that was closed: the work goes on
        typer.echo(printable(one_line(text, MOST_CHARACTERS)), file=trusted_stream(stream))


def warn(text: str) -> None:
    """Print a warning on stderr."""
    if is_main():
        _write("warning: ", fg="yellow", nl=False)
        _write(one_line(text, MOST_CHARACTERS))


def can_ask() -> bool:
    """Return whether somebody sits at a terminal who can answer a question."""
    return is_main() and sys.stdin.isatty() and sys.stderr.isatty()


def ask(question: str) -> bool:
    """Ask a question on stderr; return whether the answer is yes. Without an answer it is no."""
    try:
        return typer.confirm(one_line(question, MOST_CHARACTERS), default=False, err=True)
    except typer.Abort:  # Ctrl-C, or the end of the input
        return False


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Print each `SurgeryWarning` of the block once, as `warn` does; other warnings stay what they are."""
    shown = set[str]()
    other = warnings.showwarning

    # With the parameters of `warnings.showwarning`, in whose place it stands.
    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, SurgeryWarning):
            other(message, category, filename, lineno, file, line)
        elif str(message) not in shown:
            shown.add(str(message))
            warn(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", SurgeryWarning)
        warnings.showwarning = show
        yield


def scored_token(text: str, score: float) -> None:
    """Print a piece of generated text on stdout, coloured by its score from red (0) over yellow to green (1)."""
    if is_main():
        _write(text, err=False, fg=_scale(score), nl=False)


def _scale(score: float) -> tuple[int, int, int]:
    # Short of the full 255, which is hard to read on a white terminal.
    return round(220 * min(1, 2 - 2 * score)), round(190 * min(1, 2 * score)), 60


def error(text: str) -> None:
    """Print the lines that explain a failure; of several processes each explains its own.

    text: that of a `SurgeryError`, whose line breaks are its own; of other text the caller makes one line.
    """
    _write("error: ", fg="red", bold=True, nl=False)
    _write(text if is_main() else f"process {rank()}: {text}")


def result(text: str) -> None:
    """Print a line on stdout that is the whole result, so that a script can take it."""
    _write(one_line(text), err=False)


def document(text: str) -> None:
    """Print a text of several lines on stdout."""
    _write(text, err=False, nl=False)


def _write(text: str, *, err: bool = True, nl: bool = True, **style: Any) -> None:
    # Escaped here and written past the guard of the stream, which would show the colours as text.
    text, stream = printable(text), trusted_stream(sys.stderr if err else sys.stdout)
    typer.echo(typer.style(text, **style) if style else text, file=stream, nl=nl)


def show(*tables: Table) -> None:
    """Print result tables on stdout."""
    if not is_main():
        return
    console = rich_console(sys.stdout)
    if not console.is_terminal:
        console = rich_console(sys.stdout, width=2000)  # a file or a pipe has no edge to wrap at
    for table in tables:
        console.print(_bounded(table).to_rich())


def _bounded(table: Table) -> Table:
    """Return the table with its first `MOST_ROWS` rows: the names of a file make as many as it likes."""
    more = len(table.rows) - MOST_ROWS
    if more <= 0:
        return table
    note = f"… and {more:,} more rows; --json has all of them."
    return replace(table, rows=table.rows[:MOST_ROWS], note=f"{note}\n{table.note}" if table.note else note)


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
        document(to_json(value, indent=2))


def show_preflight(facts: Mapping[str, str], warnings: Sequence[str]) -> None:
    """Print what was checked before the work began."""
    for label, value in facts.items():
        message(f"  {label:<14} {value}")
    for warning in warnings if is_main() else ():
        _write(f"  warning        {one_line(warning, MOST_CHARACTERS)}", fg="yellow")


def version(wanted: bool) -> None:
    """Print the version and exit; the callback of `--version`."""
    if wanted:
        from surgery.runtime.version import __version__

        result(__version__)
        raise typer.Exit
