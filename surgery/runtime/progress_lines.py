"""Report progress as lines of text, where nobody looks at a terminal: in a log, a pipe, a job of a cluster.

A stage says nothing for its first seconds, so that short work stays quiet; then one line, another every half minute,
and one when it ends. A thread writes them, since a stage may be busy with one of its steps for an hour.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

FIRST_AFTER = 2.0  # seconds that a stage runs before its first line
EVERY = 30.0  # seconds between two lines of a stage; and before the first of one that runs inside another

Clock = Callable[[], float]


def short(number: float) -> str:
    """Return a number of tokens in short form: 950, 12.3k, 4.5M, 1.2B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def binary(n_bytes: float) -> str:
    """Return a number of bytes in the units that bars have: 950 bytes, 12.3 KiB, 4.5 GiB."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if n_bytes >= 1 << power:
            return f"{n_bytes / (1 << power):.1f} {unit}"
    return f"{n_bytes:.0f} bytes"


def duration(seconds: float) -> str:
    """Return a time in its two largest units: 41 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


@dataclass
class _Stage:
    """One stage: what is done of it, and what its last line said."""

    label: str
    total: int
    unit: str
    start: float
    due: float
    done: int = 0
    note: str = ""
    said_at: float | None = None
    said_done: int = 0

    def line(self, now: float) -> str:
        """Return the line of a stage that runs, and remember when and of what."""
        since, before = (self.start, 0) if self.said_at is None else (self.said_at, self.said_done)
        rate = (self.done - before) / (now - since) if now > since else 0.0
        self.said_at, self.said_done, self.due = now, self.done, now + EVERY
        # Of what has no parts that are counted there is only the time.
        parts = [self._amount() if self.total > 0 or self.done else f"running for {duration(now - self.start)}"]
        if rate > 0:
            parts.append(self._rate(rate))
            if self.total > self.done:
                parts.append(f"{duration((self.total - self.done) / rate)} left")
        return self._with_label(", ".join(parts))

    def end(self, now: float, *, failed: bool) -> str:
        """Return the line of a stage that has ended."""
        took = duration(now - self.start)
        if not (self.total > 0 or self.done):
            return self._with_label(f"{'stopped' if failed else 'done'} after {took}")
        if failed:
            return self._with_label(f"stopped at {self._amount()} after {took}")
        return self._with_label(f"done, {self._count(self.done)} in {took}")

    def _with_label(self, text: str) -> str:
        return f"{self.label}: {text}" + (f", {self.note}" if self.note else "")

    def _amount(self) -> str:
        if self.total <= 0:  # nobody knows how much there is
            return self._count(self.done)
        share = min(100, 100 * self.done // self.total)
        return f"{self._number(self.done)} of {self._count(self.total)} ({share} %)"

    def _number(self, number: float) -> str:
        if self.unit == "bytes":
            return binary(number)
        return short(number) if self.unit == "tokens" else f"{number:,}"

    def _count(self, number: float) -> str:
        return self._number(number) if self.unit == "bytes" else f"{self._number(number)} {self.unit}"

    def _rate(self, rate: float) -> str:
        if self.unit == "bytes":
            return f"{binary(rate)}/s"
        if self.unit == "tokens":
            return f"{short(rate)} tokens/s"
        # Of slow steps the time that one takes says more.
        return f"{rate:.1f} {self.unit}/s" if rate >= 1 else f"{duration(1 / rate)} each"


# Workers are forked while a thread of a reporter runs.
_reporters: weakref.WeakSet[LineReporter] = weakref.WeakSet()


class LineReporter:
    """Writes the lines of all open stages. `advance` and `tick` may be called by any thread.

    Args:
        write: prints one line.
        clock: seconds that only rise.
        beat: seconds between two looks of the thread at the clock; None for no thread, and lines by `tick` alone.
    """

    def __init__(
        self, write: Callable[[str], None], *, clock: Clock = time.monotonic, beat: float | None = 1.0
    ) -> None:
        self._write, self._clock, self._beat = write, clock, beat
        self._stages: list[_Stage] = []
        self._lock = threading.RLock()
        self._ended = threading.Event()
        _reporters.add(self)

    def before_fork(self) -> None:
        """Wait until no thread is writing: a child would have its locks, and nobody there would ever release them."""
        self._lock.acquire()

    def after_fork(self) -> None:
        """Go on in the parent."""
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """Forget the parent's stages: their thread is the parent's."""
        self._stages, self._lock, self._ended = [], threading.RLock(), threading.Event()

    @contextmanager
    def stage(self, label: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
        """Report a stage while the block runs; the value entered is called with what more is done, and a note."""
        now = self._clock()
        stage = _Stage(label, total, unit, now, now + (EVERY if self._stages else FIRST_AFTER))

        def advance(amount: int, note: str) -> None:
            with self._lock:
                stage.done += amount
                stage.note = note or stage.note
            self.tick()

        with self._lock:
            self._stages.append(stage)
            outermost = len(self._stages) == 1
        if outermost:
            self._start_thread()
        failed = True
        try:
            yield advance
            failed = False
        finally:
            with self._lock:
                if stage in self._stages:  # a forked child has none of its parent's
                    self._stages.remove(stage)
                if not self._stages:
                    self._ended.set()
                if stage.said_at is not None:
                    self._write(stage.end(self._clock(), failed=failed))

    def tick(self) -> None:
        """Write the lines that are due."""
        now = self._clock()
        with self._lock:
            for stage in self._stages:
                if now >= stage.due:
                    self._write(stage.line(now))

    def _start_thread(self) -> None:
        if self._beat is None:
            return
        ended = self._ended = threading.Event()

        def watch() -> None:
            while not ended.wait(self._beat):
                self.tick()

        # Not waited for: it holds nothing, and ends with the process.
        threading.Thread(target=watch, name="progress", daemon=True).start()


def _before_fork() -> None:
    _held.extend(_reporters)
    for reporter in _held:
        reporter.before_fork()


def _after_fork() -> None:
    while _held:
        _held.pop().after_fork()


def _after_fork_in_child() -> None:
    while _held:
        _held.pop().after_fork_in_child()


_held: list[LineReporter] = []
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
