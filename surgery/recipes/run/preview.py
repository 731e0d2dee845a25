"""Preview a run: completed steps, estimates of memory and disk, and downloads. Nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import did_you_mean, usage_error
from surgery.recipes.run.access import AccessList, list_access
from surgery.recipes.run.cache_keys import KeyedOutput, cache_key
from surgery.recipes.run.content_hashes import FileHashCache
from surgery.recipes.run.estimates import ResourceEstimate, estimate
from surgery.recipes.run.inputs import InputResolver
from surgery.recipes.run.paths import RunPaths, dependencies, dependents, step_outputs
from surgery.recipes.run.state import RunRecord, StepRecord
from surgery.recipes.types import Pipeline, RecipeStep
from surgery.reporting.report import Column, Table, Value, format_value

# Commands that write into the folders of the models they are given: their scores, for the model card.
SCORING = ("eval",)


@dataclass(frozen=True)
class StepPreview:
    """What one step will take, and whether it is done already."""

    step: RecipeStep
    estimate: ResourceEstimate
    is_done: bool


@dataclass(frozen=True)
class RunPreview:
    """Preview of a whole run; `free` is in bytes, on the disk that RUN is on. access: what it reads, writes, pushes."""

    pipeline: Pipeline
    run: Path
    steps: tuple[StepPreview, ...]
    free: int
    access: AccessList

    @property
    def to_do(self) -> tuple[StepPreview, ...]:
        """The steps that are to be done."""
        return tuple(each for each in self.steps if not each.is_done)

    @property
    def disk(self) -> int:
        """Bytes that the steps in `to_do` will write."""
        return sum(each.estimate.disk for each in self.to_do)

    @property
    def downloads(self) -> Mapping[str, int]:
        """Repository → bytes that must be fetched first."""
        return {repo: size for each in self.to_do for repo, size in each.estimate.downloads.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not known, or happens before a step: one line each."""
        return tuple(dict.fromkeys(note for each in self.to_do for note in each.estimate.notes))

    def table(self) -> Table:
        """Return the preview as a table with one row per step."""
        rows: list[list[Value]] = [
            [
                each.step.name,
                each.step.command.name,
                ", ".join(dependencies(each.step)) or None,
                each.estimate.memory,
                each.estimate.disk,
                "done" if each.is_done else "to do",
            ]
            for each in self.steps
        ]
        columns = [
            Column("step"),
            Column("command"),
            Column("after"),
            Column("memory, at most about", "bytes"),
            Column("writes about", "bytes"),
            Column("state"),
        ]
        stated = self.pipeline.needs
        note = ". ".join(
            part
            for part in (
                f"Needs, as the recipe says: {', '.join(f'{name} {text}' for name, text in stated.items())}"
                if stated
                else "",
                f"To be written: about {format_value(self.disk, 'bytes')}, free: {format_value(self.free, 'bytes')}",
                *(f"To be downloaded: {repo}, {format_value(size, 'bytes')}" for repo, size in self.downloads.items()),
                *self.notes,
            )
            if part
        )
        return Table(f"{self.pipeline.recipe} in {self.run}", columns, rows, note=f"{note}.")

    def tables(self, *, commands: bool) -> list[Table]:
        """Return the preview, what is read, written and pushed, and with `commands` every command line."""
        access = self.access
        tables = [self.table()]
        tables += [access.command_table()] if commands else []
        # Before a real run only what people may not expect; the whole is a dry run away.
        tables += [access.read_table()] if access.reads and (commands or access.outside) else []
        tables += [access.write_table()] if commands or any(each.needs_consent for each in access.writes) else []
        tables += [access.push_table()] if access.pushes else []
        return tables


def preview_run(
    pipeline: Pipeline,
    paths: RunPaths,
    record: RunRecord,
    forced: set[str],
    *,
    hashes: FileHashCache,
    inputs: InputResolver,
) -> RunPreview:
    """Return what a run of `pipeline` will do, as its inputs are now. Raises SurgeryError as `cache_key`."""
    done: dict[str, KeyedOutput] = {}
    estimates: dict[str, ResourceEstimate] = {}
    again: set[str] = set()  # steps that will be done again
    steps = []
    for step in pipeline.nodes:
        estimates[step.name] = estimate(step, estimates, inputs)
        key = cache_key(step, done, inputs)
        known = record.steps[step.name]
        is_same = key is not None and key == known.key and known.output is not None
        is_done = (
            is_same
            and step.name not in forced
            and not must_score_again(step, again)
            and is_intact(known, paths, step, hashes=hashes)
        )
        if is_same and key is not None and known.output is not None and step.name not in forced:
            # Done again with the same key it gives the same output, so what depends on it need not be done again.
            done[step.name] = KeyedOutput(key, known.output)
        if not is_done:
            again.add(step.name)
        steps.append(StepPreview(step, estimates[step.name], is_done))
    return RunPreview(pipeline, paths.run, tuple(steps), _free(paths.run), list_access(pipeline, paths, inputs))


def is_intact(known: StepRecord, paths: RunPaths, step: RecipeStep, *, hashes: FileHashCache) -> bool:
    """Whether a step is done, and everything that it wrote is still there unchanged."""
    step_paths = paths.of(step.name)
    exists = step.command.writes is None or step_paths.out.exists()
    return known.state == "done" and exists and hashes.is_intact(step_paths.folder, known.files)


def must_score_again(step: RecipeStep, again: set[str]) -> bool:
    """Whether a step must be done because it writes scores into the output of a step in `again`, which is new."""
    return step.command.name in SCORING and any(output.step in again for _, output in step_outputs(step))


def steps_to_repeat(pipeline: Pipeline, name: str | None) -> set[str]:
    """Return the steps that `--from NAME` does again: NAME (all of a matrix) and its dependents.

    Raises:
        SurgeryError: there is no step of that name.
    """
    if name is None:
        return set()
    # A name without its matrix values stands for all instances of it.
    first = {step.name for step in pipeline.nodes if name in (step.step, step.name)}
    if not first:
        names = list(dict.fromkeys(each for step in pipeline.nodes for each in (step.step, step.name)))
        raise usage_error(
            f"no step is called {name!r}",
            where="--from",
            hint=did_you_mean(name, names) or f"There are {', '.join(step.step for step in pipeline.nodes)}.",
        )
    return dependents(pipeline, first)


def _free(run: Path) -> int:
    existing = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
