"""How long work tells people how far it is: a `Progress` is handed down, and advanced by bytes or by steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, Protocol

Unit = Literal["bytes", "steps"]
Advance = Callable[[int], None]


class Progress(Protocol):
    """Opens one bar per stage; the value entered is called with each amount done."""

    def __call__(self, label: str, total: int, unit: Unit = "bytes") -> AbstractContextManager[Advance]: ...


@contextmanager
def silent(label: str, total: int, unit: Unit = "bytes") -> Iterator[Advance]:
    """The `Progress` of a library call: nothing is shown."""
    yield lambda amount: None


@contextmanager
def terminal(label: str, total: int, unit: Unit = "bytes") -> Iterator[Advance]:
    """A bar on stderr with rate and time left; nothing where stderr is not a terminal."""
    from rich import progress as bars
    from rich.console import Console

    rate: tuple[bars.ProgressColumn, ...] = (
        (bars.DownloadColumn(binary_units=True), bars.TransferSpeedColumn())
        if unit == "bytes"
        else (bars.MofNCompleteColumn(), bars.TextColumn("{task.speed:.1f}/s"))
    )
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), *rate, bars.TimeRemainingColumn())
    console = Console(stderr=True)
    with bars.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as display:
        task = display.add_task(label, total=total)
        yield lambda amount: display.advance(task, amount)
