"""Streams a plan to disk: segments over threads, a journal beside the weights, one atomic rename at the end.

OUT appears whole or not at all. Until then everything lies in `OUT.partial/`, where `journal.jsonl` names each segment
that was written, with its hash. A run that was killed at any moment is continued by the same command: journaled
segments are read back, compared with their hash and kept; the rest is done. The result is the same to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from surgery.commit import check_free, commit, copy_file, partial_of
from surgery.dtypes import is_float, n_bytes, n_elements
from surgery.errors import SurgeryError, usage_error
from surgery.hashing import hash_parts
from surgery.journal import Journal, Record
from surgery.plan import Kernel, Plan, PlannedTensor, write_index
from surgery.progress import Progress, silent
from surgery.stream import (
    BLOCK,
    SEGMENT,
    TORCH_DTYPES,
    Input,
    Reader,
    SourceFiles,
    compute_dtype,
    default_threads,
    digest,
    hash_tensor,
    octets,
    read_into,
    run,
    segments,
)
from surgery.writer import ShardWriter, disk_error


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
    """What one thread does in one go: one segment of one tensor, or every part of one "whole" kernel call."""

    tensors: tuple[int, ...]
    segment: int | None


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
        files.check_unchanged()
        for name, source in plan.side_files.items():
            copy_file(source, partial / name)
        write_index(plan, partial)
        finish(partial, outcome)
        journal.remove()
        commit(partial, out, overwrite=options.overwrite)
    return outcome


def torch_device(name: str) -> torch.device:
    """The device called `name`. Raises SurgeryError where this machine lacks it."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise usage_error(f"got {name!r}, expected cpu or cuda[:N]", where="--device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise usage_error(
            "no CUDA device is available to this installation of torch",
            where=f"--device {name}",
            hint="Use --device cpu.",
        )
    if device.type not in ("cpu", "cuda"):
        raise usage_error(f"got {name!r}, expected cpu or cuda[:N]", where="--device")
    return device


