"""Schedule a plan's work: which tasks there are, which rank gets them, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgery.checkpoint.dtypes import n_bytes, n_elements
from surgery.checkpoint.reader import n_segments
from surgery.engine.kernel import TensorSlice
from surgery.engine.plan import Plan, PlannedFile, PlannedTensor
from surgery.engine.storage.journal import Journal
from surgery.engine.work.computation import bounds
from surgery.engine.work.partitioning import WorkItem, partition


@dataclass(frozen=True)
class SegmentTask:
    """A worker's unit of work: one segment of one tensor, or all tensors of one "whole" kernel call.

    tensors: their numbers in the plan; more than one only for a "whole" call.
    segment: None for a "whole" call.
    pass_number: the kernel's pass to run; None for the writing.
    place: the whole tensor, with the results of its passes; None where the passes have not run, because an earlier run
        should have written all of the tensor.
    """

    tensors: tuple[int, ...]
    segment: int | None
    pass_number: int | None = None
    place: TensorSlice | None = None


@dataclass(frozen=True)
class _RankWork:
    """A rank's unit of work: a segment, a tensor with passes, or all tensors of one "whole" kernel call.

    item: its file and weight for the partition.
    progress_bytes: its share of the progress bar.
    """

    tensors: tuple[int, ...]
    segment: int | None
    item: WorkItem
    progress_bytes: int


def segments_of(tensor: PlannedTensor) -> range:
    """Return the numbers of a tensor's segments."""
    return range(n_segments(n_elements(tensor.shape)))


def segment_bytes(tensor: PlannedTensor, segment: int) -> int:
    """Return the size of a stored segment in bytes."""
    begin, end = bounds(tensor, segment)
    return n_bytes(tensor.dtype, (end - begin,))


def whole_slice(tensor: PlannedTensor) -> TensorSlice:
    """Return the slice that is the whole tensor, before any pass has run."""
    return TensorSlice(tensor.name, 0, tensor.shape)


class Schedule:
    """The tasks of one rank.

    Args:
        journal: with the records of earlier runs, by which the remaining work is weighed.
        machines: per rank, the machine that it runs on.
    """

    def __init__(self, plan: Plan, journal: Journal, machines: Sequence[str], rank: int) -> None:
        self._plan = plan
        self._tensors = plan.tensors
        self._journal = journal
        self._file_numbers = [number for number, file in enumerate(plan.files) for _ in file.tensors]
        self._work = self._all_work()
        self._assigned = partition([work.item for work in self._work], machines)[rank]

    @property
    def progress_bytes(self) -> int:
        """The total of the progress bar."""
        return sum(self._work[number].progress_bytes for number in self._assigned)

    def tasks(self) -> list[SegmentTask]:
        """Return the tasks to begin with, in the order of their bytes; tensors with passes get more as passes end."""
        return [task for number in self._assigned for task in self._first_tasks(self._work[number])]

    def files_to_begin(self) -> list[PlannedFile]:
        """Return the files whose first bytes this rank writes."""
        # The rank with a file's first segment also writes the header's end, in the same block (`ShardWriter.begin`).
        first: dict[int, int] = {}  # file → the work with its first segment
        for number, work in enumerate(self._work):
            for index in work.tensors:
                known = self._work[first.setdefault(self._file_numbers[index], number)]
                if (min(known.tensors), known.segment or 0) > (index, work.segment or 0):
                    first[self._file_numbers[index]] = number
        assigned = set(self._assigned)
        return [self._plan.files[file] for file, number in first.items() if number in assigned]

    def _all_work(self) -> list[_RankWork]:
        """Return the work of all ranks, in the order of its bytes, the calls of "whole" kernels last."""
        work: list[_RankWork] = []
        whole_calls: dict[object, list[int]] = {}
        for index, tensor in enumerate(self._tensors):
            if tensor.kernel is not None and tensor.kernel.kind == "whole":
                # Tensors with the same kernel, inputs and parameters are parts of one call's result.
                call = (tensor.kernel.name, tuple(map(id, tensor.inputs)), tuple(sorted(tensor.params.items())))
                whole_calls.setdefault(call, []).append(index)
            elif tensor.passes:
                work.append(self._weigh((index,), None))
            else:
                work += [self._weigh((index,), segment) for segment in segments_of(tensor)]
        return work + [self._weigh(tuple(group), None) for group in whole_calls.values()]

    def _weigh(self, tensors: tuple[int, ...], segment: int | None) -> _RankWork:
        written = read = 0
        done = True
        first = self._tensors[tensors[0]]
        for index in tensors:
            numbers = segments_of(self._tensors[index]) if segment is None else (segment,)
            written += sum(segment_bytes(self._tensors[index], number) for number in numbers)
            done = done and all(self._journal.record(index, number) for number in numbers)
        # Every pass reads the inputs once more.
        n_readings = 1 + len(first.passes)
        # An earlier run's segments are only read back: counted in full, they could leave one rank all that is to do.
        if not done:
            count = n_elements(first.shape)
            begin, end = (0, count) if segment is None else bounds(first, segment)
            for source in first.inputs:
                size = sum(stored.n_bytes for stored in source.tensors)
                read += size * (end - begin) // max(count, 1) * n_readings
        item = WorkItem(self._file_numbers[tensors[0]], written + read)
        return _RankWork(tensors, segment, item, written * n_readings)

    def _first_tasks(self, work: _RankWork) -> list[SegmentTask]:
        index = work.tensors[0]
        tensor = self._tensors[index]
        if not tensor.passes:
            return [SegmentTask(work.tensors, work.segment, None, whole_slice(tensor))]
        if all(self._journal.record(index, segment) for segment in segments_of(tensor)):
            # Only compared with the journal: the passes are run after all where a segment turns out missing.
            return [SegmentTask((index,), segment) for segment in segments_of(tensor)]
        return stage_tasks(index, tensor, whole_slice(tensor), 0)


def stage_tasks(index: int, tensor: PlannedTensor, place: TensorSlice, pass_number: int | None) -> list[SegmentTask]:
    """Return the tasks of one pass over the tensor number `index`, or of its writing, segment by segment."""
    return [SegmentTask((index,), segment, pass_number, place) for segment in segments_of(tensor)]
