"""Streams a plan to disk: segments over workers, a journal beside the weights, one atomic rename at the end.

OUT appears whole or not at all. Until then everything lies in `OUT.partial/`, where `journal.jsonl` names each segment
that was written, with its hash. A run that was killed at any moment is continued by the same command: journaled
segments are read back, compared with their hash and kept; the rest is done. The result is the same to the bit.

Under a launcher (`accelerate launch`, torchrun) the processes share the work, as `surgery.engine.work_partition` says,
and each keeps a journal of its own. OUT and the sources must lie where all of them see the same files. The first
process prepares the folder and finishes it. A fault in one is told to the others, which stop. Where one is killed the
launcher ends the others and names it; without a launcher they learn of it when they next wait for it. In either case
the same command goes on, with any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from surgery.checkpoint.reader import SourceFiles
from surgery.engine.computation import torch_device
from surgery.engine.journal import Journal
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, write_index
from surgery.engine.result import ExecutionResult, collect_result
from surgery.engine.work_partition import this_machine
from surgery.engine.worker_job import FailureWatch, Records, WorkerJob
from surgery.engine.workers import default_threads
from surgery.engine.writer import ShardWriter
from surgery.errors import SurgeryError, listing
from surgery.io.atomic import check_free, commit_folder, copy_file, disk_error, partial_path
from surgery.runtime.collectives import local_device, map_over_ranks, n_active_processes

_FAULT = "fault.txt"  # in the folder while several processes work, where one has failed

T = TypeVar("T")


def execute(plan: Plan, out: Path, options: ExecutionOptions, *, finish: Callable[[Path, ExecutionResult], T]) -> T:
    """Writes `plan` to the folder `out`.

    Args:
        finish: writes what describes the weights (manifest, model card) into the folder before it is committed; called
            in one process.

    Returns:
        What `finish` returned, in every process, each of which then sees `out`.

    Raises:
        SurgeryError: OUT exists; another job's partial output is in the way; a source changed; NaN or infinite
            values came out; the disk is full; processes do not see the same sources; another process failed.
    """
    # What is known by how many share the work is settled here: inside of `map_over_ranks` a process is alone.
    options = replace(options, device=local_device(options.device), threads=options.threads or default_threads())
    everyone = range(n_active_processes())
    with ExitStack() as stack:
        team = _Team(plan, out, options, stack)
        views = map_over_ranks(everyone, team.look)
        if len({view.fingerprint for view in views}) > 1:
            raise SurgeryError(
                "the processes do not see the same sources",
                where=listing(map(str, plan.source_paths), 1),
                hint="Give all machines the same files, on a disk that they share.",
            )
        [records] = map_over_ranks([None], lambda _: team.prepare())
        parts = map_over_ranks(everyone, lambda _: team.stream(records, [view.machine for view in views]))
        map_over_ranks(everyone, lambda _: team.settle())
        return map_over_ranks([None], lambda _: team.finish(parts, finish))[0]


@dataclass(frozen=True)
class _View:
    """What a process sees of a job: the plan with its sources, and from where."""

    fingerprint: str
    machine: str


class _Team:
    """What each process that shares a job does at each of its stages, between which all wait for each other."""

    def __init__(self, plan: Plan, out: Path, options: ExecutionOptions, stack: ExitStack) -> None:
        self.plan = plan
        self.out = out
        self.options = options
        self.several = n_active_processes() > 1
        self.stack = stack  # closes what is opened, at the latest when the job ends
        self.partial = partial_path(out)
        self.fault = self.partial / _FAULT

    def look(self, process: int) -> _View:
        """Opens the sources."""
        self.process = process
        check_free(self.out, overwrite=self.options.overwrite)
        torch_device(self.options.device)
        self.files = self.stack.enter_context(SourceFiles(self.plan.source_paths))
        self.fingerprint = self.plan.fingerprint(self.files.stamps())
        return _View(self.fingerprint, this_machine())

    def prepare(self) -> Records:
        """Makes the folder and its files, in the first process; returns what earlier runs have done."""
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, self.partial) from error
        self.journal = self.stack.enter_context(Journal(self.partial, self.fingerprint, discard=self.options.overwrite))
        self.fault.unlink(missing_ok=True)
        self.writer = self.stack.enter_context(ShardWriter(self.partial, self.plan.files))
        return self.journal.records

    def stream(self, records: Records, machines: Sequence[str]) -> tuple[Records, int]:
        """This process's share of the work: the records of its segments, and how many bytes it found done."""
        if self.process > 0:
            journal = Journal.beside(self.partial, self.fingerprint, self.process, records)
            self.journal = self.stack.enter_context(journal)
            self.writer = self.stack.enter_context(ShardWriter(self.partial, self.plan.files, create=False))
        job = WorkerJob(self.plan, self.files, self.writer, self.journal, self.options)
        watch = FailureWatch(self.fault) if self.several else None
        try:
            return job.stream(self.process, machines, watch)
        except Exception as error:
            if watch is not None:
                watch.tell(error)
            raise

    def settle(self) -> None:
        """What must wait until nobody writes any more: blocks that several have written to are completed."""
        self.writer.flush()
        self.files.check_unchanged()
        if self.several:
            self.writer.sync()  # the first process can do so for its own machine alone
            self.writer.close()
        if self.process > 0:
            self.journal.close()

    def finish(self, parts: Sequence[tuple[Records, int]], finish: Callable[[Path, ExecutionResult], T]) -> T:
        """Writes what lies beside the weights and commits the folder, in the first process."""
        records = {key: record for part, _ in parts for key, record in part.items()}
        outcome = collect_result(self.plan, self.files, records, sum(resumed for _, resumed in parts))
        for name, source in self.plan.side_files.items():
            copy_file(source, self.partial / name)
        write_index(self.plan, self.partial)
        result = finish(self.partial, outcome)
        self.journal.remove()
        commit_folder(self.partial, self.out, overwrite=self.options.overwrite)
        return result