class _Job:
    def __init__(self, plan: Plan, files: SourceFiles, writer: ShardWriter, journal: Journal, options: Options) -> None:
        self.plan = plan
        self.files = files
        self.writer = writer
        self.journal = journal
        self.options = options
        self.device = torch_device(options.device)
        self.threads = options.threads or default_threads()
        self.tensors = plan.tensors
        self.file_of = [file.name for file in plan.files for _ in file.tensors]

    def stream(self) -> Outcome:
        records: dict[tuple[int, int], Record] = {}
        resumed = 0
        with self.options.progress("Writing", self.plan.output_bytes) as advance:
            for done in run(
                self._units(), self._work, self.files, threads=self.threads, pinned=self.device.type == "cuda"
            ):
                for record in done:
                    size = self._size(record)
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
                units += [_Unit((index,), part) for part, _ in enumerate(segments(n_elements(tensor.shape)))]
        return units + [_Unit(tuple(group), None) for group in wholes.values()]

    def _work(self, unit: _Unit, reader: Reader) -> list[Record]:
        held = self._held(unit, reader)
        if held is not None:
            return held
        if unit.segment is None:
            return self._whole(unit.tensors, reader)
        index = unit.tensors[0]
        begin, end = self._bounds(index, unit.segment)
        if self.tensors[index].kernel is None:
            return [self._copy(index, unit.segment, begin, end, reader)]
        return [self._elementwise(index, unit.segment, begin, end, reader)]

    def _held(self, unit: _Unit, reader: Reader) -> list[Record] | None:
        """The journal's records of `unit`, where all of them are there and the bytes on disk are theirs."""
        records = []
        for index in unit.tensors:
            count = n_elements(self.tensors[index].shape)
            parts = range(len(list(segments(count)))) if unit.segment is None else (unit.segment,)
            for part in parts:
                record = self.journal.record(index, part)
                if record is None:
                    return None
                begin, end = self._bounds(index, part)
                if digest(self._written(index, begin, end, reader)).hex() != record.digest:
                    return None
                records.append(record)
        return records

    def _copy(self, index: int, part: int, begin: int, end: int, reader: Reader) -> Record:
        tensor, source = self.tensors[index], self.tensors[index].inputs[0].tensor
        first = n_bytes(tensor.dtype, (begin,))
        self.writer.copy(
            self.files.descriptor(source.file),
            source.start + first,
            self.file_of[index],
            self._position(index) + first,
            n_bytes(tensor.dtype, (end,)) - first,
        )
        hexdigest = digest(self._written(index, begin, end, reader)).hex()
        return Record(index, part, hexdigest, (hexdigest,))

    def _elementwise(self, index: int, part: int, begin: int, end: int, reader: Reader) -> Record:
        tensor = self.tensors[index]
        values = [reader.values(source, begin, end, slot) for slot, source in enumerate(tensor.inputs)]
        hashes = tuple(
            digest(value).hex() if _is_plain(source) else ""
            for source, value in zip(tensor.inputs, values, strict=True)
        )
        out = reader.buffer("out", n_bytes(tensor.dtype, (end - begin,))).view(TORCH_DTYPES[tensor.dtype])
        sums = self._compute(tensor, values, out)
        return self._store(index, part, begin, out, sums, hashes)

    def _compute(self, tensor: PlannedTensor, values: Sequence[Tensor], out: Tensor) -> list[float]:
        """Fills `out` with the kernel's rounded result; returns [squares, nonfinite, *measures]."""
        kernel, params = _kernel(tensor), tensor.params
        compute = compute_dtype((tensor.dtype, *(source.tensor.dtype for source in tensor.inputs)))
        count = out.numel()
        block = BLOCK if self.device.type == "cpu" else count
        totals = [0.0] * (2 + len(kernel.measures))
        with _stream_of(self.device):
            for begin in range(0, count, max(block, 1)):
                piece = slice(begin, begin + block)
                inputs = [value[piece].to(self.device, non_blocking=True).to(compute) for value in values]
                stored = kernel.fn(inputs, **params).to(out.dtype)
                out[piece].copy_(stored, non_blocking=True)
                for i, value in enumerate(_measure(kernel, params, inputs, stored.to(compute))):
                    totals[i] += value
            if self.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        return totals

    def _whole(self, group: Sequence[int], reader: Reader) -> list[Record]:
        first = self.tensors[group[0]]
        kernel = _kernel(first)
        compute = compute_dtype((first.dtype, *(source.tensor.dtype for source in first.inputs)))
        inputs = [reader.whole(source, slot).to(self.device, compute) for slot, source in enumerate(first.inputs)]
        result = kernel.fn(inputs, **first.params)
        results = result if isinstance(result, tuple) else (result,)
        records = []
        for index in group:
            tensor = self.tensors[index]
            stored = results[tensor.part].to(TORCH_DTYPES[tensor.dtype])
            measured = _measure(kernel, first.params, inputs, stored.to(compute))
            flat = stored.cpu().contiguous().view(-1)
            for part, (begin, end) in enumerate(segments(flat.numel())):
                sums = measured if part == 0 else [0.0] * len(measured)
                records.append(self._store(index, part, begin, flat[begin:end], sums, ()))
        return records

    def _store(
        self, index: int, part: int, begin: int, data: Tensor, sums: Sequence[float], hashes: tuple[str, ...]
    ) -> Record:
        tensor = self.tensors[index]
        nonfinite = int(sums[1])
        if nonfinite and not self.options.allow_nonfinite:
            raise SurgeryError(
                f"{nonfinite:,} of {data.numel():,} values from element {begin:,} on are NaN or infinite",
                where=tensor.name,
                hint="Look for them in the inputs with `surgery verify`; --allow-nonfinite writes them all the same.",
            )
        position = self._position(index) + n_bytes(tensor.dtype, (begin,))
        self.writer.write(self.file_of[index], position, octets(data))
        return Record(index, part, digest(data).hex(), hashes, tuple(sums))

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
                if _is_plain(source) and all(len(record.inputs) > slot for record in mine):
                    parts = (bytes.fromhex(record.inputs[slot]) for record in mine)
                    known[id(source.tensor)] = hash_parts(parts)
        return Outcome(hashes, self._source_hashes(known), sums, resumed)

    def _source_hashes(self, known: dict[int, str]) -> dict[str, dict[str, str]]:
        """Hashes of all source tensors that entered the plan; those not seen segment by segment are read again."""
        entered = {}
        for tensor in self.tensors:
            for source in tensor.inputs:
                stored = source.tensor
                update = (stored.update.a, stored.update.b) if stored.update is not None else ()
                for part in (stored, *update):
                    entered[id(part)] = part
        reader = Reader(self.files)
        for key, stored in entered.items():
            if key not in known:
                known[key] = hash_tensor(reader, stored)
        by_role: dict[str, dict[str, str]] = {}
        for role, checkpoint in self.plan.sources.items():
            held = by_role[role] = {}
            for stored in checkpoint.tensors.values():
                update = (stored.update.a, stored.update.b) if stored.update is not None else ()
                held.update({part.name: known[id(part)] for part in (stored, *update) if id(part) in known})
        return by_role

    def _bounds(self, index: int, part: int) -> tuple[int, int]:
        return part * SEGMENT, min((part + 1) * SEGMENT, n_elements(self.tensors[index].shape))

    def _position(self, index: int) -> int:
        return self.writer.position(self.file_of[index], self.tensors[index].name)

    def _size(self, record: Record) -> int:
        begin, end = self._bounds(record.tensor, record.segment)
        return n_bytes(self.tensors[record.tensor].dtype, (end - begin,))


def _measure(kernel: Kernel, params: Mapping[str, object], inputs: Sequence[Tensor], values: Tensor) -> list[float]:
    flat = values.reshape(-1)
    squares = torch.dot(flat, flat).item()
    # One pass finds both; a sum of squares that overflowed is no proof, so then the values are counted.
    nonfinite = 0 if math.isfinite(squares) else flat.numel() - int(torch.isfinite(flat).sum())
    extra = kernel.measure(inputs, values, **params) if kernel.measure else ()
    return [squares, float(nonfinite), *map(float, extra)]


def _kernel(tensor: PlannedTensor) -> Kernel:
    assert tensor.kernel is not None
    return tensor.kernel


def _is_plain(source: Input) -> bool:
    """Whether what is read is what is stored, in its order, so that its hash is the stored tensor's."""
    return source.rows is None and source.tensor.update is None and is_float(source.tensor.dtype)


def _stream_of(device: torch.device) -> torch.cuda.StreamContext | ExitStack:
    """Each thread's own CUDA stream, so that copies and arithmetic of several segments overlap."""
    if device.type != "cuda":
        return ExitStack()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
