"""Runs a recipe: every step is a process of its own, side by side where memory allows, and done once for its inputs.

In comes a `Pipeline` and the folder RUN, out comes a `RunReport`. What is done is in RUN/run.json, under keys made of
all that decides it: the same command goes on where a run was stopped or killed, and does nothing where nothing changed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.io.atomic import write_file
from surgery.io.json_io import jsonable
from surgery.publish.upload import push
from surgery.recipes.run.content_hashes import FileHashCache
from surgery.recipes.run.display import Display, Say, display
from surgery.recipes.run.estimates import SHARE, check_disk, free_memory
from surgery.recipes.run.inputs import InputResolver
from surgery.recipes.run.multiprocess import run_steps_on_all_ranks
from surgery.recipes.run.paths import HASHES, RECIPE, REPORT, RunPaths, makers, typed, words
from surgery.recipes.run.preview import MARKING, RunPreview, forced_by, preview_run
from surgery.recipes.run.report import write_report
from surgery.recipes.run.state import RunRecord, StepRecord, locked, read_record
from surgery.recipes.run.step_runner import StepRunner, StepStatus, check_sources
from surgery.recipes.run.subprocesses import POLL, Runner, RunningStep, StepProcess, start, stop
from surgery.recipes.types import Pipeline, RecipeStep, StepOutput
from surgery.runtime.collectives import map_over_ranks
from surgery.runtime.environment import is_main, n_processes
from surgery.runtime.interrupts import DeferredInterrupt


@dataclass(frozen=True)
class RunReport:
    """What a run did.

    outlook: what it was to do. endings: step → done, unchanged, failed, or left out; empty after a dry run. steps: as
    in run.json. report: the page that gathers what the steps found.
    """

    preview: RunPreview
    endings: Mapping[str, StepStatus] = field(default_factory=dict)
    steps: Mapping[str, StepRecord] = field(default_factory=dict)
    pushes: tuple[Mapping[str, Any], ...] = ()
    report: Path | None = None

    @property
    def failed(self) -> tuple[str, ...]:
        """The steps that failed."""
        return tuple(name for name, ending in self.endings.items() if ending == "failed")

    def fault(self, run: Path, *, again: str = "The same command") -> SurgeryError | None:
        """The error that says which steps failed, why, and that `again` goes on from there; None where none did."""
        if not self.failed:
            return None
        parts = []
        for name in self.failed:
            why = "\n".join(f"  {line.removeprefix('error: ')}" for line in (self.steps[name].error or "").splitlines())
            parts.append(f"step {name} failed:\n{why}\n  (its log: {RunPaths(self.preview.program, run).of(name).log})")
        left = [name for name, ending in self.endings.items() if ending == "left out"]
        if left:
            parts.append(f"Left out, because they need it: {', '.join(left)}.")
        parts.append(f"{again} goes on from there.")
        return SurgeryError("\n".join(parts))


def run_recipe(
    program: Pipeline,
    run: Path,
    *,
    jobs: int | None = None,
    from_step: str | None = None,
    dry_run: bool = False,
    runner: Runner = start,
    show: Callable[[RunPreview], None] = lambda seen: None,
    say: Say = lambda text: None,
    bars: bool = False,
) -> RunReport:
    """Does what is to be done of `program` in the folder `run`, then pushes what the recipe says.

    Under a launcher (`accelerate launch`) each step runs in as many processes as this does, one step at a time.

    Args:
        jobs: steps that run side by side at most; None for half of the processors.
        from_step: a step that is done again, with all that follow it.
        dry_run: stop after `show`; nothing is written.
        runner: starts steps; by default as processes of this program.
        show: is given what is to be done before anything is.
        say: is told what happens, in a line, where no table can be drawn.
        bars: whether huggingface_hub draws its bars on stderr while it pushes.

    Raises:
        SurgeryError: another run is at work in `run`, or it holds something else; there is no step `from_step`; the lab
            has nothing of a name; the disk is too small, or cannot be written; a push failed. A step that fails is no
            error here: see `RunReport.fault`.
        KeyboardInterrupt: Ctrl-C; all steps have ended then.
    """
    if n_processes() == 1:
        with nullcontext(-1) if dry_run else locked(run) as lock:
            return _Engine(program, run, runner, show, say, bars, lock).run(jobs, from_step, dry_run=dry_run)
    return _under_a_launcher(program, run, from_step, dry_run=dry_run, runner=runner, show=show, say=say, bars=bars)


class _Engine:
    """The one process that decides."""

    def __init__(
        self,
        program: Pipeline,
        run: Path,
        runner: Runner,
        show: Callable[[RunPreview], None],
        say: Say,
        bars: bool,
        lock: int = -1,
    ) -> None:
        self.program, self.places, self.lock = program, RunPaths(program, run), lock
        self.runner, self.show, self.say, self.bars = runner, show, say, bars
        self.hashes = FileHashCache(run / HASHES)
        self.things = InputResolver(self.hashes)
        self.record = RunRecord(program, run)
        self.working: StepRunner | None = None

    def prepare(self, from_step: str | None, *, dry_run: bool) -> RunPreview:
        """Looks at everything, shows it, and makes RUN ready."""
        program, run = self.program, self.places.run
        forced = forced_by(program, from_step)
        check_sources(program)
        self.record = read_record(program, run, {node.name: typed(node, self.places) for node in program.nodes})
        seen = preview_run(program, self.places, self.record, forced, hashes=self.hashes, things=self.things)
        self.show(seen)
        if dry_run:
            return seen
        check_disk(run, seen.disk, seen.free)
        write_file(run / RECIPE, program.text)
        self.working = StepRunner(program, self.places, self.record, forced, hashes=self.hashes, things=self.things)
        return seen

    def run(self, jobs: int | None, from_step: str | None, *, dry_run: bool) -> RunReport:
        seen = self.prepare(from_step, dry_run=dry_run)
        if dry_run or self.working is None:
            return RunReport(seen)
        with display([node.name for node in self.program.nodes], self.say) as shown:
            _Scheduler(self.working, seen, self.runner, shown, self.lock).run(jobs or default_jobs())
        return self.finish(seen)

    def finish(self, seen: RunPreview) -> RunReport:
        """Writes the report, and pushes where every step is done."""
        assert self.working is not None
        endings = {node.name: self.working.endings[node.name] for node in self.program.nodes}
        self.hashes.save()
        self.record.write()
        path = write_report(self.program, self.places, self.record, endings, self.places.run / REPORT)
        if not {"failed", "left out"} & set(endings.values()):
            for pushed in push_all(self.program, self.places, notify=self.say, bars=self.bars):
                self.record.pushes.append(pushed)
                self.record.write()
        return RunReport(seen, endings, dict(self.record.steps), tuple(self.record.pushes), path)


class _Scheduler:
    """Starts steps as soon as what they need is there, and as much as fits."""

    def __init__(self, working: StepRunner, seen: RunPreview, runner: Runner, shown: Display, lock: int) -> None:
        self.working, self.runner, self.shown, self.lock = working, runner, shown, lock
        self.nodes = {node.name: node for node in working.program.nodes}
        self.memory = {step.node.name: step.estimate.memory for step in seen.steps}
        free = free_memory()
        self.room = None if free is None else SHARE * free
        self.children: dict[str, tuple[RunningStep, float]] = {}

    def run(self, jobs: int) -> None:
        """Returns when no step is left that could be done."""
        waiting = list(self.nodes.values())
        with DeferredInterrupt() as interrupts:
            try:
                while waiting or self.children:
                    waiting = [node for node in waiting if not self._settle(node, jobs)]
                    if self.children:
                        time.sleep(POLL)
                        self._gather()
                    self.shown.look()
                    if interrupts.asked:
                        raise KeyboardInterrupt
            except BaseException:
                self._stop()
                raise

    def _settle(self, node: RecipeStep, jobs: int) -> bool:
        """Starts `node` if it can be, or finds that it need not or cannot; whether it waits no more."""
        working = self.working
        if working.is_blocked(node):
            working.leave_out(node)
            self.shown.ended(node.name, "left out", 0.0)
            return True
        if not working.is_ready(node) or not self._fits(node, jobs):
            return False
        if not working.begin(node):
            self.shown.ended(node.name, "unchanged", 0.0)
            return True
        place = working.places.of(node.name)
        self.shown.started(node.name, place.told)
        locks = (self.lock,) if self.lock >= 0 else ()
        job = StepProcess(node, words(node, working.places), place, locks=locks)
        self.children[node.name] = self.runner(job), time.monotonic()
        return True

    def _fits(self, node: RecipeStep, jobs: int) -> bool:
        """Whether `node` can run beside those that do; one alone always can."""
        if not self.children:
            return True
        taken = sum(self.memory[name] for name in self.children)
        if len(self.children) >= jobs or (self.room is not None and taken + self.memory[node.name] > self.room):
            return False
        mine = marked(node)
        return not any(mine & marked(self.nodes[name]) for name in self.children)

    def _gather(self) -> None:
        for name, (child, since) in list(self.children.items()):
            code = child.poll()
            if code is None:
                continue
            del self.children[name]
            seconds = time.monotonic() - since
            self.working.end(self.nodes[name], code, seconds)
            self.shown.ended(name, self.working.endings[name], seconds)

    def _stop(self) -> None:
        stop([child for child, _ in self.children.values()])
        for node in self.nodes.values():  # one may have been noted, and not yet started
            self.working.interrupt(node)


def marked(node: RecipeStep) -> set[str]:
    """The steps into whose folders `node` writes: two that write into one must not run side by side."""
    return {made.step for _, made in makers(node)} if node.command.name in MARKING else set()


def default_jobs() -> int:
    """How many steps run side by side by default: half as many as there are processors, at least one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, count // 2)


