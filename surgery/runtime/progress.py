"""Report progress: as bars on the terminal, as lines where there is none, and as a file that a parent process reads.

Functions take a `Progress` and call it once per stage; the value they enter is called with the bytes, steps or tokens
done. `terminal` draws bars or writes lines, `silent` does nothing. A parent process that sets `SURGERY_PROGRESS` to a
path also gets the latest `ProgressEvent` there as JSON, and reads it with `read_progress`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TextIO

from surgery.io.escaping import one_line
from surgery.runtime.environment import is_main
from surgery.runtime.progress_lines import LineReporter, short
from surgery.runtime.terminal import rich_console

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as Display
    from rich.progress import Task, TaskID

Unit = Literal["bytes", "steps", "tokens"]

FILE = "SURGERY_PROGRESS"  # the environment variable with the path of the progress file
MOST_CHARACTERS = 200  # of a label or note, beside the bar
WRITE_INTERVAL = 0.2  # seconds between two writes of the progress file


class Advance(Protocol):
    """Reports that `amount` more is done; `note` is shown beside the label until another one comes."""

    def __call__(self, amount: int, note: str = "") -> None: ...


class Progress(Protocol):
    """Opens one bar per stage, of `total` units."""

    def __call__(self, label: str, total: int, unit: Unit = "bytes") -> AbstractContextManager[Advance]: ...


@contextmanager
def silent(label: str, total: int, unit: Unit = "bytes") -> Iterator[Advance]:
    """Show nothing: the default `Progress` of library calls."""

    def ignore(amount: int, note: str = "") -> None:
        pass

    yield ignore


# The display on the terminal, if any, as a list of at most one: a second display would draw over the first.
_open_displays: list[Display] = []
# At most one too, which writes the lines of all stages that are open.
_open_reporters: list[LineReporter] = []
# What prints a line to a stream: of a program. A library's process prints nothing that nobody asked for.
_print_line: Callable[[str, TextIO], None] | None = None


def print_lines_by(print_line: Callable[[str, TextIO], None]) -> None:
    """Let `terminal` print lines, by `print_line`, where stderr is no terminal. For programs."""
    global _print_line
    _print_line = print_line


def writes_lines() -> bool:
    """Return whether `terminal` writes lines: in a program, on rank 0, where stderr is no terminal."""
    return _print_line is not None and is_main() and not rich_console(sys.stderr).is_terminal


@contextmanager
def terminal(label: str, total: int, unit: Unit = "bytes") -> Iterator[Advance]:
    """Show a bar on stderr with rate and time left, below one that is open; lines if stderr is not a terminal.

    Rank 0 also writes the progress file, if a parent process asked for one; others show nothing.
    """
    label = one_line(label, MOST_CHARACTERS)
    file = ProgressFile(label, total, unit) if is_main() else None
    if not _open_displays and (_open_reporters or not (is_main() and rich_console(sys.stderr).is_terminal)):
        with _lines(label, total, unit) as count:
            yield _counting(count, file)
        return
    if _open_displays:
        display = _open_displays[-1]
        task = display.add_task(label, total=total, unit=unit)
        try:
            yield _advance(display, task, label, file)
        finally:
            display.remove_task(task)
        return
    with _create_display() as display:
        task = display.add_task(label, total=total, unit=unit)
        _open_displays.append(display)
        try:
            yield _advance(display, task, label, file)
        finally:
            _open_displays.pop()


@contextmanager
def lines(label: str, total: int = 0, unit: Unit = "steps") -> Iterator[Advance]:
    """Write lines as `terminal` does, and draw no bar: of work for which a library draws bars, or that has no parts."""
    with nullcontext(_ignore) if _open_displays else _lines(one_line(label, MOST_CHARACTERS), total, unit) as count:
        yield _counting(count, None)


@contextmanager
def _lines(label: str, total: int, unit: Unit) -> Iterator[Callable[[int, str], None]]:
    """Write lines of a stage, if this process is one that prints; yield what counts its progress."""
    if not (_open_reporters or writes_lines()):
        yield _ignore
        return
    if _open_reporters:
        with _open_reporters[-1].stage(label, total, unit) as count:
            yield count
        return
    # The stream as it is now: libraries that are silenced meanwhile, by redirecting stderr, must not silence the lines.
    print_line, stream = _print_line, sys.stderr
    assert print_line is not None  # else no lines are written
    reporter = LineReporter(lambda text: print_line(text, stream))
    _open_reporters.append(reporter)
    try:
        with reporter.stage(label, total, unit) as count:
            yield count
    finally:
        _open_reporters.pop()


def _ignore(amount: int, note: str) -> None:
    pass


def _counting(count: Callable[[int, str], None], file: ProgressFile | None) -> Advance:
    def advance(amount: int, note: str = "") -> None:
        note = one_line(note, MOST_CHARACTERS)
        if file is not None:
            file.advance(amount, note)
        count(amount, note)

    return advance


@dataclass(frozen=True)
class ProgressEvent:
    """The state of one stage: `done` of `total`, in bytes, steps or tokens."""

    label: str
    done: int
    total: int
    unit: str
    note: str = ""


class ProgressFile:
    """Writes the state of one stage for a parent process.

    Nothing happens if no parent asked for it or the file cannot be written: reporting must never stop the work.
    """

    def __init__(self, label: str, total: int, unit: str) -> None:
        self._path = os.environ.get(FILE)
        self._label, self._total, self._unit = label, total, unit
        self._done, self._note, self._last_write = 0, "", 0.0
        self.advance(0)

    def advance(self, amount: int, note: str = "") -> None:
        """Report that `amount` more is done."""
        if not self._path:
            return
        self._done += amount
        self._note = note or self._note
        now = time.monotonic()
        # The last state is written in any case, or a reader would never see the end.
        if now - self._last_write >= WRITE_INTERVAL or self._done == self._total:
            self._last_write = now
            event = ProgressEvent(self._label, self._done, self._total, self._unit, self._note)
            _write_event(Path(self._path), event)


def read_progress(path: Path) -> ProgressEvent | None:
    """Return the latest event in a progress file; None if there is none yet."""
    try:
        return ProgressEvent(**json.loads(path.read_text(encoding="utf-8")))
    # TypeError: an event of another version, with other fields. A bar that stands still is better than a stop.
    except (OSError, ValueError, TypeError):
        return None


def _write_event(path: Path, event: ProgressEvent) -> None:
    # Renamed into place, so that the reader never sees half an event; not fsynced, since it is of no use after a crash.
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(asdict(event)), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)


def _advance(display: Display, task: TaskID, label: str, file: ProgressFile | None) -> Advance:
    def advance(amount: int, note: str = "") -> None:
        note = one_line(note, MOST_CHARACTERS)
        if file is not None:
            file.advance(amount, note)
        if note:
            display.update(task, description=f"{label}  {note}")
        display.advance(task, amount)

    return advance


def _create_display() -> Display:
    from rich import progress as bars
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
        """Shows one of three columns, by the unit of the bar."""

        def __init__(
            self, in_bytes: bars.ProgressColumn, in_steps: bars.ProgressColumn, in_tokens: bars.ProgressColumn
        ) -> None:
            super().__init__()
            self.columns = {"bytes": in_bytes, "steps": in_steps, "tokens": in_tokens}

        def render(self, task: Task) -> RenderableType:
            return self.columns[task.fields["unit"]].render(task)

    # The stream as it is now: libraries that are silenced meanwhile, by redirecting stderr, must not silence the bar.
    console = rich_console(sys.stderr)
    return bars.Progress(
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        ByUnit(bars.DownloadColumn(binary_units=True), bars.MofNCompleteColumn(), Tokens()),
        ByUnit(bars.TransferSpeedColumn(), StepRate(), TokenRate()),
        bars.TimeRemainingColumn(),
        console=console,
        transient=True,
    )
