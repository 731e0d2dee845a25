"""Where a run keeps its files, and how a step is typed: `RecipeStep` → its folder and its command-line words."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery.io.atomic import partial_path
from surgery.recipes.types import CommandParameter, Given, Pipeline, RecipeStep, Scalar, StepOutput

MANIFEST = "run.json"
RECIPE = "recipe.yaml"
HASHES = "hashes.json"
REPORT = "report.html"
LOCK = ".lock"
STEPS = "steps"


@dataclass(frozen=True)
class StepPaths:
    """A step's own folder, and what lies in it.

    out: what the step makes. text: what it printed. log: what it told people. picture: where its command draws one.
    key: whose work lies here, finished or not. told: how far it is.
    """

    folder: Path
    out: Path

    @property
    def partial(self) -> Path:
        return partial_path(self.out)

    @property
    def text(self) -> Path:
        return self.folder / "output.txt"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def log_of(self, process: int) -> Path:
        """What process `process` of a launcher's told; the first writes the log, and the others print nothing else."""
        return self.log if process == 0 else self.folder / f"log.{process}.txt"

    @property
    def picture(self) -> Path:
        return self.folder / "picture.png"

    @property
    def key(self) -> Path:
        return self.folder / "key"

    @property
    def told(self) -> Path:
        return self.folder / "progress.json"


class RunPaths:
    """The places of a program's steps in the folder `run`."""

    def __init__(self, program: Pipeline, run: Path) -> None:
        self.run = run
        self._of = {node.name: _place(node, run / STEPS / node.name) for node in program.nodes}

    def of(self, node: str) -> StepPaths:
        """The place of the step `node`."""
        return self._of[node]

    def made(self, made: StepOutput) -> Path:
        """Where what `made` names lies, or will lie."""
        out = self._of[made.step].out
        return out / made.inside if made.inside else out


def _place(node: RecipeStep, folder: Path) -> StepPaths:
    return StepPaths(folder, folder / f"out{node.command.suffix}")


def words(node: RecipeStep, places: RunPaths) -> list[str]:
    """What follows `surgery` on the command line: arguments in their order, then options."""
    command, place = node.command, places.of(node.name)
    given: dict[str, Given] = dict(node.given)
    if command.changes is not None:
        given[command.changes] = str(place.out)  # a copy of what the recipe names
    arguments: list[str] = []
    options: list[str] = []
    for parameter in command.parameters.values():
        texts = list(_texts(parameter, given.get(parameter.name), places.made))
        if parameter.flag is None:
            arguments += texts
        elif parameter.kind == "flag":
            options += texts
        else:
            for text in texts:
                options += [f"{parameter.flag}={text}"] if text.startswith("-") else [parameter.flag, text]
    if command.writes is not None and command.writes != command.changes:
        options += [f"--{command.writes}", str(place.out)]
    if command.plots is not None:
        options += [command.plots, str(place.picture)]
    if any(text.startswith("-") for text in arguments):
        return [*command.name.split(), *options, "--", *arguments]
    return [*command.name.split(), *arguments, *options]


def typed(node: RecipeStep, places: RunPaths) -> str:
    """The step as a person would type it."""
    return shlex.join(["surgery", *words(node, places)])


def scalars(given: Given) -> Iterator[Scalar | StepOutput]:
    """What a value holds, one by one; nothing of None."""
    if isinstance(given, tuple):
        yield from given
    elif given is not None:
        yield given


def makers(node: RecipeStep) -> Iterator[tuple[str, StepOutput]]:
    """Every output of another step that a step is given, with the parameter it is given to."""
    for name, given in node.given.items():
        for value in scalars(given):
            if isinstance(value, StepOutput):
                yield name, value


def needs(node: RecipeStep) -> tuple[str, ...]:
    """The steps that must be done before this one, in the order in which they are named."""
    return tuple(dict.fromkeys([*node.after, *(made.step for _, made in makers(node))]))


def followers(program: Pipeline, first: set[str]) -> set[str]:
    """`first`, and every step that needs one of them, directly or not."""
    found = set(first)
    for node in program.nodes:  # in an order in which each comes after those it needs
        if found & set(needs(node)):
            found.add(node.name)
    return found


def _texts(parameter: CommandParameter, given: Given, place_of: Callable[[StepOutput], Path]) -> Iterator[str]:
    for value in scalars(given):
        if parameter.kind == "flag":
            if value is True and parameter.flag is not None:
                yield parameter.flag
            elif value is False and parameter.off is not None:
                yield parameter.off
        elif isinstance(value, StepOutput):
            yield str(place_of(value))
        else:
            yield plain(value)


def plain(value: Scalar) -> str:
    """A value as it is typed."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)


def by_name(program: Pipeline) -> Mapping[str, RecipeStep]:
    """The steps by their names."""
    return {node.name: node for node in program.nodes}
