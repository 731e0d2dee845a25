"""Execute a plan: write its tensors into a staging folder with worker threads, then rename the folder to OUT.

OUT appears whole or not at all. Until the rename everything is in `OUT.partial/`, where `journal.jsonl` records each
segment that was written, with its hash. A run that was killed at any moment is continued by the same command: journaled
segments are read back, compared with their hash and kept; the rest is computed. The result is the same to the bit.

Under a launcher (`accelerate launch`, torchrun) the ranks share the work as `surgery.engine.work.partitioning` assigns
it, and each keeps its own journal. OUT and the sources must be on a file system that all of them see. Rank 0 prepares
the folder and finalizes it. A rank that fails reports the failure to the others, which stop. Where one is killed the
launcher ends the others and names it; without a launcher they notice when they next wait for it. In either case the
same command continues, with any number of processes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from surgery.checkpoint.reader import SourceFiles
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, write_index
from surgery.engine.result import ExecutionResult, collect_result
from surgery.engine.storage.journal import Journal
from surgery.engine.storage.writer import ShardWriter
from surgery.engine.work.computation import torch_device
from surgery.engine.work.partitioning import this_machine
from surgery.engine.work.worker_job import FailureWatch, Records, WorkerJob
from surgery.engine.work.workers import default_threads
from surgery.errors import SurgeryError, listing
from surgery.io.atomic import disk_error, partial_path
from surgery.io.output_files import copy_output, write_output
from surgery.io.output_folder import check_free, commit_folder, output_lock
from surgery.runtime.collectives import local_device, map_over_ranks, n_active_processes, on_main

# In the staging folder of several processes, once one of them has failed. Hidden, so that no output has this name.
_FAILURE_FILE = ".fault"

T = TypeVar("T")


def execute(
    plan: Plan,
    out: Path,
    options: ExecutionOptions,
    *,
    finish: Callable[[Path, ExecutionResult], T],
    validate: Callable[[Path, ExecutionResult], None] | None = None,
) -> T:
    """Write `plan` to the folder `out`.

    Args:
        finish: writes what describes the weights (manifest, model card) into the staging folder before it is
            committed; called on rank 0.
        validate: called on rank 0 before `finish`, with the weights, config and tokenizer in the staging folder; where
            it raises SurgeryError the staging folder is deleted, since continuing would only give the same weights.

    Returns:
        What `finish` returned, on every rank; each of them then sees `out`.

    Raises:
        SurgeryError: OUT exists; another job's partial output is in the way; a source changed; NaN or infinite
            values came out; the disk is full; ranks do not see the same sources; another rank failed; `validate`
            refused the weights.
    """
    # Device and threads depend on the number of ranks, which is 1 inside of `map_over_ranks`: resolve them first.
    options = replace(options, device=local_device(options.device), threads=options.threads or default_threads())
    everyone = range(n_active_processes())
    with ExitStack() as stack:
        this = _RankExecution(plan, out, options, stack)
        views = map_over_ranks(everyone, this.open_sources)
        # The sources' sizes and times are in it: a rank with an older copy on its disk would mix two models.
        if len({view.fingerprint for view in views}) > 1:
            raise SurgeryError(
                "the processes do not see the same sources",
                where=listing(map(str, plan.source_paths), 1),
                hint="Give all machines the same files, on a disk that they share.",
            )
        records = on_main(this.prepare_folder)
        parts = map_over_ranks(everyone, lambda _: this.write_segments(records, [view.machine for view in views]))
        map_over_ranks(everyone, lambda _: this.flush())
        return on_main(this.finalize, parts, finish, validate)


@dataclass(frozen=True)
class _RankView:
    """What one rank sees: the fingerprint of the plan with its sources, and the machine that it runs on."""

    fingerprint: str
    machine: str


class _RankExecution:
    """One rank's part in the execution of a plan: a method per stage, between which the ranks wait for each other."""

    def __init__(self, plan: Plan, out: Path, options: ExecutionOptions, stack: ExitStack) -> None:
        self.plan = plan
        self.out = out
        self.options = options
        self.distributed = n_active_processes() > 1
        self.stack = stack  # closes what is opened, at the latest when the execution ends
        self.staging = partial_path(out)
        self.failure_file = self.staging / _FAILURE_FILE
        self.rejected = False

    def open_sources(self, rank: int) -> _RankView:
        """Check OUT and the device, and open the sources."""
        self.rank = rank
        check_free(self.out, overwrite=self.options.overwrite)
        torch_device(self.options.device)
        self.files = self.stack.enter_context(SourceFiles(self.plan.source_paths))
        self.fingerprint = self.plan.fingerprint(self.files.stamps())
        return _RankView(self.fingerprint, this_machine())

    def prepare_folder(self) -> Records:
        """Create the staging folder, journal and weight files; return the records of earlier runs. Rank 0 only."""
        # Before anything is written: another process may be at work in the same folder, or have finished it meanwhile.
        self.stack.enter_context(output_lock(self.out))
        self.stack.callback(self._remove_rejected)  # registered here, so that it runs when all files are closed
        check_free(self.out, overwrite=self.options.overwrite)
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, self.staging) from error
        self.journal = self.stack.enter_context(Journal(self.staging, self.fingerprint, discard=self.options.overwrite))
        self.failure_file.unlink(missing_ok=True)  # of a run that ended by a failure, which this one continues
        self.writer = self.stack.enter_context(ShardWriter(self.staging, self.plan.files))
        return self.journal.records

    def write_segments(self, records: Records, machines: Sequence[str]) -> tuple[Records, int]:
        """Write this rank's segments; return their records and how many bytes earlier runs had written."""
        if self.rank > 0:
            journal = Journal.beside(self.staging, self.fingerprint, self.rank, records)
            self.journal = self.stack.enter_context(journal)
            self.writer = self.stack.enter_context(ShardWriter(self.staging, self.plan.files, create=False))
        job = WorkerJob(self.plan, self.files, self.writer, self.journal, self.options)
        watch = FailureWatch(self.failure_file) if self.distributed else None
        try:
            return job.run(self.rank, machines, watch)
        except Exception as error:
            if watch is not None:
                watch.report(error)
            raise

    def flush(self) -> None:
        """Complete the blocks that several ranks write to, and check the sources. All ranks must have written."""
        self.writer.flush()
        # Once all tensors are written: a change at any time before is noticed, and its mixture never committed.
        self.files.check_unchanged()
        if self.distributed:
            self.writer.sync()  # rank 0 can do so for its own machine alone
            self.writer.close()
        if self.rank > 0:
            self.journal.close()

    def finalize(
        self,
        parts: Sequence[tuple[Records, int]],
        finish: Callable[[Path, ExecutionResult], T],
        validate: Callable[[Path, ExecutionResult], None] | None,
    ) -> T:
        """Write the files beside the weights, validate and commit the folder. Rank 0 only."""
        records = {key: record for part, _ in parts for key, record in part.items()}
        result = collect_result(self.plan, self.files, records, sum(resumed for _, resumed in parts))
        for name, source in self.plan.side_files.items():
            if isinstance(source, bytes):
                write_output(self.staging, name, source)
            else:
                copy_output(source, self.staging, name)
        write_index(self.plan, self.staging)
        if validate is not None:
            try:
                validate(self.staging, result)
            except SurgeryError:
                self.rejected = True
                raise
        report = finish(self.staging, result)
        commit_folder(self.staging, self.out, overwrite=self.options.overwrite, discard=self.journal.names())
        return report

    def _remove_rejected(self) -> None:
        if self.rejected:
            shutil.rmtree(self.staging, ignore_errors=True)
