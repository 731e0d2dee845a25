"""A cache of completions on disk: a JSON Lines file that is only ever appended to, so that a killed run can continue.

    {"key": "5c…", "text": "So the user wants …", "ended": true}

A line that is no such record was truncated by a kill, and is skipped: its completion is generated again. Several
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
from surgery.io.atomic import disk_error
from surgery.io.input_files import MAX_DATA_BYTES, read_bytes
from surgery.io.private_files import FILE_MODE


@dataclass(frozen=True)
class Completion:
    """Generated text; `ended` is False if it was cut at the limit of new tokens."""

    text: str
    ended: bool


class GenerationCache:
    """The completions in the file `path`, by key."""

    def __init__(self, path: Path) -> None:
        """Raises SurgeryError where the file cannot be read."""
        self.path = path
        try:
            exists = path.exists() or path.is_symlink()
            lines = read_bytes(path, limit=MAX_DATA_BYTES).split(b"\n") if exists else []
        except SurgeryError as error:
            raise usage_error(error.what, where=path, hint=error.hint) from error
        self._completions = dict(record for line in lines if (record := _record(line)))

    def get(self, key: str) -> Completion | None:
        """Return the completion `key`; None if it is not cached."""
        return self._completions.get(key)

    def add(self, completions: Mapping[str, Completion]) -> None:
        """Append completions; they are durable when this returns.

        Raises:
            SurgeryError: the file cannot be written.
        """
        lines = [
            json.dumps({"key": key, "text": completion.text, "ended": completion.ended}).encode() + b"\n"
            for key, completion in completions.items()
        ]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _append(self.path, lines)
        except OSError as error:
            failure = disk_error(error, self.path)
            kept = "What was finished before is kept."
            raise SurgeryError(failure.what, where=failure.where, hint=failure.hint or kept) from error
        self._completions.update(completions)


def _append(path: Path, lines: Sequence[bytes]) -> None:
    # O_APPEND makes every write go to the end, also when another process has written since.
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, FILE_MODE)
    try:
        size = os.fstat(handle).st_size
        # A kill may have truncated the last line: the first new one must not be appended to it.
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
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    key, text, ended = record.get("key"), record.get("text"), record.get("ended")
    if not isinstance(key, str) or not isinstance(text, str) or not isinstance(ended, bool):
        return None
    return key, Completion(text, ended)
