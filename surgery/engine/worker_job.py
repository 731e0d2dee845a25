"""One process's part of a job: its segments over workers, each written in its place and journaled.

In come a plan, open sources, the writer of OUT and the journal; out come the records of the segments that fell to this
process. What an earlier run has journaled is read back and kept where it is what the journal says.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from surgery.checkpoint.dtypes import n_bytes, n_elements
from surgery.checkpoint.reader import SourceFiles, TensorReader, digest, n_segments, octets, read_into, segments
from surgery.engine.computation import Computed, bounds, compute, compute_whole, gather, torch_device
from surgery.engine.direct_io import Edge
from surgery.engine.journal import Journal, SegmentRecord
from surgery.engine.kernel import TensorSlice
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan
from surgery.engine.work_partition import WorkItem, partition
from surgery.engine.workers import run
from surgery.engine.writer import ShardWriter
from surgery.errors import SurgeryError
from surgery.runtime.collectives import failure_text

_WATCH_SECONDS = 0.5

Records = Mapping[tuple[int, int], SegmentRecord]
"""(tensor, segment) → record."""

_Written = tuple[
    SegmentRecord, list[Edge]
]  # what is journaled of a segment, and what must still be given to the writer


@dataclass(frozen=True)
class _Unit:
    """What one thread does in one go: one segment of one tensor, or every part of one "whole" kernel call.

    number: which of the kernel's passes it belongs to; None for the writing. place: of the whole tensor; None where
    the passes have not been run, because all of the tensor should be there already.
    """

    tensors: tuple[int, ...]
    segment: int | None
    number: int | None = None
    place: TensorSlice | None = None


@dataclass(frozen=True)
class _Chunk:
    """What one process does as a whole: a segment, a tensor with passes, or every part of one "whole" kernel call.

    piece: what it counts for when work is dealt out. written: bytes that the progress bar counts it as.
    """

    tensors: tuple[int, ...]
    segment: int | None
    piece: WorkItem
    written: int


@dataclass(frozen=True)
class _Lost:
    """A tensor of which the journal has every segment, but the disk has not."""

    tensor: int


@dataclass(frozen=True)
class _Gathered:
    """What a pass gathered of one segment, piece by piece."""

    unit: _Unit
    pieces: list[Any]


class FailureWatch:
    """How a process that works hears of another's fault: by a file in the folder, looked for now and then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next = 0.0

    def report(self, error: Exception) -> None:
        """Write the failure for the other ranks; where that fails, they get it when they next wait for this one."""
        with suppress(OSError):
            self._path.write_text(failure_text(error), encoding="utf-8")

    def check(self) -> None:
        """Raises SurgeryError where another process has failed."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _WATCH_SECONDS
        with suppress(FileNotFoundError):
            raise SurgeryError(self._path.read_text(encoding="utf-8") or "another process failed")


class WorkerJob:
    """The work on one plan, as one of the processes that share it sees it."""

    def __init__(
        self, plan: Plan, files: SourceFiles, writer: ShardWriter, journal: Journal, options: ExecutionOptions
    ) -> None:
        self.plan = plan
        self.files = files
        self.writer = writer
        self.journal = journal
        self.options = options
        self.device = torch_device(options.device)
        self.tensors = plan.tensors
        self.file_of = [file.name for file in plan.files for _ in file.tensors]
        self.number_of = [number for number, file in enumerate(plan.files) for _ in file.tensors]
        self.restarted: set[int] = set()
        self.gathered: dict[int, dict[int, list[Any]]] = {}  # tensor → segment → what the running pass gathered

    def stream(self, process: int, machines: Sequence[str], watch: FailureWatch | None) -> tuple[Records, int]:
        """What falls to `process` of those on `machines`: the records of its segments, and the bytes found done."""
        records: dict[tuple[int, int], SegmentRecord] = {}
        resumed = 0
        chunks = self._chunks()
        dealt = partition([chunk.piece for chunk in chunks], machines)
        mine = [chunks[number] for number in dealt[process]]
        self._begin_files(chunks, set(dealt[process]))
        queue = deque(unit for chunk in mine for unit in self._units(chunk))
        work = sum(chunk.written for chunk in mine)
        with self.options.progress("Writing", work) as advance:
            pinned = self.device.type == "cuda"
            for done in run(queue, self._work, self.files, threads=self.options.threads, pinned=pinned):
                if watch is not None:
                    watch.check()
                if isinstance(done, _Lost):
                    queue.extendleft(reversed(self._again(done.tensor)))
                    continue
                if isinstance(done, _Gathered):
                    queue.extendleft(reversed(self._next(done)))
                    advance(self._size(done.unit.tensors[0], done.unit.segment or 0))
                    continue
                for record, edges in done:
                    self.writer.complete(self.file_of[record.tensor], edges)
                    size = self._size(record.tensor, record.segment)
                    if not self.journal.has(record):
                        self.journal.append(record)
                    else:
                        resumed += size
                    records[record.tensor, record.segment] = record
                    advance(size)
        return records, resumed

    def _chunks(self) -> list[_Chunk]:
        """All of the work, in the order of its bytes; then the calls of "whole" kernels."""
        chunks: list[_Chunk] = []
        wholes: dict[object, list[int]] = {}
        for index, tensor in enumerate(self.tensors):
            if tensor.kernel is not None and tensor.kernel.kind == "whole":
                call = (
                    tensor.kernel.name,
                    tuple(map(id, tensor.inputs)),
                    tuple(sorted(tensor.params.items())),
                )
                wholes.setdefault(call, []).append(index)
            elif tensor.passes:
                chunks.append(self._chunk((index,), None))
            else:
                parts = range(n_segments(n_elements(tensor.shape)))
                chunks += [self._chunk((index,), part) for part in parts]
        return chunks + [self._chunk(tuple(group), None) for group in wholes.values()]

    def _chunk(self, group: tuple[int, ...], part: int | None) -> _Chunk:
        written = read = 0
        done = True
        first = self.tensors[group[0]]
        for index in group:
            tensor = self.tensors[index]
            parts = range(n_segments(n_elements(tensor.shape))) if part is None else (part,)
            written += sum(self._size(index, number) for number in parts)
            done = done and all(self.journal.record(index, number) for number in parts)
        if not done:
            count = n_elements(first.shape)
            begin, end = (0, count) if part is None else bounds(first, part)
            for source in first.inputs:
                size = sum(stored.n_bytes for stored in source.tensors)
                read += size * (end - begin) // max(count, 1) * (1 + len(first.passes))
        piece = WorkItem(self.number_of[group[0]], written + read)
        return _Chunk(group, part, piece, written * (1 + len(first.passes)))

    def _begin_files(self, chunks: Sequence[_Chunk], mine: Set[int]) -> None:
        """Tells the writer of the files whose first tensor this process writes."""
        first: dict[int, int] = {}
        for number, chunk in enumerate(chunks):
            for index in chunk.tensors:
                at = first.setdefault(self.number_of[index], number)
                if (min(chunks[at].tensors), chunks[at].segment or 0) > (index, chunk.segment or 0):
                    first[self.number_of[index]] = number
        for file, number in first.items():
            if number in mine:
                self.writer.begin(self.plan.files[file])

    def _units(self, chunk: _Chunk) -> list[_Unit]:
        index, tensor = chunk.tensors[0], self.tensors[chunk.tensors[0]]
        if tensor.passes:
            parts = range(n_segments(n_elements(tensor.shape)))
            if all(self.journal.record(index, part) for part in parts):
                # Only looked at: should a segment not be what the journal says, the passes are run after all.
                return [_Unit((index,), part) for part in parts]
            return self._stage(index, TensorSlice(tensor.name, 0, tensor.shape), 0)
        return [_Unit(chunk.tensors, chunk.segment, None, TensorSlice(tensor.name, 0, tensor.shape))]

    def _again(self, index: int) -> list[_Unit]:
        """All of a tensor anew, from its first pass, the first time that one of its segments turns out lost."""
        if index in self.restarted:
            return []
        self.restarted.add(index)
        tensor = self.tensors[index]
        return self._stage(index, TensorSlice(tensor.name, 0, tensor.shape), 0)

    def _stage(self, index: int, place: TensorSlice, number: int | None) -> list[_Unit]:
        """One pass over a tensor, or its writing, segment by segment."""
        if number is not None:
            self.gathered[index] = {}
        return [_Unit((index,), part, number, place) for part in range(n_segments(n_elements(place.shape)))]

    def _next(self, done: _Gathered) -> list[_Unit]:
        """What is to be done after a pass has seen a segment: nothing yet, or the next stage of its tensor."""
        unit, place, number = done.unit, done.unit.place, done.unit.number
        assert place is not None and number is not None and unit.segment is not None
        index = unit.tensors[0]
        tensor, pieces = self.tensors[index], self.gathered[index]
        pieces[unit.segment] = done.pieces
        if len(pieces) < n_segments(n_elements(place.shape)):
            return []
        inorder = [piece for part in sorted(pieces) for piece in pieces[part]]
        found = tensor.passes[number].reduce(inorder, place, **tensor.params)
        del self.gathered[index]
        more = replace(place, pass_results={**place.pass_results, **found})
        return self._stage(index, more, number + 1 if number + 1 < len(tensor.passes) else None)

    def _work(self, unit: _Unit, reader: TensorReader) -> list[_Written] | _Gathered | _Lost:
        if unit.number is not None:
            tensor, place = self.tensors[unit.tensors[0]], unit.place
            assert place is not None and unit.segment is not None
            return _Gathered(unit, gather(tensor, unit.segment, unit.number, place, reader, self.device))
        held = self._held(unit, reader)
        if held is not None:
            return [(record, []) for record in held]
        if unit.segment is None:
            group = [self.tensors[index] for index in unit.tensors]
            wholes = zip(unit.tensors, compute_whole(group, reader, self.device), strict=True)
            return [written for index, computed in wholes for written in self._store_whole(index, computed)]
        index = unit.tensors[0]
        tensor, place = self.tensors[index], unit.place
        if tensor.kernel is None:
            return [self._copy(index, unit.segment, reader)]
        if place is None:
            return _Lost(index)
        return [self._store(index, unit.segment, compute(tensor, unit.segment, place, reader, self.device))]

    def _held(self, unit: _Unit, reader: TensorReader) -> list[SegmentRecord] | None:
        """The journal's records of `unit`, where all of them are there and the bytes on disk are theirs."""
        records = []
        for index in unit.tensors:
            count = n_elements(self.tensors[index].shape)
            parts = range(n_segments(count)) if unit.segment is None else (unit.segment,)
            for part in parts:
                record = self.journal.record(index, part)
                if record is None:
                    return None
                begin, end = bounds(self.tensors[index], part)
                if digest(self._written(index, begin, end, reader)).hex() != record.digest:
                    return None
                records.append(record)
        return records

    def _copy(self, index: int, part: int, reader: TensorReader) -> _Written:
        tensor, source = self.tensors[index], self.tensors[index].inputs[0].tensor
        begin, end = bounds(tensor, part)
        first = n_bytes(tensor.dtype, (begin,))
        file, position = self.file_of[index], self._position(index) + first
        if self.writer.is_direct(file):
            data = reader.raw(source, begin, end, "copy")
            edges = self.writer.write(file, position, octets(data))
        else:
            size = n_bytes(tensor.dtype, (end,)) - first
            self.writer.copy(self.files.descriptor(source.file), source.start + first, file, position, size)
            data, edges = self._written(index, begin, end, reader), []
        hexdigest = digest(data).hex()
        return SegmentRecord(index, part, hexdigest, (hexdigest,)), edges

    def _store_whole(self, index: int, computed: Computed) -> list[_Written]:
        written = []
        for part, (begin, end) in enumerate(segments(computed.values.numel())):
            sums = computed.sums if part == 0 else [0.0] * len(computed.sums)
            written.append(self._store(index, part, Computed(computed.values[begin:end], sums)))
        return written

    def _store(self, index: int, part: int, computed: Computed) -> _Written:
        tensor, data = self.tensors[index], computed.values
        begin, _ = bounds(tensor, part)
        nonfinite = int(computed.sums[1])
        if nonfinite and not self.options.allow_nonfinite:
            raise SurgeryError(
                f"{nonfinite:,} of {data.numel():,} values from element {begin:,} on are NaN or infinite",
                where=tensor.name,
                hint="Look for them in the inputs with `surgery verify`; --allow-nonfinite writes them all the same.",
            )
        position = self._position(index) + n_bytes(tensor.dtype, (begin,))
        edges = self.writer.write(self.file_of[index], position, octets(data))
        return SegmentRecord(index, part, digest(data).hex(), computed.input_hashes, tuple(computed.sums)), edges

    def _written(self, index: int, begin: int, end: int, reader: TensorReader) -> Tensor:
        tensor = self.tensors[index]
        first = n_bytes(tensor.dtype, (begin,))
        data = reader.buffer("out", n_bytes(tensor.dtype, (end,)) - first)
        descriptor = self.writer.descriptor(self.file_of[index])
        read_into(descriptor, data, self._position(index) + first, tensor.inputs[0].tensor)
        return data

    def _position(self, index: int) -> int:
        return self.writer.position(self.file_of[index], self.tensors[index].name)

    def _size(self, index: int, part: int) -> int:
        begin, end = bounds(self.tensors[index], part)
        return n_bytes(self.tensors[index].dtype, (end - begin,))
