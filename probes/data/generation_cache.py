"""Completions on disk: a file with one JSON line for each, only ever appended to, so that a killed run can go on.

    {"key": "5c…", "text": "So the user wants …", "ended": true}

A line that is no such record was cut short by a kill, and is passed over: its completion is made again. Several
processes may append to one file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError, usage_error


@dataclass(frozen=True)
class Completion:
    """What a model wrote; `ended` says that it ended by itself, not by the limit on its tokens."""

    text: str
    ended: bool


class GenerationCache:
    """The completions in the file `path`, by key."""

    def __init__(self, path: Path) -> None:
        """Raises SurgeryError where the file cannot be read."""
        self.path = path
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            lines = []
        except OSError as error:
            raise usage_error(f"cannot be read ({error.strerror})", where=path) from error
        self._found = dict(record for line in lines if (record := _record(line)))

    def get(self, key: str) -> Completion | None:
        """The completion `key`, if it is there."""
        return self._found.get(key)

    def add(self, completions: Mapping[str, Completion]) -> None:
        """Appends completions; they are on the disk when this returns.

        Raises:
            SurgeryError: the file cannot be written.
        """
        lines = [
            json.dumps({"key": key, "text": made.text, "ended": made.ended}).encode() + b"\n"
            for key, made in completions.items()
        ]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _append(self.path, lines)
        except OSError as error:
            raise SurgeryError(
                f"cannot be written ({error.strerror})", where=self.path, hint="What was finished before is kept."
            ) from error
        self._found.update(completions)


def _append(path: Path, lines: Sequence[bytes]) -> None:
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        # The first of these lines must not be glued to one that was cut short.
        ending = b"\n" if size and os.pread(handle, 1, size - 1) != b"\n" else b""
        data = memoryview(ending + b"".join(lines))
        while data:
            data = data[os.write(handle, data) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def _record(line: bytes) -> tuple[str, Completion] | None:
    try:
        record: Any = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    key, text, ended = record.get("key"), record.get("text"), record.get("ended")
    if not isinstance(key, str) or not isinstance(text, str) or not isinstance(ended, bool):
        return None
    return key, Completion(text, ended)
