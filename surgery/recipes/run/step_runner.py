"""Decide whether a step runs, prepare its folder, and record its result in run.json.

The scheduler of one process and the ranks of a launcher share this; only one process of a run does it.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

from surgery.checkpoint.checkpoint import existing_path
from surgery.errors import SurgeryError, usage_error
from surgery.io.atomic import disk_error, remove_path, write_file
from surgery.io.output_folder import atomic_folder
from surgery.io.safe_paths import check_contained
from surgery.recipes.run.cache_keys import KeyedOutput, cache_key
from surgery.recipes.run.content_hashes import WEIGHTS, FileHashCache, output_hash
from surgery.recipes.run.inputs import InputResolver
from surgery.recipes.run.paths import STEPS, RunPaths, StepPaths, command_line, dependencies
from surgery.recipes.run.preview import is_intact, must_score_again
from surgery.recipes.run.state import RunRecord, StepRecord, last_lines
from surgery.recipes.types import Given, Pipeline, RecipeStep, StepOutput

# The result of a step in this run.
StepStatus = Literal["done", "unchanged", "failed", "left out"]
COPYING = ".copying"  # of the staging folder of a copy; `.partial` is that of the command itself


class StepRunner:
    """The states of a run's steps. Every change is in run.json before the next one."""

    def __init__(
        self,
        pipeline: Pipeline,
        paths: RunPaths,
        record: RunRecord,
        forced: set[str],
        *,
        hashes: FileHashCache,
        inputs: InputResolver,
    ) -> None:
        self.pipeline, self.paths, self.record = pipeline, paths, record
        self.statuses: dict[str, StepStatus] = {}
        self._forced, self._hashes, self._inputs = forced, hashes, inputs
        self._outputs: dict[str, KeyedOutput] = {}
        self._keys: dict[str, str] = {}

    def is_ready(self, step: RecipeStep) -> bool:
        """Whether everything that `step` depends on is done."""
        return all(self.statuses.get(name) in ("done", "unchanged") for name in dependencies(step))

    def is_blocked(self, step: RecipeStep) -> bool:
        """Whether something that `step` depends on failed or was left out."""
        return any(self.statuses.get(name) in ("failed", "left out") for name in dependencies(step))

    def leave_out(self, step: RecipeStep) -> None:
        """Record that `step` is not run, because something that it depends on failed."""
        self.statuses[step.name] = "left out"

    def begin(self, step: RecipeStep) -> bool:
        """Prepare the folder of `step` and record that it runs; return False if it is done already.

        Raises:
            SurgeryError: a file cannot be read or written.
        """
        step_paths, known = self.paths.of(step.name), self.record.steps[step.name]
        key = cache_key(step, self._outputs, self._inputs)
        assert key is not None, "a step begins when those that it needs are done"
        self._keys[step.name] = key
        is_same = known.key == key and step.name not in self._forced
        # Not `known.state` alone: files of a finished step may have been damaged or deleted since.
        if is_same and known.output and is_intact(known, self.paths, step, hashes=self._hashes):
            self._outputs[step.name] = KeyedOutput(key, known.output)
            self.statuses[step.name] = "unchanged"
            self._record(step, replace(known, step=step.step, line=command_line(step, self.paths)))
            return False
        # Where it was done once and damaged since, its files cannot be trusted to go on from.
        goes_on = is_same and known.state != "done" and _read_key(step_paths.key) == key
        try:
            self._prepare_folder(step, step_paths, key, goes_on=goes_on)
        except OSError as error:
            raise disk_error(error, step_paths.folder) from error
        self._forget_scores(step)
        self._record(step, StepRecord(step.step, command_line(step, self.paths), "running", key))
        return True

    def end(self, step: RecipeStep, code: int, seconds: float, *, log: Path | None = None) -> None:
        """Record the output of `step`, or why it failed, by the last lines of `log` (by default its own).

        Raises:
            SurgeryError: run.json cannot be written.
        """
        step_paths, key = self.paths.of(step.name), self._keys[step.name]
        # What the step reported last would be shown as the progress of its next run.
        step_paths.progress.unlink(missing_ok=True)
        line = command_line(step, self.paths)
        if code == 0:
            try:
                files, texts = self._hash_results(step, step_paths)
                output = output_hash(step_paths, files, run_folder=self.paths.run)
                self._outputs[step.name] = KeyedOutput(key, output)
                self.statuses[step.name] = "done"
                hashes = {**texts, **{_path_in_folder(step_paths, name): each for name, each in files.items()}}
                self._record(step, StepRecord(step.step, line, "done", key, seconds, output, hashes))
                self._hashes.save()
                return
            except SurgeryError as error:
                why = str(error)
        else:
            how = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
            why = last_lines(log or step_paths.log) or f"said nothing ({how})"
        self.statuses[step.name] = "failed"
        self._record(step, StepRecord(step.step, line, "failed", key, seconds, error=why))

    def interrupt(self, step: RecipeStep) -> None:
        """Record that `step` was stopped, if it was running; its partial work stays."""
        known = self.record.steps[step.name]
        if known.state == "running":
            self._record(step, replace(known, state="waiting"))

    def _hash_results(self, step: RecipeStep, step_paths: StepPaths) -> tuple[dict[str, str], dict[str, str]]:
        """Return the hashes of the files in a step's output, by their paths in it, and of what it printed and drew."""
        files: dict[str, str] = {}
        if step.command.writes is not None:
            if not step_paths.out.exists():
                raise SurgeryError("the step ended well, but wrote nothing", where=step_paths.out)
            # The command has just hashed its tensors for the manifest: reading them all again would take as long.
            self._hashes.load_manifest_hashes(step_paths.out)
            files = self._hashes.hash_files(step_paths.out)
        texts = [path for path in (step_paths.text, step_paths.picture) if path.is_file()]
        return files, {path.name: self._hashes.hash_file(path) for path in texts}

    def _prepare_folder(self, step: RecipeStep, step_paths: StepPaths, key: str, *, goes_on: bool) -> None:
        # RUN may have come with a stranger's recipe: what is written must not go where a link in it leads.
        for path in (self.paths.run / STEPS, step_paths.folder, step_paths.out):
            if path.is_symlink():
                raise usage_error("is a link, expected a folder of the run", where=path, hint="Remove it.")
        if not goes_on:
            remove_path(step_paths.folder)
        elif not (step.command.goes_on or step.command.changes):
            # The output may be complete while its process ended before it could be recorded. What was printed is lost,
            # so the step runs again; commands refuse to replace an output that exists.
            remove_path(step_paths.out)
        step_paths.folder.mkdir(parents=True, exist_ok=True)
        write_file(step_paths.key, key)
        if step.command.changes is not None and not step_paths.out.exists():
            value = step.given.get(step.command.changes)
            source = self.paths.output_path(value) if isinstance(value, StepOutput) else _source_folder(step, value)
            _copy(source, step_paths.out)

    def _forget_scores(self, step: RecipeStep) -> None:
        """Let the steps that wrote scores into the output of `step` wait again: it is new, and has none."""
        for other in self.pipeline.nodes:
            known = self.record.steps[other.name]
            if known.state == "done" and must_score_again(other, {step.name}):
                self.record.steps[other.name] = replace(known, state="waiting")

    def _record(self, step: RecipeStep, record: StepRecord) -> None:
        self.record.steps[step.name] = record
        # At once: a run that is killed must know what was under way.
        self.record.write()


