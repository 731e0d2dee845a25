"""Streams a plan to disk: segments over workers, a journal beside the weights, one atomic rename at the end.

OUT appears whole or not at all. Until then everything lies in `OUT.partial/`, where `journal.jsonl` names each segment
that was written, with its hash. A run that was killed at any moment is continued by the same command: journaled
segments are read back, compared with their hash and kept; the rest is done. The result is the same to the bit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from surgery.checkpoint import StoredTensor
from surgery.commit import check_free, commit, copy_file, partial_of
from surgery.compute import Computed, bounds, compute, compute_whole, gather, is_plain, torch_device
from surgery.direct import Edge
from surgery.dtypes import n_bytes, n_elements
from surgery.errors import SurgeryError
from surgery.files import disk_error
from surgery.hashing import hash_parts
from surgery.journal import Journal, Record
from surgery.plan import Place, Plan, write_index
from surgery.progress import Progress, silent
from surgery.stream import (
    Reader,
    SourceFiles,
    digest,
    hash_tensor,
    n_segments,
    octets,
    read_into,
    segments,
)
from surgery.workers import run
from surgery.writer import ShardWriter

_Written = tuple[Record, list[Edge]]  # what is journaled of a segment, and what must still be given to the writer


@dataclass(frozen=True)
class Outcome:
    """What a job did.

    hashes: output tensor → hash of its stored bytes.
    source_hashes: role → tensor → hash, of every source tensor that was read.
    sums: computed output tensor → its kernel's measures, and "squares" (Σ of the stored values squared) and
        "nonfinite" (how many stored values are NaN or infinite).
    """

    hashes: Mapping[str, str]
    source_hashes: Mapping[str, Mapping[str, str]]
    sums: Mapping[str, Mapping[str, float]]
    resumed_bytes: int = 0

    def total(self, measure: str) -> float:
        """The sum of one measure over all computed tensors."""
        return math.fsum(sums.get(measure, 0.0) for sums in self.sums.values())


@dataclass(frozen=True)
class Options:
    """How a plan is run; none of these changes a byte of the result.

    threads: None for one per processor. device: "cpu" or "cuda[:n]". overwrite: replace an OUT that this tool wrote,
    and drop another job's `.partial`. allow_nonfinite: write NaN and infinite values instead of stopping at them.
    """

    threads: int | None = None
    device: str = "cpu"
    overwrite: bool = False
    allow_nonfinite: bool = False
    progress: Progress = field(default=silent, compare=False)


@dataclass(frozen=True)
class _Unit:
    """What one thread does in one go: one segment of one tensor, or every part of one "whole" kernel call.

    number: which of the kernel's passes it belongs to; None for the writing. place: of the whole tensor; None where
    the passes have not been run, because all of the tensor should be there already.
    """

    tensors: tuple[int, ...]
    segment: int | None
    number: int | None = None
    place: Place | None = None


@dataclass(frozen=True)
class _Lost:
    """A tensor of which the journal has every segment, but the disk has not."""

    tensor: int


@dataclass(frozen=True)
class _Gathered:
    """What a pass gathered of one segment, piece by piece."""

    unit: _Unit
    pieces: list[Any]


def execute(plan: Plan, out: Path, options: Options, *, finish: Callable[[Path, Outcome], None]) -> Outcome:
    """Writes `plan` to the folder `out`.

    Args:
        finish: writes what describes the weights (manifest, model card) into the folder before it is committed.

    Raises:
        SurgeryError: OUT exists; another job's partial output is in the way; a source changed; NaN or infinite
            values came out; the disk is full.
    """
    check_free(out, overwrite=options.overwrite)
    torch_device(options.device)
    partial = partial_of(out)
    with ExitStack() as stack:
        files = stack.enter_context(SourceFiles(plan.source_paths))
        try:
            partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, partial) from error
        journal = stack.enter_context(Journal(partial, plan.fingerprint(files.stamps()), discard=options.overwrite))
        writer = stack.enter_context(ShardWriter(partial, plan.files))
        outcome = _Job(plan, files, writer, journal, options).stream()
        writer.flush()
        files.check_unchanged()
        for name, source in plan.side_files.items():
            copy_file(source, partial / name)
        write_index(plan, partial)
        finish(partial, outcome)
        journal.remove()
        commit(partial, out, overwrite=options.overwrite)
    return outcome


class _Job:
    def __init__(self, plan: Plan, files: SourceFiles, writer: ShardWriter, journal: Journal, options: Options) -> None:
        self.plan = plan
        self.files = files
        self.writer = writer
        self.journal = journal
        self.options = options
        self.device = torch_device(options.device)
        self.tensors = plan.tensors
        self.file_of = [file.name for file in plan.files for _ in file.tensors]
        self.restarted: set[int] = set()
        self.gathered: dict[int, dict[int, list[Any]]] = {}  # tensor → segment → what the running pass gathered

    def stream(self) -> Outcome:
        records: dict[tuple[int, int], Record] = {}
        resumed = 0
        queue = deque(self._units())
        work = sum(n_bytes(tensor.dtype, tensor.shape) * (1 + len(tensor.passes)) for tensor in self.tensors)
        with self.options.progress("Writing", work) as advance:
            pinned = self.device.type == "cuda"
            for done in run(queue, self._work, self.files, threads=self.options.threads, pinned=pinned):
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
        return self._outcome(records, resumed)

    def _units(self) -> list[_Unit]:
        units: list[_Unit] = []
        wholes: dict[object, list[int]] = {}
        for index, tensor in enumerate(self.tensors):
            if tensor.kernel is not None and tensor.kernel.kind == "whole":
                call = (
                    tensor.kernel.name,
                    tuple(map(id, tensor.inputs)),
                    tuple(sorted(tensor.params.items())),
                )
                wholes.setdefault(call, []).append(index)
            else:
                parts = range(n_segments(n_elements(tensor.shape)))
                if tensor.passes and all(self.journal.record(index, part) for part in parts):
                    # Only looked at: should a segment not be what the journal says, the passes are run after all.
                    units += [_Unit((index,), part) for part in parts]
                else:
                    units += self._stage(index, Place(tensor.name, 0, tensor.shape), 0 if tensor.passes else None)
        return units + [_Unit(tuple(group), None) for group in wholes.values()]

    def _again(self, index: int) -> list[_Unit]:
        """All of a tensor anew, from its first pass, the first time that one of its segments turns out lost."""
        if index in self.restarted:
            return []
        self.restarted.add(index)
        tensor = self.tensors[index]
        return self._stage(index, Place(tensor.name, 0, tensor.shape), 0)

    def _stage(self, index: int, place: Place, number: int | None) -> list[_Unit]:
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
        found = tensor.passes[number].settle(inorder, place, **tensor.params)
        del self.gathered[index]
        more = replace(place, known={**place.known, **found})
        return self._stage(index, more, number + 1 if number + 1 < len(tensor.passes) else None)

    def _work(self, unit: _Unit, reader: Reader) -> list[_Written] | _Gathered | _Lost:
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

    def _held(self, unit: _Unit, reader: Reader) -> list[Record] | None:
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

    def _copy(self, index: int, part: int, reader: Reader) -> _Written:
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
        return Record(index, part, hexdigest, (hexdigest,)), edges

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
        return Record(index, part, digest(data).hex(), computed.input_hashes, tuple(computed.sums)), edges

    def _written(self, index: int, begin: int, end: int, reader: Reader) -> Tensor:
        tensor = self.tensors[index]
        first = n_bytes(tensor.dtype, (begin,))
        data = reader.buffer("out", n_bytes(tensor.dtype, (end,)) - first)
        descriptor = self.writer.descriptor(self.file_of[index])
        read_into(descriptor, data, self._position(index) + first, tensor.inputs[0].tensor)
        return data

    def _outcome(self, records: Mapping[tuple[int, int], Record], resumed: int) -> Outcome:
        hashes: dict[str, str] = {}
        sums: dict[str, dict[str, float]] = {}
        known: dict[int, str] = {}
        for index, tensor in enumerate(self.tensors):
            mine = [records[index, part] for part, _ in enumerate(segments(n_elements(tensor.shape)))]
            hashes[tensor.name] = hash_parts(bytes.fromhex(record.digest) for record in mine)
            if tensor.kernel is not None:
                names = ("squares", "nonfinite", *tensor.kernel.measures)
                columns = zip(*(record.sums for record in mine), strict=True)
                totals = [math.fsum(column) for column in columns] or [0.0] * len(names)
                sums[tensor.name] = dict(zip(names, totals, strict=True))
            for slot, source in enumerate(tensor.inputs):
                if is_plain(source) and all(len(record.inputs) > slot for record in mine):
                    parts = (bytes.fromhex(record.inputs[slot]) for record in mine)
                    known[id(source.tensor)] = hash_parts(parts)
        return Outcome(hashes, self._source_hashes(known), sums, resumed)

    def _source_hashes(self, known: dict[int, str]) -> dict[str, dict[str, str]]:
        """Hashes of all source tensors that entered the plan; those not seen segment by segment are read again."""
        entered: dict[int, StoredTensor] = {}
        for tensor in self.tensors:
            for source in tensor.inputs:
                entered |= {id(part): part for stored in source.tensors for part in stored.parts}
        reader = Reader(self.files)
        for key, stored in entered.items():
            if key not in known:
                known[key] = hash_tensor(reader, stored)
        by_role: dict[str, dict[str, str]] = {}
        for role, checkpoint in self.plan.sources.items():
            held = by_role[role] = {}
            for stored in checkpoint.tensors.values():
                held.update({part.name: known[id(part)] for part in stored.parts if id(part) in known})
        return by_role

    def _position(self, index: int) -> int:
        return self.writer.position(self.file_of[index], self.tensors[index].name)

    def _size(self, index: int, part: int) -> int:
        begin, end = bounds(self.tensors[index], part)
        return n_bytes(self.tensors[index].dtype, (end - begin,))
