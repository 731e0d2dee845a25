"""Run a pipeline: each step is a process of its own, in parallel where memory allows, and done once for its inputs.

What is done is recorded in RUN/run.json, under keys of all that decides a step's output (`cache_keys`): the same
command goes on where a run was stopped or killed, and does nothing where nothing has changed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.io.atomic import write_file
from surgery.recipes.run.consent import NO_CONSENT, Consent, check_consent
from surgery.recipes.run.content_hashes import FileHashCache
from surgery.recipes.run.estimates import MEMORY_SHARE, check_disk, free_memory
from surgery.recipes.run.inputs import InputResolver
from surgery.recipes.run.multiprocess import run_steps_on_all_ranks
from surgery.recipes.run.paths import HASHES, RECIPE, REPORT, RunPaths, cli_arguments, command_line, step_outputs
from surgery.recipes.run.preview import SCORING, RunPreview, preview_run, steps_to_repeat
from surgery.recipes.run.progress_display import Display, Notify, display
from surgery.recipes.run.pushes import push_all
from surgery.recipes.run.report import write_report
from surgery.recipes.run.state import RunRecord, StepRecord, locked, read_record
from surgery.recipes.run.step_runner import StepRunner, StepStatus, check_sources
from surgery.recipes.run.subprocesses import POLL_SECONDS, Runner, RunningStep, StepProcess, start, stop
from surgery.recipes.types import Pipeline, RecipeStep
from surgery.runtime.collectives import on_main
from surgery.runtime.environment import is_main, n_processes
from surgery.runtime.interrupts import DeferredInterrupt


@dataclass(frozen=True)
class RunReport:
    """The result of a run.

    Attributes:
        preview: what was to be done.
        statuses: step → done, unchanged, failed or left out; empty after a dry run.
        steps: the records of run.json.
        pushes: what run.json records of each push.
        report: the HTML page with every step's results.
    """

    preview: RunPreview
    statuses: Mapping[str, StepStatus] = field(default_factory=dict)
    steps: Mapping[str, StepRecord] = field(default_factory=dict)
    pushes: tuple[Mapping[str, Any], ...] = ()
    report: Path | None = None

    @property
    def failed(self) -> tuple[str, ...]:
        """The steps that failed."""
        return tuple(name for name, status in self.statuses.items() if status == "failed")

    def error(self, run: Path, *, again: str = "The same command") -> SurgeryError | None:
        """Return the error that names the failed steps, why they failed, and that `again` goes on; None if none did."""
        if not self.failed:
            return None
        paths = RunPaths(self.preview.pipeline, run)
        parts = []
        for name in self.failed:
            why = [f"  {line.removeprefix('error: ')}" for line in (self.steps[name].error or "").splitlines()]
            parts += [f"step {name} failed:", *why, f"  (its log: {paths.of(name).log})"]
        left = [name for name, status in self.statuses.items() if status == "left out"]
        if left:
            parts.append(f"Left out, because they need it: {', '.join(left)}.")
        parts.append(f"{again} goes on from there.")
        return SurgeryError(parts)


def run_pipeline(
    pipeline: Pipeline,
    run: Path,
    *,
    jobs: int | None = None,
    from_step: str | None = None,
    dry_run: bool = False,
    consent: Consent = NO_CONSENT,
    runner: Runner = start,
    show: Callable[[RunPreview], None] = lambda preview: None,
    notify: Notify = lambda text: None,
    bars: bool = False,
) -> RunReport:
    """Run the steps of `pipeline` that are not done yet in the folder `run`, then push what the recipe names.

    Under a launcher (`accelerate launch`) each step runs in as many processes as this does, one step at a time.

    Args:
        jobs: the largest number of steps that run in parallel; None for half of the processors.
        from_step: a step that is done again, with all that depend on it.
        dry_run: stop after `show`; nothing is written.
        consent: to what the file alone says: where it pushes, and where it writes outside of RUN.
        runner: starts steps; by default as processes of this program.
        show: called with the preview before anything is done.
        notify: called with a line per event, where no table can be drawn.
        bars: whether huggingface_hub draws its progress bars on stderr while it pushes.

    Raises:
        SurgeryError: another run is at work in `run`, or it holds something else; there is no step `from_step`; the lab
            has nothing of a name; consent is missing; the disk is too small, or cannot be written; a push failed. A
            step that fails raises nothing here: see `RunReport.error`.
        KeyboardInterrupt: Ctrl-C; all steps have ended then.
    """
    if n_processes() == 1:
        with nullcontext(-1) if dry_run else locked(run) as lock:
            return _Engine(pipeline, run, runner, show, notify, bars, consent, lock).run(
                jobs, from_step, dry_run=dry_run
            )
    with ExitStack() as stack:
        engine = _Engine(pipeline, run, runner, show, notify, bars, consent)
        if not dry_run:
            # On rank 0 only, since a lock is for one process; the others learn whether it could be taken.
            on_main(lambda: stack.enter_context(locked(run)))
        return engine.run_on_all_ranks(from_step, dry_run=dry_run)


class _Engine:
    """One run, from the preview to the report. With several ranks, rank 0 decides and writes.

    Args:
        lock: the descriptor of the run's lock, which steps inherit; -1 for none.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        run: Path,
        runner: Runner,
        show: Callable[[RunPreview], None],
        notify: Notify,
        bars: bool,
        consent: Consent,
        lock: int = -1,
    ) -> None:
        self.pipeline, self.paths, self.lock = pipeline, RunPaths(pipeline, run), lock
        self.runner, self.show, self.notify, self.bars = runner, show, notify, bars
        self.consent = consent
        self.hashes = FileHashCache(run / HASHES)
        self.inputs = InputResolver(self.hashes)
        self.record = RunRecord(pipeline, run)
        self.step_runner: StepRunner | None = None

    def prepare(self, from_step: str | None, *, dry_run: bool) -> RunPreview:
        """Read the record of earlier runs, show the preview and, unless `dry_run`, make RUN ready."""
        pipeline, paths, run = self.pipeline, self.paths, self.paths.run
        forced = steps_to_repeat(pipeline, from_step)
        check_sources(pipeline)
        self.record = read_record(pipeline, run, {step.name: command_line(step, paths) for step in pipeline.nodes})
        preview = preview_run(pipeline, paths, self.record, forced, hashes=self.hashes, inputs=self.inputs)
        self.show(preview)
        if dry_run:
            return preview
        # Before anything is done: hours of work would otherwise end at a question that nobody answers.
        check_consent(preview.access, self.consent)
        check_disk(run, preview.disk, preview.free)
        write_file(run / RECIPE, pipeline.text)
        self.step_runner = StepRunner(pipeline, paths, self.record, forced, hashes=self.hashes, inputs=self.inputs)
        return preview

    def run(self, jobs: int | None, from_step: str | None, *, dry_run: bool) -> RunReport:
        """Do everything in this process, the only one."""
        preview = self.prepare(from_step, dry_run=dry_run)
        if dry_run or self.step_runner is None:
            return RunReport(preview)
        with display([step.name for step in self.pipeline.nodes], self.notify) as view:
            _Scheduler(self.step_runner, preview, self.runner, view, self.lock).run(jobs or default_jobs())
        return self.finish(preview)

    def run_on_all_ranks(self, from_step: str | None, *, dry_run: bool) -> RunReport:
        """Do everything under a launcher: rank 0 decides, and every rank starts its share of each step."""
        preview = on_main(self.prepare, from_step, dry_run=dry_run)
        if dry_run:
            return RunReport(preview)
        names = [step.name for step in self.pipeline.nodes]
        with display(names, self.notify) if is_main() else nullcontext() as view:
            run_steps_on_all_ranks(self.pipeline, self.paths, self.runner, step_runner=self.step_runner, view=view)
            return on_main(self.finish, preview)

    def finish(self, preview: RunPreview) -> RunReport:
        """Write the report, and push if every step is done."""
        assert self.step_runner is not None
        statuses = {step.name: self.step_runner.statuses[step.name] for step in self.pipeline.nodes}
        self.hashes.save()
        self.record.write()
        path = write_report(self.pipeline, self.paths, self.record, statuses, self.paths.run / REPORT)
        if not {"failed", "left out"} & set(statuses.values()):
            for entry in push_all(self.pipeline, self.paths, self.consent, notify=self.notify, bars=self.bars):
                # Written after each push: one that fails must not make those before it forgotten.
                self.record.pushes.append(entry)
                self.record.write()
        return RunReport(preview, statuses, dict(self.record.steps), tuple(self.record.pushes), path)


