"""Show a run while it runs: a live table on a terminal, one line per event elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from surgery.io.escaping import one_line
from surgery.reporting.report import format_value
from surgery.runtime.progress import MOST_CHARACTERS, ProgressEvent, read_progress
from surgery.runtime.progress_lines import EVERY, Clock, duration, short
from surgery.runtime.terminal import rich_console

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Notify = Callable[[str], None]
REFRESH_SECONDS = 0.2
MOST_ROWS = 30  # of longer runs, the rows that matter most
BAR = 20  # characters
# Of rows, where not all can be shown: what a person waits for or must see comes first.
ORDER = ("running", "failed", "left out", "waiting", "done", "unchanged")
STYLES = {
    "running": "bold",
    "failed": "red",
    "left out": "red",
    "waiting": "dim",
    "done": "green",
    "unchanged": "green",
}


class Display(Protocol):
    """Shows the states of a run's steps."""

    def started(self, name: str, progress: Path) -> None:
        """Show that a step has started, which writes its progress to the file `progress`."""

    def ended(self, name: str, state: str, seconds: float) -> None:
        """Show that a step is done, unchanged, failed or left out."""

    def refresh(self) -> None:
        """Show the progress of running steps, if some time has gone by."""


@contextmanager
def display(names: Sequence[str], notify: Notify) -> Iterator[Display]:
    """A live table on stderr where that is a terminal; else `say` is called with each event, and every half minute."""
    console = rich_console(sys.stderr)
    if not console.is_terminal:
        yield LineDisplay(notify)
        return
    from rich.live import Live

    # Without a thread that refreshes: starting a process by fork is safe only while no other thread runs.
    with Live(console=console, auto_refresh=False) as live:
        table = BarDisplay(names, console)

        def draw() -> None:
            live.update(table.render(), refresh=True)

        table.on_change = draw
        try:
            yield table
        finally:
            table.on_change = None
            live.update(table.render(), refresh=True)


class LineDisplay:
    """Prints one line when a step starts, one every half minute that it runs, and one when it ends."""

    def __init__(self, notify: Notify, *, clock: Clock = time.monotonic) -> None:
        self._notify, self._clock = notify, clock
        self._running: dict[str, _RunningLine] = {}

    def started(self, name: str, progress: Path) -> None:
        now = self._clock()
        self._running[name] = _RunningLine(progress, now, now + EVERY)
        self._notify(f"{name}: started")

    def ended(self, name: str, state: str, seconds: float) -> None:
        self._running.pop(name, None)
        took = f" ({seconds:.1f} s)" if state in ("done", "failed") else ""
        self._notify(f"{name}: {state}{took}")

    def refresh(self) -> None:
        now = self._clock()
        for name, line in self._running.items():
            if now >= line.due:
                line.due = now + EVERY
                far = _in_words(read_progress(line.progress))
                self._notify(
                    ", ".join(part for part in (f"{name}: running for {duration(now - line.start)}", far) if part)
                )


@dataclass
class _RunningLine:
    """A running step: the file of its progress, when it started, and when its next line is due."""

    progress: Path
    start: float
    due: float


class BarDisplay:
    """The live table: one row per step."""

    def __init__(self, names: Sequence[str], console: Console) -> None:
        self._states = dict.fromkeys(names, "waiting")
        self._seconds: dict[str, float] = {}
        self._since: dict[str, float] = {}
        self._progress: dict[str, Path] = {}
        self._drawn_at = 0.0
        self.on_change: Callable[[], None] | None = None

    def started(self, name: str, progress: Path) -> None:
        self._states[name], self._since[name], self._progress[name] = "running", time.monotonic(), progress
        self._draw()

    def ended(self, name: str, state: str, seconds: float) -> None:
        self._states[name], self._seconds[name] = state, seconds
        self._draw()

    def refresh(self) -> None:
        if time.monotonic() - self._drawn_at >= REFRESH_SECONDS:
            self._draw()

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        if self.on_change is not None:
            self.on_change()

    def render(self) -> RenderableType:
        """Return the table as it is now."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD)
        for heading in ("step", "state", "time", "how far"):
            table.add_column(heading, overflow="ellipsis", no_wrap=True)
        names = list(self._states)
        # More rows than the terminal has would scroll, and could not be drawn over.
        if len(names) > MOST_ROWS:
            most = sorted(names, key=lambda name: ORDER.index(self._states[name]))[:MOST_ROWS]
            names = [name for name in names if name in most]
        for name in names:
            state = self._states[name]
            running = state == "running"
            seconds = time.monotonic() - self._since[name] if running else self._seconds.get(name)
            far = format_progress(read_progress(self._progress[name])) if running else ""
            clock = "" if seconds is None else f"{seconds:.0f} s"
            table.add_row(Text(name), Text(state, style=STYLES.get(state, "")), Text(clock), Text(far))
        hidden = len(self._states) - len(names)
        if hidden:
            table.caption = f"and {hidden} more: {_counts(self._states)}"
        return table


def format_progress(event: ProgressEvent | None) -> str:
    """Return a step's progress as one line; empty if it has reported none."""
    if event is None:
        return ""
    share = min(1.0, event.done / event.total) if event.total > 0 else 0.0
    bar = ("━" * round(BAR * share)).ljust(BAR, "╌")
    return " ".join(part for part in (bar, _amount(event), *_texts(event)) if part)


def _in_words(event: ProgressEvent | None) -> str:
    """Return a step's progress as part of a sentence; empty if it has reported none."""
    if event is None:
        return ""
    label, note = _texts(event)
    share = f" ({min(100, 100 * event.done // event.total)} %)" if event.total > 0 else ""
    return f"{label}: {_amount(event)}{share}" + (f", {note}" if note else "")


def _amount(event: ProgressEvent) -> str:
    if event.unit == "bytes":
        return f"{format_value(event.done, 'bytes')} of {format_value(event.total, 'bytes')}"
    if event.unit == "tokens":
        return f"{short(event.done)} of {short(event.total)} tokens"
    return f"{event.done:,} of {event.total:,}"


def _texts(event: ProgressEvent) -> tuple[str, str]:
    # Of a file that a step's process writes, and so are its texts.
    return one_line(event.label, MOST_CHARACTERS), one_line(event.note, MOST_CHARACTERS)


def _counts(states: Mapping[str, str]) -> str:
    counts = {state: list(states.values()).count(state) for state in ORDER}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)
