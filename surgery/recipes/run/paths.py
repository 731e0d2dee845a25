"""Paths of a run's files, and the command line of a step."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery.io.atomic import partial_path
from surgery.io.command_line import command_words, option_text
from surgery.recipes.types import Command, CommandParameter, Given, Pipeline, RecipeStep, Scalar, StepOutput

MANIFEST = "run.json"
RECIPE = "recipe.yaml"
HASHES = "hashes.json"
REPORT = "report.html"
LOCK = ".lock"
STEPS = "steps"


@dataclass(frozen=True)
class StepPaths:
    """Paths of the files in a step's own folder; `out` is what its command writes."""

    folder: Path
    out: Path

    @property
    def partial(self) -> Path:
        """The staging folder in which the command writes before `out` is complete."""
        return partial_path(self.out)

    @property
    def text(self) -> Path:
        """What the command printed on stdout."""
        return self.folder / "output.txt"

    @property
    def log(self) -> Path:
        """What the command wrote to stderr: warnings, errors, progress in lines."""
        return self.folder / "log.txt"

    def log_of(self, process: int) -> Path:
        """The log of rank `process` under a launcher; that of rank 0 is `log`."""
        return self.log if process == 0 else self.folder / f"log.{process}.txt"

    @property
    def picture(self) -> Path:
        """The picture that the command draws, where it has an option for one."""
        return self.folder / "picture.png"

    @property
    def key(self) -> Path:
        """The cache key of the work in this folder, finished or not."""
        return self.folder / "key"

    @property
    def progress(self) -> Path:
        """How far the command is, see `surgery.runtime.progress`."""
        return self.folder / "progress.json"


class RunPaths:
    """The paths of a pipeline's steps in the folder `run`."""

    def __init__(self, pipeline: Pipeline, run: Path) -> None:
        self.run = run
        self._of = {
            step.name: StepPaths(run / STEPS / step.name, run / STEPS / step.name / f"out{step.command.suffix}")
            for step in pipeline.nodes
        }

    def of(self, step: str) -> StepPaths:
        """Return the paths of the step named `step`."""
        return self._of[step]

    def output_path(self, output: StepOutput) -> Path:
        """Return the path of `output`, which need not exist yet."""
        out = self._of[output.step].out
        return out / output.inside if output.inside else out


def cli_arguments(step: RecipeStep, paths: RunPaths) -> list[str]:
    """Return what follows `surgery` on the command line: arguments in their order, then options."""
    command, step_paths = step.command, paths.of(step.name)
    given: dict[str, Given] = dict(step.given)
    if command.changes is not None:
        given[command.changes] = str(step_paths.out)  # a copy of what the recipe names
    outputs: dict[str, Path] = {}
    if command.writes is not None and command.writes != command.changes:
        outputs[f"--{command.writes}"] = step_paths.out
    if command.plots is not None:
        outputs[command.plots] = step_paths.picture
    if command.cards is not None:
        outputs[command.cards] = paths.run
    return typed_words(command, given, outputs, paths.output_path)


def typed_words(
    command: Command, given: Mapping[str, Given], outputs: Mapping[str, Path], path_of: Callable[[StepOutput], Path]
) -> list[str]:
    """Return the words that give `command` its values; a value never becomes an option, whatever it begins with.

    Args:
        given: parameter → value, which may be from a file.
        outputs: option → where to write; never from a file.
    """
    arguments: list[str] = []
    options: list[str] = []
    for parameter in command.parameters.values():
        texts = list(_texts(parameter, given.get(parameter.name), path_of))
        if parameter.flag is None:
            arguments += texts
        elif parameter.kind == "flag":
            options += texts
        else:
            for text in texts:
                options += option_text(parameter.flag, text)
    for flag, path in outputs.items():
        options += option_text(flag, str(path))
    return command_words(command.name, arguments, options)


def command_line(step: RecipeStep, paths: RunPaths) -> str:
    """Return the step as a person would type it."""
    return shlex.join(["surgery", *cli_arguments(step, paths)])


def scalars(given: Given) -> Iterator[Scalar | StepOutput]:
    """Yield the values of a list, or the value itself; nothing for None."""
    if isinstance(given, tuple):
        yield from given
    elif given is not None:
        yield given


def step_outputs(step: RecipeStep) -> Iterator[tuple[str, StepOutput]]:
    """Yield every output of another step that `step` takes, with the name of the parameter that takes it."""
    for name, given in step.given.items():
        for value in scalars(given):
            if isinstance(value, StepOutput):
                yield name, value


def dependencies(step: RecipeStep) -> tuple[str, ...]:
    """Return the steps that must be done before this one, in the order in which they are named."""
    return tuple(dict.fromkeys([*step.after, *(output.step for _, output in step_outputs(step))]))


def dependents(pipeline: Pipeline, first: set[str]) -> set[str]:
    """Return `first` and every step that depends on one of them, directly or not."""
    names = set(first)
    for step in pipeline.nodes:  # in an order in which each comes after those it needs
        if names & set(dependencies(step)):
            names.add(step.name)
    return names


def _texts(parameter: CommandParameter, given: Given, path_of: Callable[[StepOutput], Path]) -> Iterator[str]:
    for value in scalars(given):
        if parameter.kind == "flag":
            if value is True and parameter.flag is not None:
                yield parameter.flag
            elif value is False and parameter.off is not None:
                yield parameter.off
        elif isinstance(value, StepOutput):
            yield str(path_of(value))
        else:
            yield to_text(value)


def to_text(value: Scalar) -> str:
    """Return a value as it is typed."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)


def by_name(pipeline: Pipeline) -> Mapping[str, RecipeStep]:
    """Return the steps by their names."""
    return {step.name: step for step in pipeline.nodes}
