"""Process one task of a job in a worker: gather for a pass, or compute, copy or verify a segment and write it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from surgery.checkpoint.dtypes import n_bytes
from surgery.checkpoint.reader import SourceFiles, TensorReader, digest, octets, read_into, segments
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan
from surgery.engine.storage.direct_io import Edge
from surgery.engine.storage.journal import Journal, SegmentRecord
from surgery.engine.storage.writer import ShardWriter
from surgery.engine.work.computation import Computed, bounds, compute, compute_whole, gather, torch_device
from surgery.engine.work.passes import PassResult
from surgery.engine.work.schedule import SegmentTask, segments_of
from surgery.errors import SurgeryError


@dataclass(frozen=True)
class WrittenSegment:
    """The record of a segment that is in its file, but for `edges`, which the writer must still complete.

    resumed: an earlier run wrote and journaled it.
    """

    record: SegmentRecord
    edges: list[Edge]
    resumed: bool = False


@dataclass(frozen=True)
class MissingSegment:
    """A tensor with passes whose segments are all in the journal, but not all on the disk."""

    tensor: int


TaskResult = PassResult | MissingSegment | list[WrittenSegment]


class SegmentProcessor:
    """The function that workers call on tasks. It keeps no state between tasks: workers may be forked processes."""

    def __init__(
        self, plan: Plan, files: SourceFiles, writer: ShardWriter, journal: Journal, options: ExecutionOptions
    ) -> None:
        self._files = files
        self._writer = writer
        self._journal = journal
        self._options = options
        self.device = torch_device(options.device)
        self._tensors = plan.tensors
        self._file_names = [file.name for file in plan.files for _ in file.tensors]

    def __call__(self, task: SegmentTask, reader: TensorReader) -> TaskResult:
        """Process one task. Raises SurgeryError where NaN or infinite values came out or the disk is full."""
        index = task.tensors[0]
        tensor = self._tensors[index]
        if task.pass_number is not None:
            assert task.place is not None and task.segment is not None
            return PassResult(task, gather(tensor, task.segment, task.pass_number, task.place, reader, self.device))
        resumed = self._records_on_disk(task, reader)
        if resumed is not None:
            return [WrittenSegment(record, [], resumed=True) for record in resumed]
        if task.segment is None:
            results = compute_whole([self._tensors[i] for i in task.tensors], reader, self.device)
            # One result at a time: each stays in memory only until it is written.
            return [
                written
                for i, computed in zip(task.tensors, results, strict=True)
                for written in self._write_whole(i, computed)
            ]
        if tensor.kernel is None:
            return [self._copy(index, task.segment, reader)]
        if task.place is None:
            return MissingSegment(index)
        return [self._write(index, task.segment, compute(tensor, task.segment, task.place, reader, self.device))]

    def file_name(self, tensor: int) -> str:
        """Return the name of the output file that the tensor number `tensor` is in."""
        return self._file_names[tensor]

    def _records_on_disk(self, task: SegmentTask, reader: TensorReader) -> list[SegmentRecord] | None:
        """Return the journal's records of `task`, where it has all of them and the bytes on disk are theirs."""
        records = []
        for index in task.tensors:
            for segment in segments_of(self._tensors[index]) if task.segment is None else (task.segment,):
                record = self._journal.record(index, segment)
                if record is None:
                    return None
                begin, end = bounds(self._tensors[index], segment)
                # After a power failure the journal may have a line whose bytes never reached the disk.
                if digest(self._read_back(index, begin, end, reader)).hex() != record.digest:
                    return None
                records.append(record)
        return records

    def _copy(self, index: int, segment: int, reader: TensorReader) -> WrittenSegment:
        """Copy the stored bytes of a segment from the source to the output."""
        tensor, source = self._tensors[index], self._tensors[index].inputs[0].tensor
        begin, end = bounds(tensor, segment)
        first = n_bytes(tensor.dtype, (begin,))
        file, position = self._file_names[index], self._position(index) + first
        if self._writer.is_direct(file):
            # Written past the page cache, a segment cannot be read back yet: the bytes to hash come from the source.
            data = reader.raw(source, begin, end, "copy")
            edges = self._writer.write(file, position, octets(data))
        else:
            # Inside the kernel, without a detour through our memory; then the page cache gives the bytes to hash.
            size = n_bytes(tensor.dtype, (end,)) - first
            self._writer.copy(self._files.descriptor(source.file), source.start + first, file, position, size)
            data, edges = self._read_back(index, begin, end, reader), []
        hexdigest = digest(data).hex()
        return WrittenSegment(SegmentRecord(index, segment, hexdigest, (hexdigest,)), edges)

    def _write_whole(self, index: int, computed: Computed) -> list[WrittenSegment]:
        """Write a whole tensor; its first segment's record has the sums, the others zeros, since records add up."""
        written = []
        for segment, (begin, end) in enumerate(segments(computed.values.numel())):
            sums = computed.sums if segment == 0 else [0.0] * len(computed.sums)
            written.append(self._write(index, segment, Computed(computed.values[begin:end], sums)))
        return written

    def _write(self, index: int, segment: int, computed: Computed) -> WrittenSegment:
        tensor, data = self._tensors[index], computed.values
        begin, _ = bounds(tensor, segment)
        nonfinite = int(computed.sums[1])
        if nonfinite and not self._options.allow_nonfinite:
            raise SurgeryError(
                f"{nonfinite:,} of {data.numel():,} values from element {begin:,} on are NaN or infinite",
                where=tensor.name,
                hint="Look for them in the inputs with `surgery verify`; --allow-nonfinite writes them all the same.",
            )
        position = self._position(index) + n_bytes(tensor.dtype, (begin,))
        edges = self._writer.write(self._file_names[index], position, octets(data))
        record = SegmentRecord(index, segment, digest(data).hex(), computed.input_hashes, tuple(computed.sums))
        return WrittenSegment(record, edges)

    def _read_back(self, index: int, begin: int, end: int, reader: TensorReader) -> Tensor:
        """Read elements [begin, end) of the output tensor number `index`, as bytes."""
        tensor = self._tensors[index]
        first = n_bytes(tensor.dtype, (begin,))
        data = reader.buffer("out", n_bytes(tensor.dtype, (end,)) - first)
        descriptor = self._writer.descriptor(self._file_names[index])
        read_into(descriptor, data, self._position(index) + first, tensor.inputs[0].tensor)
        return data

    def _position(self, index: int) -> int:
        return self._writer.position(self._file_names[index], self._tensors[index].name)
