"""Read and write run.json, the record of a run's steps, and lock a run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from surgery.errors import SurgeryError, usage_error
from surgery.io.atomic import write_file
from surgery.io.json_fields import NUMBER, TABLE, TEXT, TEXT_TABLE, FieldKind, check_fields, shown
from surgery.io.json_io import read_json, to_json
from surgery.io.locks import exclusive_lock
from surgery.io.safe_paths import check_contained
from surgery.recipes.run.paths import LOCK, MANIFEST
from surgery.recipes.types import Pipeline

SCHEMA = 1
# Seconds that the steps of a killed run may take to end: they hold its lock until then.
PATIENCE = 5.0

State = Literal["waiting", "running", "done", "failed"]
REMOVE = "Remove it: what is whole is done again quickly."
_FIELDS = {
    **dict.fromkeys(("step", "line", "key", "output", "error"), TEXT),
    "state": FieldKind(f"one of {', '.join(get_args(State))}", lambda value: value in get_args(State)),
    "seconds": NUMBER,
    "files": TEXT_TABLE,
}


@dataclass(frozen=True)
class StepRecord:
    """One step in run.json.

    Attributes:
        line: its command line.
        seconds: that its last run took.
        output: the hash of its output.
        files: path in the step's folder → hash.
        error: the last lines of its log before it failed.
    """

    step: str
    line: str
    state: State = "waiting"
    key: str | None = None
    seconds: float | None = None
    output: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None


@dataclass
class RunRecord:
    """Contents of run.json: `steps` of the recipe as it is now, and `earlier` ones that it had before, by name."""

    pipeline: Pipeline
    run: Path
    steps: dict[str, StepRecord] = field(default_factory=dict)
    earlier: dict[str, StepRecord] = field(default_factory=dict)
    pushes: list[Mapping[str, Any]] = field(default_factory=list)

    def write(self) -> None:
        """Write run.json, whole or not at all. Raises SurgeryError."""
        pipeline = self.pipeline
        write_file(
            self.run / MANIFEST,
            to_json(
                {
                    "schema": SCHEMA,
                    "recipe": pipeline.recipe,
                    "about": pipeline.about,
                    "settings": pipeline.settings,
                    "needs": pipeline.needs,
                    "steps": {step.name: self.steps[step.name] for step in pipeline.nodes},
                    "pushes": self.pushes,
                    "earlier": self.earlier,
                }
            ),
        )


def read_record(pipeline: Pipeline, run: Path, lines: Mapping[str, str]) -> RunRecord:
    """Read the record of the steps of `pipeline` in `run`; steps that are new wait.

    Args:
        lines: step → its command line.

    Raises:
        SurgeryError: the folder holds something else, or the run of another recipe.
    """
    path = run / MANIFEST
    if not path.is_file():
        if run.exists() and not run.is_dir():
            raise usage_error("is a file, expected a folder", where=run)
        if run.exists() and any(each.name != LOCK for each in run.iterdir()):
            raise usage_error("is not empty, and no run of a recipe", where=run, hint="Choose another folder with -o.")
        known: dict[str, StepRecord] = {}
    else:
        check_contained(run, path)
        value = read_json(path)
        if value.get("schema") != SCHEMA or not isinstance(value.get("steps"), dict):
            raise usage_error(f"has schema {shown(value.get('schema'))}, this version reads {SCHEMA}", where=path)
        if value.get("recipe") != pipeline.recipe:
            raise usage_error(
                f"holds a run of the recipe {value.get('recipe')!r}, not of {pipeline.recipe!r}",
                where=run,
                hint="Choose another folder with -o.",
            )
        # Current entries win over earlier ones of the same name.
        check_fields(value, {"earlier": TABLE}, where=path, hint=REMOVE)
        known = {name: _step(each, path) for name, each in {**(value.get("earlier") or {}), **value["steps"]}.items()}
    steps = {step.name: known.get(step.name) or StepRecord(step.step, lines[step.name]) for step in pipeline.nodes}
    earlier = {name: each for name, each in known.items() if name not in steps}
    return RunRecord(pipeline, run, steps, earlier)


def _step(value: Any, path: Path) -> StepRecord:
    if not isinstance(value, dict) or value.get("step") is None or value.get("line") is None:
        raise SurgeryError("is damaged: a step has no name or no line", where=path, hint=REMOVE)
    check_fields(value, _FIELDS, where=path, hint=REMOVE)
    return StepRecord(**{name: each for name, each in value.items() if name in _FIELDS and each is not None})


def locked(run: Path) -> AbstractContextManager[int]:
    """Lock the folder `run` for this process and its children in a block, which gets the lock's descriptor.

    Raises:
        SurgeryError: another run is at work there; the folder cannot be made.
    """
    return exclusive_lock(
        run / LOCK,
        where=run,
        busy="another run is at work here",
        hint="Wait until it is done, stop it, or choose another folder with -o.",
        patience=PATIENCE,
    )


def last_lines(log: Path, count: int = 5) -> str:
    """Return the last `count` lines of a step's log that are not blank."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    filled = [line.rstrip() for line in lines if line.strip()]
    return "\n".join(filled[-count:])
