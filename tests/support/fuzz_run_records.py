"""Fuzz the record of a recipe's run: run.json, the hashes of files beside it, and what its steps wrote."""

from __future__ import annotations

from pathlib import Path

from support.fuzzing import FuzzTarget
from support.recipe_texts import COMMANDS, RECIPE

from surgery.io.json_io import to_json
from surgery.recipes.parse.graph import build_pipeline
from surgery.recipes.run.content_hashes import FileHashCache
from surgery.recipes.run.paths import HASHES, MANIFEST, RunPaths
from surgery.recipes.run.preview import is_intact
from surgery.recipes.run.state import RunRecord, StepRecord, read_record
from surgery.recipes.types import Pipeline

_FILE = "recipes.yaml"


def write_run(folder: Path) -> None:
    """Write the seed: a recipe, and a run of it of which every step is done."""
    folder.mkdir(parents=True)
    (folder / _FILE).write_text(RECIPE)
    pipeline, paths = _read(folder)
    hashes = FileHashCache(paths.run / HASHES)
    steps = {}
    for step in pipeline.nodes:
        files = paths.of(step.name)
        files.out.mkdir(parents=True)
        (files.out / "scores.json").write_text('{"scores": []}')
        files.text.write_text("done\n")
        found = hashes.hash_files(files.folder)
        steps[step.name] = StepRecord(step.step, f"surgery {step.step}", "done", "k", 1.5, "h", found)
    RunRecord(pipeline, paths.run, steps, {"old": StepRecord("old", "surgery old")}).write()
    hashes.save()


def _read(folder: Path) -> tuple[Pipeline, RunPaths]:
    pipeline = build_pipeline(folder / _FILE, "r", commands=COMMANDS, settings={})
    return pipeline, RunPaths(pipeline, folder / "run")


def intact_steps(folder: Path) -> list[str]:
    """Return the steps that need not be done again, as a run of the recipe finds them."""
    pipeline, paths = _read(folder)
    record = read_record(pipeline, paths.run, {step.name: "surgery" for step in pipeline.nodes})
    hashes = FileHashCache(paths.run / HASHES)
    done = [step.name for step in pipeline.nodes if is_intact(record.steps[step.name], paths, step, hashes=hashes)]
    to_json({name: record.steps[name] for name in done})
    return done


def _intact(folder: Path, out: Path) -> None:
    intact_steps(folder)


RECORD_TARGETS = (FuzzTarget("run record", ("run",), (f"run/{MANIFEST}", f"run/{HASHES}", "run/steps/*/*"), _intact),)