def check_sources(pipeline: Pipeline) -> None:
    """Raise SurgeryError if a step is to work on a copy of a folder that does not exist."""
    for step in pipeline.nodes:
        if step.command.changes is not None:
            value = step.given.get(step.command.changes)
            if not isinstance(value, StepOutput):
                _source_folder(step, value)


def _source_folder(step: RecipeStep, value: Given) -> Path:
    path = existing_path(str(value))
    if path is None or not path.is_dir():
        raise usage_error(f"got {value}, expected a folder that is there", where=f"{step.name}: {step.command.changes}")
    return path


def _path_in_folder(step_paths: StepPaths, name: str) -> str:
    return step_paths.out.name if name == "." else f"{step_paths.out.name}/{name}"


def _read_key(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _copy(source: Path, target: Path) -> None:
    """Copy a folder, whole or not at all.

    Weights become hard links where the disk allows, because they are never written in place. All else is copied byte
    for byte, because logs are appended to.
    """
    for path in sorted(source.rglob("*")):
        # What a link leads to would be copied with the rest, from anywhere on this machine.
        if path.is_symlink() or not path.is_dir():
            check_contained(source, path)
    with atomic_folder(target, suffix=COPYING) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> str:
    if source.endswith(WEIGHTS):
        try:
            os.link(Path(source).resolve(), target)
            return target
        except OSError:  # another disk, or one without links
            pass
    return shutil.copy2(source, target)
