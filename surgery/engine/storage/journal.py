"""Record each segment that a run has written, one line each, so that the same command can continue after a kill.

`journal.jsonl`: a first line `{"version", "fingerprint"}`, then one line per finished segment:
`[tensor, segment, digest, [input digests], [sums]]`. A last line cut short by a kill is ignored. Before a
segment is kept its bytes are read back and compared with the digest, so that even a machine that lost power between the
journal and the data resumes correctly.

Each rank has its own journal: rank 0 this one, rank n `journal-<n>.jsonl`. Rank 0 reads all of them, however many ranks
the run had that wrote them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from surgery.errors import SurgeryError, first_line
from surgery.io.atomic import JOURNAL, disk_error
from surgery.io.hashing import DIGEST_BYTES
from surgery.io.output_files import open_output

# Goes up when the form of the lines changes: an old journal's first line then differs, as another job's does.
VERSION = 1
NAME = JOURNAL
_OTHERS = "journal-*.jsonl"
# A model of a trillion values has a million segments, with a few hundred bytes for each.
MAX_BYTES = 1_000_000_000
# For the lock, 2 s in all: enough for workers of a killed run to end, without keeping a user from the error.
_TRIES, _PAUSE = 40, 0.05  # the pause in seconds


@dataclass(frozen=True)
class SegmentRecord:
    """One written segment. `digest` and `inputs` (a digest per input) are hex; `sums` as in `Computed.sums`."""

    tensor: int
    segment: int
    digest: str
    inputs: tuple[str, ...] = ()
    sums: tuple[float, ...] = ()


class Journal:
    """The journal of one `.partial` folder, locked by one process at a time.

    Raises:
        SurgeryError: another process is writing to the folder, or it has another job's output and `discard` is off.
    """

    def __init__(self, folder: Path, fingerprint: str, *, discard: bool = False) -> None:
        self._path = folder / NAME
        # Appending: a second process that fails to get the lock must not truncate the file.
        self._file = _open_journal(folder, NAME)
        self.records: dict[tuple[int, int], SegmentRecord] = {}
        try:
            self._open(folder, _header(fingerprint), discard)
        except BaseException:
            self._file.close()
            raise

    @classmethod
    def beside(
        cls, folder: Path, fingerprint: str, process: int, records: Mapping[tuple[int, int], SegmentRecord]
    ) -> Journal:
        """Open the journal of the rank `process` > 0; `records` are those of earlier runs, of all ranks."""
        # Without __init__, which reads and clears the folder: rank 0 has done that for all.
        journal = cls.__new__(cls)
        journal._path = folder / f"journal-{process}.jsonl"
        journal._file = _open_journal(folder, journal._path.name)
        journal.records = dict(records)
        try:
            _lock(journal._file, folder)
            journal._continue(_header(fingerprint), _lines(journal._file, folder))
        except BaseException:
            journal._file.close()
            raise
        return journal

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder to other processes; safe to call twice."""
        self._file.close()

    def record(self, tensor: int, segment: int) -> SegmentRecord | None:
        """Return an earlier run's record of this segment, if there is one."""
        return self.records.get((tensor, segment))

    def append(self, record: SegmentRecord) -> None:
        """Append a record. Unbuffered: the kernel has it when this returns, so a kill of the process cannot lose it."""
        fields = [record.tensor, record.segment, record.digest, record.inputs, record.sums]
        self._write(json.dumps(fields, separators=(",", ":")).encode() + b"\n")

    def names(self) -> list[str]:
        """Return the names of all journals of the folder, which are deleted once the job is complete."""
        return [*sorted(path.name for path in self._path.parent.glob(_OTHERS)), NAME]

    def _open(self, folder: Path, header: bytes, discard: bool) -> None:
        _lock(self._file, folder)
        beside = {path: _read_locked(path, folder) for path in sorted(folder.glob(_OTHERS))}
        lines = _lines(self._file, folder)
        # More than one: the last entry is what follows the last line break, so then the first line is whole.
        if len(lines) > 1 and lines[0] == header:
            for path, content in {self._path: lines, **beside}.items():
                # A rank that was killed before it wrote its first line left an empty journal.
                if content[0] == header:
                    self._load(path, content[1:-1])
            self._continue(header, lines)
            return
        others = [path for path in folder.iterdir() if path != self._path]
        if (others or len(lines) > 1) and not discard:
            raise SurgeryError(
                "holds the unfinished output of another job (or its sources have changed since)",
                where=folder,
                hint="Run that job's command to finish it, remove the folder, or add --overwrite to discard it.",
            )
        for path in others:  # or they would be committed as part of this output
            _remove(path)
        self._continue(header, [])

    def _continue(self, header: bytes, lines: Sequence[bytes]) -> None:
        """Continue after the last complete one of `lines`; start again where they are not this job's journal."""
        if len(lines) > 1 and lines[0] == header:
            # What follows the last line break is a line cut short: the next one must not be glued to it.
            os.ftruncate(self._file.fileno(), sum(len(line) + 1 for line in lines[:-1]))
            return
        os.ftruncate(self._file.fileno(), 0)
        self._write(header + b"\n")

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        try:
            # A write may be cut short, as on a disk that is about to be full; the next line must not be glued to it.
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise disk_error(error, self._path) from error

    def _load(self, path: Path, lines: Sequence[bytes]) -> None:
        for line in lines:
            try:
                record = _parse(line)
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                raise SurgeryError(
                    f"is damaged ({first_line(error)})", where=path, hint="Remove the .partial folder and start anew."
                ) from error
            self.records[record.tensor, record.segment] = record


def _parse(line: bytes) -> SegmentRecord:
    """Return the record in a line. Raises ValueError, TypeError, OverflowError or RecursionError where it is none."""
    tensor, segment, digest, inputs, sums = json.loads(line)
    # `type … is`, since isinstance would accept true and false as numbers.
    if not all(type(number) is int and number >= 0 for number in (tensor, segment)):
        raise ValueError("a segment has no number")
    # An input that is not hashed segment by segment, such as one with its rows in another order, has an empty one.
    if not all(len(bytes.fromhex(text)) == DIGEST_BYTES for text in (digest, *filter(None, inputs))):
        raise ValueError("a digest is cut short")
    return SegmentRecord(tensor, segment, digest, tuple(inputs), tuple(float(number) for number in sums))


def _header(fingerprint: str) -> bytes:
    return json.dumps({"version": VERSION, "fingerprint": fingerprint}).encode()


def _lines(file: BinaryIO, folder: Path) -> list[bytes]:
    """Return the lines of a journal; the last entry is what follows the last line break."""
    size = os.fstat(file.fileno()).st_size
    if size > MAX_BYTES:
        raise SurgeryError(
            f"a journal in it has {size:,} bytes, more than the {MAX_BYTES:,} that one may have",
            where=folder,
            hint="Remove the folder, so that the job starts anew.",
        )
    file.seek(0)
    return file.read().split(b"\n")


def _open_journal(folder: Path, name: str) -> BinaryIO:
    # Never through a link that lies there, or what it leads to would be cut off.
    return os.fdopen(open_output(folder, name, os.O_RDWR | os.O_CREAT | os.O_APPEND), "a+b", buffering=0)


def _read_locked(path: Path, folder: Path) -> list[bytes]:
    """Return the lines of another rank's journal, once that process has ended."""
    with _open_journal(folder, path.name) as file:
        _lock(file, folder)
        return _lines(file, folder)


def _lock(file: BinaryIO, folder: Path) -> None:
    # Forked workers share the lock, and outlive a killed parent by the time of their last write: hence several tries.
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