class _Scheduler:
    """Starts each step as soon as its dependencies are done, as many in parallel as fit."""

    def __init__(self, step_runner: StepRunner, preview: RunPreview, runner: Runner, view: Display, lock: int) -> None:
        self.step_runner, self.runner, self.view, self.lock = step_runner, runner, view, lock
        self.steps = {step.name: step for step in step_runner.pipeline.nodes}
        self.memory = {each.step.name: each.estimate.memory for each in preview.steps}
        self.available = MEMORY_SHARE * free_memory()
        self.children: dict[str, tuple[RunningStep, float]] = {}

    def run(self, jobs: int) -> None:
        """Return when no step is left that could be done; raise KeyboardInterrupt after Ctrl-C, with all ended."""
        waiting = list(self.steps.values())
        # Deferred, so that Ctrl-C never comes between starting a process and noting that it runs.
        with DeferredInterrupt() as interrupts:
            try:
                while waiting or self.children:
                    waiting = [step for step in waiting if not self._try_start(step, jobs)]
                    if self.children:
                        time.sleep(POLL_SECONDS)
                        self._collect_ended()
                    self.view.refresh()
                    if interrupts.asked:
                        raise KeyboardInterrupt
            except BaseException:
                self._stop()
                raise

    def _try_start(self, step: RecipeStep, jobs: int) -> bool:
        """Start `step` if it can be, or find that it need not or cannot; return whether it no longer waits."""
        step_runner = self.step_runner
        if step_runner.is_blocked(step):
            step_runner.leave_out(step)
            self.view.ended(step.name, "left out", 0.0)
            return True
        if not step_runner.is_ready(step) or not self._fits(step, jobs):
            return False
        if not step_runner.begin(step):
            self.view.ended(step.name, "unchanged", 0.0)
            return True
        paths = step_runner.paths.of(step.name)
        self.view.started(step.name, paths.progress)
        locks = (self.lock,) if self.lock >= 0 else ()
        process = StepProcess(step, cli_arguments(step, step_runner.paths), paths, locks=locks)
        self.children[step.name] = self.runner(process), time.monotonic()
        return True

    def _fits(self, step: RecipeStep, jobs: int) -> bool:
        """Whether `step` can run beside those that do; one alone always can, however much memory it takes."""
        # Without this a step that is larger than the free memory would wait forever.
        if not self.children:
            return True
        used = sum(self.memory[name] for name in self.children)
        if len(self.children) >= jobs or used + self.memory[step.name] > self.available:
            return False
        targets = scored_steps(step)
        return not any(targets & scored_steps(self.steps[name]) for name in self.children)

    def _collect_ended(self) -> None:
        for name, (child, since) in list(self.children.items()):
            code = child.poll()
            if code is None:
                continue
            del self.children[name]
            seconds = time.monotonic() - since
            self.step_runner.end(self.steps[name], code, seconds)
            self.view.ended(name, self.step_runner.statuses[name], seconds)

    def _stop(self) -> None:
        stop([child for child, _ in self.children.values()])
        # All of them: an error may come after a step was recorded as running, and before its process started.
        for step in self.steps.values():
            self.step_runner.interrupt(step)


def scored_steps(step: RecipeStep) -> set[str]:
    """Return the steps into whose folders `step` writes scores: two that write into one must not run in parallel."""
    return {output.step for _, output in step_outputs(step)} if step.command.name in SCORING else set()


def default_jobs() -> int:
    """Return how many steps run in parallel by default: half as many as there are processors, at least one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, count // 2)
