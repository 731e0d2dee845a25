"""Write one rank's share of a plan: run its tasks on workers, write each segment to its place, and record it.

Segments that an earlier run has journaled are read back, and kept where their bytes are what the journal says.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from surgery.checkpoint.reader import SourceFiles
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan
from surgery.engine.storage.journal import Journal, SegmentRecord
from surgery.engine.storage.writer import ShardWriter
from surgery.engine.work.passes import PassResult, PassTracker
from surgery.engine.work.schedule import Schedule, segment_bytes
from surgery.engine.work.segment import MissingSegment, SegmentProcessor
from surgery.engine.work.workers import run
from surgery.errors import SurgeryError
from surgery.io.redaction import redact
from surgery.runtime.collectives import failure_text

_WATCH_SECONDS = 0.5  # between two looks for a failure file, which on a network disk is not for free

Records = Mapping[tuple[int, int], SegmentRecord]
"""(tensor, segment) → record."""


class FailureWatch:
    """Report a failure to the other ranks, and notice theirs, by a file in the staging folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next = 0.0

    def report(self, error: Exception) -> None:
        """Write the failure for the other ranks; where that fails, they get it when they next wait for this one."""
        with suppress(OSError):
            self._path.write_text(redact(failure_text(error)), encoding="utf-8")

    def check(self) -> None:
        """Raise SurgeryError where another rank has failed."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _WATCH_SECONDS
        with suppress(FileNotFoundError):
            # Empty where it is read between its creation and its writing.
            raise SurgeryError(self._path.read_text(encoding="utf-8") or "another process failed")


class WorkerJob:
    """The writing of one plan by one rank: its schedule, the passes of its tensors, and the loop over the results."""

    def __init__(
        self, plan: Plan, files: SourceFiles, writer: ShardWriter, journal: Journal, options: ExecutionOptions
    ) -> None:
        self._plan = plan
        self._tensors = plan.tensors
        self._files = files
        self._writer = writer
        self._journal = journal
        self._options = options
        self._processor = SegmentProcessor(plan, files, writer, journal, options)

    def run(self, rank: int, machines: Sequence[str], watch: FailureWatch | None) -> tuple[Records, int]:
        """Write the segments of `rank`.

        Args:
            machines: per rank, the machine that it runs on.

        Returns:
            The records of the segments, and how many bytes an earlier run had written.

        Raises:
            SurgeryError: NaN or infinite values came out; the disk is full; another rank failed.
        """
        schedule = Schedule(self._plan, self._journal, machines, rank)
        passes = PassTracker(self._tensors)
        for file in schedule.files_to_begin():
            self._writer.begin(file)
        records: dict[tuple[int, int], SegmentRecord] = {}
        resumed = 0
        queue = deque(schedule.tasks())
        pinned = self._processor.device.type == "cuda"
        with self._options.progress("Writing", schedule.progress_bytes) as advance:
            for result in run(queue, self._processor, self._files, threads=self._options.threads, pinned=pinned):
                if watch is not None:
                    watch.check()
                # What a tensor needs next goes before the tensors behind it: few of them are under way at a time.
                match result:
                    case PassResult(task=task):
                        queue.extendleft(reversed(passes.advance(result)))
                        advance(segment_bytes(self._tensors[task.tensors[0]], task.segment or 0))
                    case MissingSegment(tensor=tensor):
                        queue.extendleft(reversed(passes.restart(tensor)))
                    case _:
                        for written in result:
                            record = written.record
                            self._writer.complete(self._processor.file_name(record.tensor), written.edges)
                            size = segment_bytes(self._tensors[record.tensor], record.segment)
                            if written.resumed:
                                resumed += size
                            else:
                                # After the bytes, or a kill in between would record what is not there.
                                self._journal.append(record)
                            records[record.tensor, record.segment] = record
                            advance(size)
        return records, resumed
