"""How long work tells people how far it is: a `Progress` is handed down, and advanced by bytes, steps or tokens."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from surgery.runtime.environment import is_main

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as Display
    from rich.progress import Task, TaskID

Unit = Literal["bytes", "steps", "tokens"]


class Advance(Protocol):
    """Says that so much more is done; `note` is shown beside the label until another one comes."""

    def __call__(self, amount: int, note: str = "") -> None: ...


class Progress(Protocol):
    """Opens one bar per stage; the value entered is called with each amount done."""

    def __call__(self, label: str, total: int, unit: Unit = "bytes") -> AbstractContextManager[Advance]: ...


@contextmanager
def silent(label: str, total: int, unit: Unit = "bytes") -> Iterator[Advance]:
    """The `Progress` of a library call: nothing is shown."""
    yield _nothing


# The display that is on the terminal, if any: two would draw over each other.
_open: list[Display] = []


@contextmanager
def terminal(label: str, total: int, unit: Unit = "bytes") -> Iterator[Advance]:
    """A bar on stderr with rate and time left, below the one that is open; nothing where stderr is not a terminal.

    A parent process that listens is told the same.
    """
    teller = ProgressFile(label, total, unit) if is_main() else None
    if _open:
        display = _open[-1]
        task = display.add_task(label, total=total, unit=unit)
        try:
            yield _advancing(display, task, label, teller)
        finally:
            display.remove_task(task)
        return
    with _display() as display:
        task = display.add_task(label, total=total, unit=unit)
        _open.append(display)
        try:
            yield _advancing(display, task, label, teller)
        finally:
            _open.pop()


def short(number: float) -> str:
    """A number of tokens as people say it: 950, 12.3k, 4.5M, 1.2B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _nothing(amount: int, note: str = "") -> None:
    pass


def _advancing(display: Display, task: TaskID, label: str, teller: ProgressFile | None) -> Advance:
    def advance(amount: int, note: str = "") -> None:
        if teller is not None:
            teller.advance(amount, note)
        if note:
            display.update(task, description=f"{label}  {note}")
        display.advance(task, amount)

    return advance


def _display() -> Display:
    from rich import progress as bars
    from rich.console import Console
    from rich.text import Text

    class StepRate(bars.ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.1f}/s")

    class Tokens(bars.ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{short(task.completed)}/{short(task.total or 0)}")

    class TokenRate(bars.ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{short(speed)} tokens/s")

    class ByUnit(bars.ProgressColumn):
        def __init__(
            self, in_bytes: bars.ProgressColumn, in_steps: bars.ProgressColumn, in_tokens: bars.ProgressColumn
        ) -> None:
            super().__init__()
            self.columns = {"bytes": in_bytes, "steps": in_steps, "tokens": in_tokens}

        def render(self, task: Task) -> RenderableType:
            return self.columns[task.fields["unit"]].render(task)

    # The stream as it is now: libraries that are kept quiet meanwhile must not silence the bar.
    console = Console(file=sys.stderr)
    return bars.Progress(
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        ByUnit(bars.DownloadColumn(binary_units=True), bars.MofNCompleteColumn(), Tokens()),
        ByUnit(bars.TransferSpeedColumn(), StepRate(), TokenRate()),
        bars.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (console.is_terminal and is_main()),
    )


FILE = "SURGERY_PROGRESS"
BETWEEN = 0.2  # seconds from one time of telling to the next


@dataclass(frozen=True)
class ProgressEvent:
    """How far a stage of the work is: `done` of `total`, in bytes, steps or tokens."""

    label: str
    done: int
    total: int
    unit: str
    note: str = ""


class ProgressFile:
    """Tells of one stage. Where no parent listens, or the file cannot be written, nothing happens: work goes on."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self._path = os.environ.get(FILE)
        self._label, self._total, self._unit = label, total, unit
        self._done, self._note, self._last = 0, "", 0.0
        self.advance(0)

    def advance(self, amount: int, note: str = "") -> None:
        """So much more is done."""
        if not self._path:
            return
        self._done += amount
        self._note = note or self._note
        now = time.monotonic()
        if now - self._last >= BETWEEN or self._done == self._total:
            self._last = now
            _write(Path(self._path), ProgressEvent(self._label, self._done, self._total, self._unit, self._note))


def read_progress(path: Path) -> ProgressEvent | None:
    """What was told last; None where nothing was."""
    try:
        return ProgressEvent(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write(path: Path, told: ProgressEvent) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(asdict(told)), encoding="utf-8")
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
