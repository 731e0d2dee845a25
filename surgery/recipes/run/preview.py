"""A run before it runs: which steps are done already, what the others take, and what must be downloaded.

In come a `Pipeline`, the record of its run and what its values name; out comes an `RunPreview`. Nothing is written.
"""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import usage_error
from surgery.recipes.run.cache_keys import KeyedOutput, cache_key
from surgery.recipes.run.content_hashes import FileHashCache
from surgery.recipes.run.estimates import ResourceEstimate, estimate
from surgery.recipes.run.inputs import InputResolver
from surgery.recipes.run.paths import RunPaths, followers, makers, needs
from surgery.recipes.run.state import RunRecord, StepRecord
from surgery.recipes.types import Pipeline, RecipeStep
from surgery.reporting.report import Column, Table, Value, format_value

# Commands that write into the folders of the models they are given: their scores, for the model card.
MARKING = ("eval",)


@dataclass(frozen=True)
class StepPreview:
    """One step: what it will take, and whether it is done already."""

    node: RecipeStep
    estimate: ResourceEstimate
    is_done: bool


@dataclass(frozen=True)
class RunPreview:
    """The whole run. free: bytes on the disk that RUN is on."""

    program: Pipeline
    run: Path
    steps: tuple[StepPreview, ...]
    free: int

    @property
    def to_do(self) -> tuple[StepPreview, ...]:
        """The steps that are to be done."""
        return tuple(step for step in self.steps if not step.is_done)

    @property
    def disk(self) -> int:
        """Bytes that these will write."""
        return sum(step.estimate.disk for step in self.to_do)

    @property
    def downloads(self) -> Mapping[str, int]:
        """Repository → bytes that must be fetched first."""
        return {repo: size for step in self.to_do for repo, size in step.estimate.downloads.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not known, or happens on the way."""
        return tuple(dict.fromkeys(note for step in self.to_do for note in step.estimate.notes))

    def table(self) -> Table:
        """One row per step."""
        rows: list[list[Value]] = [
            [
                step.node.name,
                step.node.command.name,
                ", ".join(needs(step.node)) or None,
                step.estimate.memory,
                step.estimate.disk,
                "done" if step.is_done else "to do",
            ]
            for step in self.steps
        ]
        columns = [
            Column("step"),
            Column("command"),
            Column("after"),
            Column("memory, at most about", "bytes"),
            Column("writes about", "bytes"),
            Column("state"),
        ]
        said = self.program.needs
        note = ". ".join(
            part
            for part in (
                f"Needs, as the recipe says: {', '.join(f'{name} {text}' for name, text in said.items())}"
                if said
                else "",
                f"To be written: about {format_value(self.disk, 'bytes')}, free: {format_value(self.free, 'bytes')}",
                *(f"To be downloaded: {repo}, {format_value(size, 'bytes')}" for repo, size in self.downloads.items()),
                *self.notes,
            )
            if part
        )
        return Table(f"{self.program.recipe} in {self.run}", columns, rows, note=f"{note}.")


def preview_run(
    program: Pipeline,
    places: RunPaths,
    record: RunRecord,
    forced: set[str],
    *,
    hashes: FileHashCache,
    things: InputResolver,
) -> RunPreview:
    """What a run of `program` will do, as things are now. Raises SurgeryError as `cache_key`."""
    done: dict[str, KeyedOutput] = {}
    estimates: dict[str, ResourceEstimate] = {}
    again: set[str] = set()  # whose outputs will be made anew
    steps = []
    for node in program.nodes:
        estimates[node.name] = estimate(node, estimates, things)
        key = cache_key(node, done, things)
        known = record.steps[node.name]
        is_same = key is not None and key == known.key and known.output is not None
        is_done = (
            is_same
            and node.name not in forced
            and not is_marking(node, again)
            and is_whole(known, places, node, hashes=hashes)
        )
        if is_same and key is not None and known.output is not None and node.name not in forced:
            # Made again from the same, it will be the same, and what follows need not be done again.
            done[node.name] = KeyedOutput(key, known.output)
        if not is_done:
            again.add(node.name)
        steps.append(StepPreview(node, estimates[node.name], is_done))
    return RunPreview(program, places.run, tuple(steps), _free(places.run))


def is_whole(known: StepRecord, places: RunPaths, node: RecipeStep, *, hashes: FileHashCache) -> bool:
    """Whether a step is done, and all that it made is there as it was."""
    place = places.of(node.name)
    there = node.command.writes is None or place.out.exists()
    return known.state == "done" and there and hashes.is_intact(place.folder, known.files)


def is_marking(node: RecipeStep, again: set[str]) -> bool:
    """Whether a step must be done because a folder that it writes into is new."""
    return node.command.name in MARKING and any(made.step in again for _, made in makers(node))


def forced_by(program: Pipeline, step: str | None) -> set[str]:
    """The steps that `--from STEP` does again: it (all of a matrix), and those that follow. Raises SurgeryError."""
    if step is None:
        return set()
    first = {node.name for node in program.nodes if step in (node.step, node.name)}
    if not first:
        names = list(dict.fromkeys(name for node in program.nodes for name in (node.step, node.name)))
        near = difflib.get_close_matches(step, names, n=1)
        raise usage_error(
            f"no step is called {step!r}",
            where="--from",
            hint=f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(n.step for n in program.nodes)}.",
        )
    return followers(program, first)


def _free(run: Path) -> int:
    existing = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
