"""How long work tells people how far it is: a `Progress` is handed down, and advanced by bytes or by steps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Literal, Protocol

from surgery.process import is_main

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as Display
    from rich.progress import Task

Unit = Literal["bytes", "steps"]
Advance = Callable[[int], None]


class Progress(Protocol):
    """Opens one bar per stage; the value entered is called with each amount done."""

    def __call__(self, label: str, total: int, unit: Unit = "bytes") -> AbstractContextManager[Advance]: ...


@contextmanager
def silent(label: str, total: int, unit: Unit = "bytes") -> Iterator[Advance]:
    """The `Progress` of a library call: nothing is shown."""
    yield lambda amount: None


# The display that is on the terminal, if any: two would draw over each other.
_open: list[Display] = []


@contextmanager
def terminal(label: str, total: int, unit: Unit = "bytes") -> Iterator[Advance]:
    """A bar on stderr with rate and time left, below the one that is open; nothing where stderr is not a terminal."""
    if _open:
        display = _open[-1]
        task = display.add_task(label, total=total, unit=unit)
        yield lambda amount: display.advance(task, amount)
        display.remove_task(task)
        return
    with _display() as display:
        task = display.add_task(label, total=total, unit=unit)
        _open.append(display)
        try:
            yield lambda amount: display.advance(task, amount)
        finally:
            _open.pop()


def _display() -> Display:
    from rich import progress as bars
    from rich.console import Console
    from rich.text import Text

    class StepRate(bars.ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.1f}/s")

    class ByUnit(bars.ProgressColumn):
        def __init__(self, in_bytes: bars.ProgressColumn, in_steps: bars.ProgressColumn) -> None:
            super().__init__()
            self.columns = {"bytes": in_bytes, "steps": in_steps}

        def render(self, task: Task) -> RenderableType:
            return self.columns[task.fields["unit"]].render(task)

    # The stream as it is now: libraries that are kept quiet meanwhile must not silence the bar.
    console = Console(file=sys.stderr)
    return bars.Progress(
        bars.TextColumn("{task.description}"), bars.BarColumn(),
        ByUnit(bars.DownloadColumn(binary_units=True), bars.MofNCompleteColumn()),
        ByUnit(bars.TransferSpeedColumn(), StepRate()), bars.TimeRemainingColumn(),
        console=console, transient=True, disable=not (console.is_terminal and is_main()),
    )  # fmt: skip
