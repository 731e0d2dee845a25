"""What a run has written so far, one line a segment, so that the same command can go on after a kill.

`journal.jsonl`: a first line `{"version", "fingerprint"}`, then one line per finished segment:
`[tensor, segment, digest, [input digests], [sums]]`. A last line cut short by a kill is ignored. A line is a claim, not
a proof: before a segment is kept its bytes are read back and compared with the digest, so that even a machine that lost
power between the journal and the data resumes correctly.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from surgery.checkpoint import MANIFEST
from surgery.errors import SurgeryError

VERSION = 1
NAME = "journal.jsonl"
_TRIES, _PAUSE = 40, 0.05  # for the lock; seconds between two tries


@dataclass(frozen=True)
class Record:
    """One written segment. `digest` and `inputs` are hex; `sums` are the executor's and the kernel's measures."""

    tensor: int
    segment: int
    digest: str
    inputs: tuple[str, ...] = ()
    sums: tuple[float, ...] = ()


class Journal:
    """The journal of one `.partial` folder, held by one process at a time.

    Raises:
        SurgeryError: another process is at work in the folder, or what lies there is another job's and `discard`
            is off.
    """

    def __init__(self, folder: Path, fingerprint: str, *, discard: bool = False) -> None:
        self._path = folder / NAME
        self._records: dict[tuple[int, int], Record] = {}
        self._file = self._path.open("a+b", buffering=0)
        try:
            self._begin(folder, fingerprint, discard)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def record(self, tensor: int, segment: int) -> Record | None:
        """What an earlier run wrote of this segment, if it did."""
        return self._records.get((tensor, segment))

    def has(self, record: Record) -> bool:
        """Whether an earlier run journaled exactly this record."""
        return self._records.get((record.tensor, record.segment)) is record

    def append(self, record: Record) -> None:
        """Adds one line; it is in the kernel's hands when this returns, so a kill of the process cannot lose it."""
        fields = [record.tensor, record.segment, record.digest, record.inputs, record.sums]
        self._file.write(json.dumps(fields, separators=(",", ":")).encode() + b"\n")

    def remove(self) -> None:
        """Deletes the journal: the job is done."""
        self._path.unlink()

    def _begin(self, folder: Path, fingerprint: str, discard: bool) -> None:
        _lock(self._file, folder)
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        header = json.dumps({"version": VERSION, "fingerprint": fingerprint}).encode()
        if len(lines) > 1 and lines[0] == header:
            self._load(lines[1:-1])
            # What follows the last line break is a line cut short: the next one must not be glued to it.
            os.ftruncate(self._file.fileno(), sum(len(line) + 1 for line in lines[:-1]))
            return
        others = [path for path in folder.iterdir() if path != self._path]
        # A manifest without a journal is our own output, killed just before its last rename.
        finished = len(lines) == 1 and (folder / MANIFEST).is_file()
        if (others or len(lines) > 1) and not (discard or finished):
            raise SurgeryError(
                "holds the unfinished output of another job (or its sources have changed since)",
                where=folder,
                hint="Run that job's command to finish it, remove the folder, or add --overwrite to discard it.",
            )
        for path in others:  # or they would be committed with what is written now
            _remove(path)
        os.ftruncate(self._file.fileno(), 0)
        self._file.write(header + b"\n")

    def _load(self, lines: list[bytes]) -> None:
        for line in lines:
            try:
                tensor, segment, digest, inputs, sums = json.loads(line)
            except (ValueError, TypeError) as error:
                raise SurgeryError(
                    "is damaged", where=self._path, hint="Remove the .partial folder and start anew."
                ) from error
            self._records[tensor, segment] = Record(tensor, segment, digest, tuple(inputs), tuple(sums))


def _lock(file: BinaryIO, folder: Path) -> None:
    # Forked workers hold the lock too, and outlive a parent that was killed by what their last write takes.
    for _ in range(_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(_PAUSE)
    raise SurgeryError("another process is writing to it", where=folder)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
