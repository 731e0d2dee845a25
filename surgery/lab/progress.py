"""The progress bar of a build: one line per model on stderr, with its rate and the time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from surgery.lab.family import Progress as Report


@contextmanager
def bar() -> Iterator[Report]:
    """A callback for `build` that draws its progress while the context is open."""
    columns = (
        TextColumn("lab:{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as display:
        lines: dict[str, TaskID] = {}

        def report(name: str, done: int, total: int) -> None:
            if name not in lines:
                lines[name] = display.add_task(name, total=total)
            display.update(lines[name], completed=done)

        yield report


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")
