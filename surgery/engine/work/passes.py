"""Run the passes of kernels: collect what each gathers of every segment, and decide what a tensor needs next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery.engine.plan import PlannedTensor
from surgery.engine.work.schedule import SegmentTask, segments_of, stage_tasks, whole_slice


@dataclass(frozen=True)
class PassResult:
    """The result of a pass over one segment: what it gathered, piece by piece."""

    task: SegmentTask
    pieces: list[Any]


class PassTracker:
    """The state of every tensor with passes: pass 0 over all segments, pass 1, …, then the writing.

    The next stage of a tensor begins when the one before has all segments, since a pass reduces the whole tensor.
    """

    def __init__(self, tensors: Sequence[PlannedTensor]) -> None:
        self._tensors = tensors
        self._gathered: dict[int, dict[int, list[Any]]] = {}  # tensor → segment → what the running pass gathered
        self._restarted: set[int] = set()

    def advance(self, result: PassResult) -> list[SegmentTask]:
        """Add a segment's result; return the tasks of the tensor's next stage once its pass is complete."""
        task, place = result.task, result.task.place
        assert place is not None and task.pass_number is not None and task.segment is not None
        index, pass_number = task.tensors[0], task.pass_number
        tensor = self._tensors[index]
        by_segment = self._gathered.setdefault(index, {})
        by_segment[task.segment] = result.pieces
        if len(by_segment) < len(segments_of(tensor)):
            return []
        # Segments come in any order; reduced in theirs, the result does not depend on the number of threads.
        in_order = [piece for segment in sorted(by_segment) for piece in by_segment[segment]]
        reduced = tensor.passes[pass_number].reduce(in_order, place, **tensor.params)
        # Before the next pass, which gathers under the same index and would seem complete at once.
        del self._gathered[index]
        place = replace(place, pass_results={**place.pass_results, **reduced})
        return stage_tasks(index, tensor, place, pass_number + 1 if pass_number + 1 < len(tensor.passes) else None)

    def restart(self, index: int) -> list[SegmentTask]:
        """Return the tasks that write the tensor `index` again from its first pass, the first time it is called."""
        if index in self._restarted:  # several of its segments may turn out missing
            return []
        self._restarted.add(index)
        return stage_tasks(index, self._tensors[index], whole_slice(self._tensors[index]), 0)
