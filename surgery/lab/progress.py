"""The progress bar of a build: one line per model on stderr, with its rate and the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn
from rich.text import Text


@contextmanager
def bar(label: str, total: int, unit: Literal["steps"] = "steps") -> Iterator[Callable[[int], None]]:
    """The `Progress` of the command line: nothing is drawn where stderr is not a terminal, except the last state."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeLeftColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as display:
        line = display.add_task(label, total=total)
        yield lambda steps: display.advance(line, steps)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        self._unit = unit
        super().__init__()

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self._unit}/s")
