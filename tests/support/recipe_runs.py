"""Recipes for tests: programs made by hand of real and of made-up commands, children that are no processes, and runs of
the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from support.architectures import add_tokenizer, build, sibling

from cli.commands.run import commands
from surgery.recipes.run.paths import MANIFEST
from surgery.recipes.run.subprocesses import StepProcess
from surgery.recipes.run.subprocesses import surgery_command as line_of
from surgery.recipes.types import Command, CommandParameter, Given, Pipeline, Push, RecipeStep, StepOutput

RECIPE = """
recipes:
  reasoning:
    about: A vector, moved in two strengths, and merged.
    vars: {tuned: TUNED, base: BASE, target: TARGET, seed: 1}
    steps:
      vector:
        run: vector extract
        with: {tuned: $tuned, base: $base}
      moved:
        run: vector apply
        with: {vector: $vector, target: $target, scale: $scale}
        matrix: {scale: [0.5, 1.0]}
      merged:
        run: merge weights
        with: {what: linear, models: $moved, weight: [1], seed: $seed}
      distance:
        run: diff
        with: {a: $target, b: $merged}
"""


def make_models(folder: Path) -> dict[str, Path]:
    """Three tiny relatives: base, tuned and target."""
    base = add_tokenizer(build("llama", folder / "base", max_shard_size="20KB"))
    return {
        "base": base,
        "tuned": sibling(base, folder / "tuned", seed=1),
        "target": sibling(base, folder / "target", seed=2),
    }


def write_recipe(folder: Path, models: Mapping[str, Path]) -> Path:
    """recipes.yaml in `folder`, on `models`."""
    text = RECIPE
    for name, path in models.items():
        text = text.replace(name.upper(), str(path))
    path = folder / "recipes.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def node(
    name: str, given: Mapping[str, Given] | None = None, *, command: Command | None = None, **more: Any
) -> RecipeStep:
    """A step; of the made-up command `make` unless another is given."""
    made = [v for value in (given or {}).values() for v in (value if isinstance(value, tuple) else (value,))]
    after = tuple(dict.fromkeys(v.step for v in made if isinstance(v, StepOutput)))
    return RecipeStep(name, name.partition(".")[0], command or make(), given or {}, after, **more)


def make(name: str = "make", *, writes: str | None = "out", **more: Any) -> Command:
    """A made-up command, with an option of each kind."""
    parameters = [
        CommandParameter("inputs", "text", many=True),
        CommandParameter("text", "text", flag="--text", default="a"),
        CommandParameter("count", "whole", flag="--count", default=1),
        CommandParameter("scale", "number", flag="--scale", default=1.0),
        CommandParameter("fast", "flag", flag="--fast", off="--no-fast"),
        CommandParameter("from", "path", flag="--from"),
        CommandParameter("threads", "whole", flag="--threads"),
    ]
    return Command(name, "", {each.name: each for each in parameters}, writes=writes, **more)


def program(*nodes: RecipeStep, pushes: Sequence[Push] = (), recipe: str = "tried") -> Pipeline:
    """A recipe of `nodes`."""
    text = f"recipes: {{{recipe}: {{}}}}\n"
    return Pipeline(recipe, "Tried out.", Path("recipes.yaml"), text, {}, nodes, pushes=tuple(pushes))


def real(name: str) -> Command:
    """A command of the real command line."""
    return commands()[name]


class Fakes:
    """A `Runner` without processes: a child is done after it was asked `turns` times.

    started, ended: names, in their order. beside: step → those that ran when it was started. codes: exit codes other
    than 0.
    """

    def __init__(
        self,
        *,
        turns: int = 2,
        codes: Mapping[str, int] | None = None,
        work: Callable[[StepProcess], None] | None = None,
    ) -> None:
        self.turns, self.codes, self.work = turns, dict(codes or {}), work or write_output
        self.started: list[str] = []
        self.ended: list[str] = []
        self.beside: dict[str, set[str]] = {}
        self.signals: list[tuple[str, int]] = []
        self.words: dict[str, Sequence[str]] = {}

    def __call__(self, job: StepProcess) -> Fake:
        name = job.step.name
        self.beside[name] = set(self.started) - set(self.ended)
        self.started.append(name)
        self.words[name] = job.arguments
        return Fake(self, job)


class Fake:
    def __init__(self, of: Fakes, job: StepProcess) -> None:
        self.of, self.job, self.left = of, job, of.turns
        self.code: int | None = None

    def poll(self) -> int | None:
        self.left -= 1
        if self.code is None and self.left <= 0:
            name = self.job.step.name
            self.code = self.of.codes.get(name, 0)
            if self.code == 0:
                self.of.work(self.job)
            else:
                self.job.paths.log.write_text("looked\nerror: it is broken\n", encoding="utf-8")
            self.of.ended.append(name)
        return self.code

    def signal(self, number: int) -> None:
        self.of.signals.append((self.job.step.name, number))
        self.code = -number


def write_output(job: StepProcess) -> None:
    """What a made-up step does: it prints its words, and writes them into its folder."""
    job.paths.text.write_text(" ".join(job.arguments), encoding="utf-8")
    if job.step.command.writes is not None:
        out = job.paths.out
        if out.suffix:
            out.write_text("made", encoding="utf-8")
            return
        out.mkdir(exist_ok=True)
        (out / "result.txt").write_text(f"{job.step.name} made this", encoding="utf-8")


# Python imports a module of this name before anything else: in the process of the step it writes who it is, and waits.
WAITING = """
import os, signal, sys
from pathlib import Path
if "WORD" in sys.orig_argv:
    Path("FOLDER/process.part").write_text(str(os.getpid()))
    Path("FOLDER/process.part").rename("FOLDER/process")
    signal.pause()
"""


def hold_step(folder: Path, word: str) -> dict[str, str]:
    """The environment of a run in which steps with `word` on their command line wait, before they begin, for a signal.

    Such a step leaves its process id in `folder`; see `wait_for_held_step`.
    """
    folder.mkdir()
    text = WAITING.replace("WORD", word).replace("FOLDER", str(folder.absolute()))
    (folder / "sitecustomize.py").write_text(text, encoding="utf-8")
    paths = [str(folder.absolute()), os.environ.get("PYTHONPATH")]
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def wait_for_held_step(folder: Path, run: subprocess.Popen[str]) -> int:
    """Return the process id of the step that `hold_step` holds; fail where `run` ends without one."""
    path = folder / "process"
    while not path.exists():
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.01)
    return int(path.read_text(encoding="utf-8"))


def surgery_run(folder: Path, *words: object, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `surgery run …` as a process of its own, in `folder`."""
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    return subprocess.Popen(
        line_of(["run", *map(str, words)]),
        cwd=folder,
        env=os.environ | settings | (environment or {}),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def outputs(run: Path) -> dict[str, str]:
    """Step → hash of what it made, by run.json."""
    steps = json.loads((run / MANIFEST).read_text(encoding="utf-8"))["steps"]
    return {name: step["output"] for name, step in steps.items()}
