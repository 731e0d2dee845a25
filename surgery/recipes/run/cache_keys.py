"""Compute a step's cache key: one hash of everything that decides its output.

A step whose key is unchanged is not run again. The key covers the tool's version, the command, and the value of every
option, defaults too. A value that names something counts by its content: a file or folder by its hash, `lab:NAME` by
its recipe, a repository on the Hub by its commit, another step by that step's key and the hash of its output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from surgery.io.hashing import hash_text
from surgery.recipes.run.estimates import GROWING
from surgery.recipes.run.inputs import InputResolver
from surgery.recipes.run.paths import scalars, to_text
from surgery.recipes.types import CommandParameter, RecipeStep, Scalar, StepOutput
from surgery.runtime.version import __version__

# Options that change no byte of a result: how many processors work, how often a training saves what it goes on from,
# and whether it also writes TensorBoard's logs. `device` is not among them: a GPU rounds otherwise; nor are the threads
# of a training, which split its sums.
THREADS = "threads"
IGNORED = frozenset({THREADS, "save-every", "tensorboard"})
# Parameters whose values may be globs of files; those of others match names of tensors.
GLOBS = frozenset({"corpus"})


@dataclass(frozen=True)
class KeyedOutput:
    """The key of a step that is done, and the hash of its output."""

    key: str
    output: str


def cache_key(step: RecipeStep, done: Mapping[str, KeyedOutput], inputs: InputResolver) -> str | None:
    """Return the key of `step`; None if a step that it depends on is not among those that are `done`.

    Raises:
        SurgeryError: the lab has nothing of a name; a file cannot be read.
    """
    # A step may follow another without taking its output.
    if any(name not in done for name in step.after):
        return None
    values: dict[str, object] = {}
    for name, parameter in step.command.parameters.items():
        # Threads split the sums of a training, so there they count.
        if name in IGNORED and not (name == THREADS and step.command.name in GROWING):
            continue
        items: list[object] = []
        for value in scalars(step.given.get(name, parameter.default)):
            if isinstance(value, StepOutput):
                if value.step not in done:
                    return None
                source = done[value.step]
                items.append({"key": source.key, "output": source.output, "inside": value.inside})
            else:
                items.append(_identity(parameter, value, inputs))
        values[name] = items
    after = {name: done[name].output for name in sorted(step.after)}
    record = {"version": __version__, "command": step.command.name, "values": values, "after": after}
    return hash_text(json.dumps(record, sort_keys=True))


def _identity(parameter: CommandParameter, value: Scalar, inputs: InputResolver) -> object:
    """Return what a value counts as: the content of what it names, else the value itself."""
    if parameter.kind == "flag":
        return bool(value)
    if parameter.kind in ("whole", "number"):
        return float(value)
    text = to_text(value)
    resolved = inputs.resolve(text) or (inputs.resolve_glob(text) if parameter.name in GLOBS else None)
    if resolved is None:
        return text
    inside = [each.content for each in inputs.resolve_config(text)]
    # A folder is known by its content alone: it may have been moved.
    return {"content": resolved.content, "inside": inside} if resolved.content is not None else text
