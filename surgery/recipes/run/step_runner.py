"""One step at a time: whether it is to be done, its folder made ready, and what it made written down.

This is what the scheduler of one machine and the ranks of a launcher share; only one process of a run does it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from surgery.checkpoint.checkpoint import existing_path
from surgery.errors import SurgeryError, usage_error
from surgery.io.atomic import disk_error, write_file
from surgery.recipes.run.cache_keys import KeyedOutput, cache_key
from surgery.recipes.run.content_hashes import WEIGHTS, FileHashCache, output_hash
from surgery.recipes.run.inputs import InputResolver
from surgery.recipes.run.paths import RunPaths, StepPaths, needs, typed
from surgery.recipes.run.preview import is_marking, is_whole
from surgery.recipes.run.state import RunRecord, StepRecord, last_lines
from surgery.recipes.types import Given, Pipeline, RecipeStep, StepOutput

# What became of a step in this run.
StepStatus = Literal["done", "unchanged", "failed", "left out"]


class StepRunner:
    """The steps of a run, and how far they are. Every change is in run.json before the next one."""

    def __init__(
        self,
        program: Pipeline,
        places: RunPaths,
        record: RunRecord,
        forced: set[str],
        *,
        hashes: FileHashCache,
        things: InputResolver,
    ) -> None:
        self.program, self.places, self.record = program, places, record
        self.endings: dict[str, StepStatus] = {}
        self._forced, self._hashes, self._things = forced, hashes, things
        self._outputs: dict[str, KeyedOutput] = {}
        self._keys: dict[str, str] = {}

    def is_ready(self, node: RecipeStep) -> bool:
        """Whether all that `node` needs is there."""
        return all(self.endings.get(name) in ("done", "unchanged") for name in needs(node))

    def is_blocked(self, node: RecipeStep) -> bool:
        """Whether something that `node` needs will not come."""
        return any(self.endings.get(name) in ("failed", "left out") for name in needs(node))

    def leave_out(self, node: RecipeStep) -> None:
        """`node` cannot be done, because what it needs failed."""
        self.endings[node.name] = "left out"

    def begin(self, node: RecipeStep) -> bool:
        """Makes the folder of `node` ready, and notes that it runs; False where it is done already.

        Raises:
            SurgeryError: a file cannot be read or written.
        """
        place, known = self.places.of(node.name), self.record.steps[node.name]
        key = cache_key(node, self._outputs, self._things)
        assert key is not None, "a step begins when those that it needs are done"
        self._keys[node.name] = key
        is_same = known.key == key and node.name not in self._forced
        if is_same and known.output and is_whole(known, self.places, node, hashes=self._hashes):
            self._outputs[node.name] = KeyedOutput(key, known.output)
            self.endings[node.name] = "unchanged"
            self._note(node, replace(known, step=node.step, line=typed(node, self.places)))
            return False
        # Done once, and damaged since: nothing of it is worth going on from.
        goes_on = is_same and known.state != "done" and _text(place.key) == key
        try:
            self._make_ready(node, place, key, goes_on=goes_on)
        except OSError as error:
            raise disk_error(error, place.folder) from error
        self._unmark(node)
        self._note(node, StepRecord(node.step, typed(node, self.places), "running", key))
        return True

    def end(self, node: RecipeStep, code: int, seconds: float, *, log: Path | None = None) -> None:
        """Notes what `node` made, or why it failed: `log` says so, by default its own.

        Raises:
            SurgeryError: run.json cannot be written.
        """
        place, key = self.places.of(node.name), self._keys[node.name]
        place.told.unlink(missing_ok=True)
        line = typed(node, self.places)
        if code == 0:
            try:
                made, texts = self._look(node, place)
                output = output_hash(place, made, run_folder=self.places.run)
                self._outputs[node.name] = KeyedOutput(key, output)
                self.endings[node.name] = "done"
                kept = {**texts, **{_under(place, name): found for name, found in made.items()}}
                self._note(node, StepRecord(node.step, line, "done", key, seconds, output, kept))
                self._hashes.save()
                return
            except SurgeryError as error:
                why = str(error)
        else:
            how = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
            why = last_lines(log or place.log) or f"said nothing ({how})"
        self.endings[node.name] = "failed"
        self._note(node, StepRecord(node.step, line, "failed", key, seconds, error=why))

    def interrupt(self, node: RecipeStep) -> None:
        """Notes that `node` was stopped, if it was at work; what it has done so far stays."""
        known = self.record.steps[node.name]
        if known.state == "running":
            self._note(node, replace(known, state="waiting"))

    def _look(self, node: RecipeStep, place: StepPaths) -> tuple[dict[str, str], dict[str, str]]:
        """The hashes of the files of what a step made, by their paths in it, and of those that it printed and drew."""
        made: dict[str, str] = {}
        if node.command.writes is not None:
            if not place.out.exists():
                raise SurgeryError("the step ended well, but wrote nothing", where=place.out)
            self._hashes.trust(place.out)
            made = self._hashes.of_files(place.out)
        texts = [path for path in (place.text, place.picture) if path.is_file()]
        return made, {path.name: self._hashes.of_file(path) for path in texts}

    def _make_ready(self, node: RecipeStep, place: StepPaths, key: str, *, goes_on: bool) -> None:
        if not goes_on:
            _remove(place.folder)
        elif not (node.command.goes_on or node.command.changes):
            # Whole, but its process was ended before it could say so. What it printed is lost, so it is done again.
            _remove(place.out)
        place.folder.mkdir(parents=True, exist_ok=True)
        write_file(place.key, key)
        if node.command.changes is not None and not place.out.exists():
            value = node.given.get(node.command.changes)
            source = self.places.made(value) if isinstance(value, StepOutput) else _folder(node, value)
            _copy(source, place.out)

    def _unmark(self, node: RecipeStep) -> None:
        """What other steps wrote into the folder of `node` goes with it, so that they must be done again."""
        for other in self.program.nodes:
            known = self.record.steps[other.name]
            if known.state == "done" and is_marking(other, {node.name}):
                self.record.steps[other.name] = replace(known, state="waiting")

    def _note(self, node: RecipeStep, step: StepRecord) -> None:
        self.record.steps[node.name] = step
        self.record.write()


def check_sources(program: Pipeline) -> None:
    """Raises SurgeryError where a step is to work on a copy of a folder that is not there."""
    for node in program.nodes:
        if node.command.changes is not None:
            value = node.given.get(node.command.changes)
            if not isinstance(value, StepOutput):
                _folder(node, value)


def _folder(node: RecipeStep, value: Given) -> Path:
    path = existing_path(str(value))
    if path is None or not path.is_dir():
        raise usage_error(f"got {value}, expected a folder that is there", where=f"{node.name}: {node.command.changes}")
    return path


def _under(place: StepPaths, name: str) -> str:
    return place.out.name if name == "." else f"{place.out.name}/{name}"


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    """A copy of a folder that appears whole: weights as hard links where that can be, since they are never written in
    place; all else byte for byte, since logs are appended to."""
    partial = target.with_name(f"{target.name}.copying")
    _remove(partial)
    shutil.copytree(source, partial, copy_function=_copier())
    partial.rename(target)


def _copier() -> Callable[[str, str], object]:
    def copy(source: str, target: str) -> object:
        if source.endswith(WEIGHTS):
            try:
                os.link(Path(source).resolve(), target)
                return target
            except OSError:  # another disk, or one without links
                pass
        return shutil.copy2(source, target)

    return copy