def _under_a_launcher(
    program: Pipeline,
    run: Path,
    from_step: str | None,
    *,
    dry_run: bool,
    runner: Runner,
    show: Callable[[RunPreview], None],
    say: Say,
    bars: bool,
) -> RunReport:
    """As `run_recipe`, in each of several processes: the first decides, all of them start what it says."""
    with ExitStack() as stack:

        def take(item: int) -> int:
            return -1 if dry_run else stack.enter_context(locked(run))

        map_over_ranks([0], take)  # only in the first, and all learn whether it could be had
        engine = _Engine(program, run, runner, show, say, bars)
        seen = map_over_ranks([0], lambda item: engine.prepare(from_step, dry_run=dry_run))[0]
        if dry_run:
            return RunReport(seen)
        shown = stack.enter_context(display([node.name for node in program.nodes], say)) if is_main() else None
        run_steps_on_all_ranks(program, engine.places, runner, working=engine.working, shown=shown)
        return map_over_ranks([0], lambda item: engine.finish(seen))[0]


def push_all(
    program: Pipeline, places: RunPaths, *, notify: Callable[[str], None], bars: bool
) -> Iterator[Mapping[str, Any]]:
    """Pushes one after the other, and yields what run.json says of each. Raises SurgeryError as `push`."""
    for wanted in program.pushes:
        notify(f"pushing {wanted.node} to {wanted.repo_id}")
        pushed = push(
            places.made(StepOutput(wanted.node, wanted.inside)),
            wanted.repo_id,
            private=wanted.private,
            revision=wanted.revision,
            pr=wanted.pr,
            message=wanted.message or f"Push {wanted.node} of the recipe {program.recipe}",
            recipe=(program.recipe, program.text),
            notify=notify,
            bars=bars,
        )
        notify(pushed.url if pushed.changed else f"{wanted.repo_id} has all of it already: nothing was committed.")
        yield {"step": wanted.node, "inside": wanted.inside, **jsonable(pushed)}
