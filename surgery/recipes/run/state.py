"""run.json: which steps of a run are done, under which keys, and what they made; and the lock on its folder."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from surgery.errors import SurgeryError, usage_error
from surgery.io.atomic import disk_error, write_file
from surgery.io.json_io import read_json, to_json
from surgery.recipes.run.paths import LOCK, MANIFEST
from surgery.recipes.types import Pipeline

SCHEMA = 1
# Seconds that what is left of a killed run may take to be gone.
PATIENCE = 5.0

State = Literal["waiting", "running", "done", "failed"]


@dataclass(frozen=True)
class StepRecord:
    """One step in run.json.

    line: as it is typed. seconds: that its last work took. output: hash of what it made. files: path in the step's
    folder → hash. error: the last lines that it told people before it failed.
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
    """run.json: `steps` are those of the recipe as it is now, `earlier` those that it had before, by their names."""

    program: Pipeline
    run: Path
    steps: dict[str, StepRecord] = field(default_factory=dict)
    earlier: dict[str, StepRecord] = field(default_factory=dict)
    pushes: list[Mapping[str, Any]] = field(default_factory=list)

    def write(self) -> None:
        """Writes it, whole or not at all. Raises SurgeryError."""
        program = self.program
        write_file(
            self.run / MANIFEST,
            to_json(
                {
                    "schema": SCHEMA,
                    "recipe": program.recipe,
                    "about": program.about,
                    "settings": program.settings,
                    "needs": program.needs,
                    "steps": {node.name: self.steps[node.name] for node in program.nodes},
                    "pushes": self.pushes,
                    "earlier": self.earlier,
                }
            ),
        )


def read_record(program: Pipeline, run: Path, lines: Mapping[str, str]) -> RunRecord:
    """What `run` says of the steps of `program`; steps that are new wait.

    Args:
        lines: step → how it is typed.

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
        value = read_json(path)
        if value.get("schema") != SCHEMA or not isinstance(value.get("steps"), dict):
            raise usage_error(f"has schema {value.get('schema')!r}, this version reads {SCHEMA}", where=path)
        if value.get("recipe") != program.recipe:
            raise usage_error(
                f"holds a run of the recipe {value.get('recipe')!r}, not of {program.recipe!r}",
                where=run,
                hint="Choose another folder with -o.",
            )
        known = {name: _step(each, path) for name, each in {**value.get("earlier", {}), **value["steps"]}.items()}
    steps = {node.name: known.get(node.name) or StepRecord(node.step, lines[node.name]) for node in program.nodes}
    earlier = {name: each for name, each in known.items() if name not in steps}
    return RunRecord(program, run, steps, earlier)


def _step(value: Any, path: Path) -> StepRecord:
    names = {each.name for each in fields(StepRecord)}
    try:
        return StepRecord(**{name: each for name, each in value.items() if name in names})
    except (TypeError, AttributeError) as error:
        raise SurgeryError("is damaged", where=path, hint="Remove it: what is whole is done again quickly.") from error


@contextmanager
def locked(run: Path) -> Iterator[int]:
    """The folder `run` for this process and its children alone; gives the lock's descriptor.

    Raises:
        SurgeryError: another run is at work there; the folder cannot be made.
    """
    path = run / LOCK
    try:
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise disk_error(error, path) from error
    try:
        _take(descriptor, run)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _take(descriptor: int, run: Path) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            holder = os.pread(descriptor, 20, 0).decode("ascii", errors="replace").strip()
            # One that lives will not be gone soon; of one that was killed, the steps are about to end.
            if _lives(holder) or time.monotonic() > end:
                who = f" (process {holder})" if holder else ""
                raise usage_error(
                    f"another run is at work here{who}",
                    where=run,
                    hint="Wait until it is done, stop it, or choose another folder with -o.",
                ) from error
        time.sleep(0.05)


def _lives(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def last_lines(log: Path, count: int = 5) -> str:
    """The last lines of a step's log that say something."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    said: Sequence[str] = [line.rstrip() for line in lines if line.strip()]
    return "\n".join(said[-count:])
