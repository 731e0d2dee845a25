"""A child process tells its parent how far it is: a small JSON file that is replaced a few times a second.

The parent names the file in the environment (`FILE`) and reads it with `heard`; what the child says is a `Told`.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "SURGERY_PROGRESS"
BETWEEN = 0.2  # seconds from one time of telling to the next


@dataclass(frozen=True)
class Told:
    """How far a stage of the work is: `done` of `total`, in bytes, steps or tokens."""

    label: str
    done: int
    total: int
    unit: str
    note: str = ""


class Teller:
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
            _write(Path(self._path), Told(self._label, self._done, self._total, self._unit, self._note))


def heard(path: Path) -> Told | None:
    """What was told last; None where nothing was."""
    try:
        return Told(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write(path: Path, told: Told) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(asdict(told)), encoding="utf-8")
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
