"""How long work tells people how far it is: a `Progress` is handed down, and advanced by bytes or by steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
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


@contextmanager
def terminal(label: str, total: int, unit: Unit = "bytes") -> Iterator[Advance]:
    """A bar on stderr with rate and time left; nothing where stderr is not a terminal."""
    with _display(unit) as display:
        task = display.add_task(label, total=total)
        yield lambda amount: display.advance(task, amount)


def _display(unit: Unit) -> Display:
    from rich import progress as bars
    from rich.console import Console
    from rich.text import Text

    class StepRate(bars.ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.1f}/s")

    amount = (
        (bars.DownloadColumn(binary_units=True), bars.TransferSpeedColumn())
        if unit == "bytes"
        else (bars.MofNCompleteColumn(), StepRate())
    )
    console = Console(stderr=True)
    return bars.Progress(
        bars.TextColumn("{task.description}"), bars.BarColumn(), *amount, bars.TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
