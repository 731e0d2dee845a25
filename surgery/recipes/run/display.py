"""How a run looks while it runs: one live table on a terminal, one line per event elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from surgery.reporting.report import format_value
from surgery.runtime.progress import ProgressEvent, read_progress, short

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Say = Callable[[str], None]
REFRESH = 0.2  # seconds
SHOWN = 30  # rows; of longer runs, those that matter most
BAR = 20  # characters
ORDER = (
    "running",
    "failed",
    "left out",
    "waiting",
    "done",
    "unchanged",
)  # of rows that are shown, where not all can be
STYLES = {
    "running": "bold",
    "failed": "red",
    "left out": "red",
    "waiting": "dim",
    "done": "green",
    "unchanged": "green",
}


class Display(Protocol):
    """Is told what happens, and asked now and then to look."""

    def started(self, name: str, told: Path) -> None:
        """A step begins; it will tell how far it is in the file `told`."""

    def ended(self, name: str, state: str, seconds: float) -> None:
        """A step is done, unchanged, failed, or left out."""

    def look(self) -> None:
        """Some time has gone by."""


@contextmanager
def display(names: Sequence[str], say: Say) -> Iterator[Display]:
    """A live table on stderr where that is a terminal; else `say` is called with each event."""
    from rich.console import Console

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield LineDisplay(say)
        return
    from rich.live import Live

    # It refreshes when we say so: a thread of its own would be in the way of starting processes.
    with Live(console=console, auto_refresh=False) as live:
        table = BarDisplay(names, console)

        def refresh() -> None:
            live.update(table.render(), refresh=True)

        table.refresh = refresh
        try:
            yield table
        finally:
            table.refresh = None
            live.update(table.render(), refresh=True)


class LineDisplay:
    """One line when a step begins, and one when it ends."""

    def __init__(self, say: Say) -> None:
        self._say = say

    def started(self, name: str, told: Path) -> None:
        self._say(f"{name}: started")

    def ended(self, name: str, state: str, seconds: float) -> None:
        took = f" ({seconds:.1f} s)" if state in ("done", "failed") else ""
        self._say(f"{name}: {state}{took}")

    def look(self) -> None:
        pass


class BarDisplay:
    """The live table: one row per step."""

    def __init__(self, names: Sequence[str], console: Console) -> None:
        self._states = dict.fromkeys(names, "waiting")
        self._seconds: dict[str, float] = {}
        self._since: dict[str, float] = {}
        self._told: dict[str, Path] = {}
        self._shown = 0.0
        self.refresh: Callable[[], None] | None = None

    def started(self, name: str, told: Path) -> None:
        self._states[name], self._since[name], self._told[name] = "running", time.monotonic(), told
        self._draw()

    def ended(self, name: str, state: str, seconds: float) -> None:
        self._states[name], self._seconds[name] = state, seconds
        self._draw()

    def look(self) -> None:
        if time.monotonic() - self._shown >= REFRESH:
            self._draw()

    def _draw(self) -> None:
        self._shown = time.monotonic()
        if self.refresh is not None:
            self.refresh()

    def render(self) -> RenderableType:
        """The table as it is now."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD)
        for heading in ("step", "state", "time", "how far"):
            table.add_column(heading, overflow="ellipsis", no_wrap=True)
        shown = list(self._states)
        if len(shown) > SHOWN:
            most = sorted(shown, key=lambda name: ORDER.index(self._states[name]))[:SHOWN]
            shown = [name for name in shown if name in most]
        for name in shown:
            state = self._states[name]
            running = state == "running"
            seconds = time.monotonic() - self._since[name] if running else self._seconds.get(name)
            far = how_far(read_progress(self._told[name])) if running else ""
            clock = "" if seconds is None else f"{seconds:.0f} s"
            table.add_row(Text(name), Text(state, style=STYLES.get(state, "")), Text(clock), Text(far))
        hidden = len(self._states) - len(shown)
        if hidden:
            table.caption = f"and {hidden} more: {_counts(self._states)}"
        return table


def how_far(said: ProgressEvent | None) -> str:
    """What a step tells of its progress, in a line."""
    if said is None:
        return ""
    share = min(1.0, said.done / said.total) if said.total > 0 else 0.0
    bar = ("━" * round(BAR * share)).ljust(BAR, "╌")
    if said.unit == "bytes":
        amount = f"{format_value(said.done, 'bytes')} of {format_value(said.total, 'bytes')}"
    elif said.unit == "tokens":
        amount = f"{short(said.done)} of {short(said.total)} tokens"
    else:
        amount = f"{said.done:,} of {said.total:,}"
    return " ".join(part for part in (bar, amount, said.label, said.note) if part)


def _counts(states: Mapping[str, str]) -> str:
    counts = {state: list(states.values()).count(state) for state in ORDER}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)
