"""A step's key: one hash of all that decides what it makes, so that an unchanged step need not be done again.

In go the tool's version, the command, and the value of every option, defaults too. A value that names something counts
by its content: a file or folder by its hash, `lab:NAME` by its recipe, a repository on the Hub by its commit, another
step by that step's key and the hash of what it made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from surgery.io.hashing import hash_text
from surgery.recipes.run.estimates import GROWING
from surgery.recipes.run.inputs import InputResolver
from surgery.recipes.run.paths import plain, scalars
from surgery.recipes.types import CommandParameter, RecipeStep, Scalar, StepOutput

# Options that change no byte of a result: how many processors work, how often a training saves what it goes on from,
# and whether it also writes TensorBoard's logs. `device` is not among them: a GPU rounds otherwise; nor are the threads
# of a training, which split its sums.
THREADS = "threads"
FREE = frozenset({THREADS, "save-every", "tensorboard"})
# Parameters whose values may be globs of files; those of others match names of tensors.
GLOBS = frozenset({"corpus"})


@dataclass(frozen=True)
class KeyedOutput:
    """What a step that is done made: its key, and the hash of its output."""

    key: str
    output: str


def cache_key(node: RecipeStep, done: Mapping[str, KeyedOutput], things: InputResolver) -> str | None:
    """The key of `node`; None where a step that it needs is not among those that are `done`.

    Raises:
        SurgeryError: the lab has nothing of a name; a file cannot be read.
    """
    if any(name not in done for name in node.after):
        return None
    values: dict[str, object] = {}
    for name, parameter in node.command.parameters.items():
        if name in FREE and not (name == THREADS and node.command.name in GROWING):
            continue
        found: list[object] = []
        for value in scalars(node.given.get(name, parameter.default)):
            if isinstance(value, StepOutput):
                if value.step not in done:
                    return None
                maker = done[value.step]
                found.append({"key": maker.key, "output": maker.output, "inside": value.inside})
            else:
                found.append(_known_by(parameter, value, things))
        values[name] = found
    after = {name: done[name].output for name in sorted(node.after)}
    record = {"version": _version(), "command": node.command.name, "values": values, "after": after}
    return hash_text(json.dumps(record, sort_keys=True))


def _known_by(parameter: CommandParameter, value: Scalar, things: InputResolver) -> object:
    """A value as it is typed, and the content of what it names."""
    if parameter.kind == "flag":
        return bool(value)
    if parameter.kind in ("whole", "number"):
        return float(value)
    text = plain(value)
    thing = things.of(text) or (things.matching(text) if parameter.name in GLOBS else None)
    if thing is None:
        return text
    inside = [each.content for each in things.inside(text)]
    # A folder is known by its content alone: it may have been moved.
    return {"content": thing.content, "inside": inside} if thing.content is not None else text


def _version() -> str:
    try:
        return version("model-surgery")
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "source tree"
