"""What a step will take before it runs: memory, room on the disk, and what must be downloaded first.

In come a `RecipeStep`, what its values name and the estimates of the steps before it; out comes an `ResourceEstimate`.
From headers and listings alone: bounds that keep parallel steps from pushing each other out of memory, not
measurements.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from surgery.errors import SurgeryError
from surgery.recipes.run.inputs import InputResolver, ResolvedInput
from surgery.recipes.run.paths import plain, scalars
from surgery.recipes.types import RecipeStep, StepOutput

MB, GB = 10**6, 10**9
PROGRAM = 1 * GB  # of a command that loads models, beside the model: Python, torch, transformers, activations
WEIGHT_JOB = GB // 2  # of one that streams weights: it holds a few segments of each model
LOADED = 1.3  # bytes in memory per byte of a checkpoint
TRAINED = 16  # bytes per parameter: the weight, its gradient and AdamW's two moments, in fp32
FLOAT32 = 4  # bytes
SMALL = 50 * MB  # of results, pictures and tables
SHARE = 0.8  # of the memory that is free now

LOADING = ("eval", "probe", "edit heads", "edit experts", "vector sweep")
GROWING = ("grow run", "grow baseline")
EMBEDDING_ROWS = 50_000  # where a tokenizer's size is not known
WIDTH = 256  # where a plan's width is not known
LAYERS = 12  # times the width squared: entries of a layer's matrices


@dataclass(frozen=True)
class ResourceEstimate:
    """What a step takes, in bytes, and what it makes.

    memory: at most, as far as that is known. disk: of its output. n_parameters: of the model that it makes. notes: what
    is not known. downloads: repository → bytes that are not in the cache.
    """

    memory: int
    disk: int
    n_parameters: int | None = None
    notes: tuple[str, ...] = ()
    downloads: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Model:
    """One of the models that a step is given."""

    parameter: str
    n_bytes: int | None
    n_parameters: int | None


def estimate(node: RecipeStep, before: Mapping[str, ResourceEstimate], things: InputResolver) -> ResourceEstimate:
    """What `node` takes. Raises SurgeryError as `InputResolver.of`."""
    named = list(_named(node, things))
    models = list(_models(node, before, named))
    parameters = _parameters(node, models)
    memory = _memory(node, models, parameters) if node.memory is None else node.memory
    notes = [thing.note for _, thing in named if thing.note]
    if node.memory is None and _loads(node) and not any(model.n_bytes for model in models):
        notes.append(f"{node.name}: how large its models are is not known")
    downloads = {thing.repo: thing.missing for _, thing in named if thing.repo and thing.missing}
    return ResourceEstimate(memory, _disk(node, models, parameters), parameters, tuple(dict.fromkeys(notes)), downloads)


def free_memory() -> int | None:
    """Bytes of memory that can be had now; None where the system does not say."""
    try:
        psutil = import_module("psutil")  # a dependency of accelerate, not ours
    except ImportError:
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):
            return None
    return int(psutil.virtual_memory().available)


def check_disk(run: Path, needed: int, free: int) -> None:
    """Raises SurgeryError where the outputs of the steps that are to be done do not fit."""
    from surgery.reporting.report import format_value

    if needed > free:
        raise SurgeryError(
            f"the steps that are to be done write about {format_value(needed, 'bytes')}, and "
            f"{format_value(free, 'bytes')} are free on that disk",
            where=run,
            hint="Free some space, or choose a folder on a larger disk with -o.",
        )


def _named(node: RecipeStep, things: InputResolver) -> Iterator[tuple[str, ResolvedInput]]:
    for name, parameter in node.command.parameters.items():
        if parameter.kind not in ("text", "path"):
            continue
        for value in scalars(node.given.get(name)):
            if isinstance(value, StepOutput):
                continue
            text = plain(value)
            for thing in (things.of(text), *things.inside(text)):
                if thing is not None:
                    yield name, thing


def _models(
    node: RecipeStep, before: Mapping[str, ResourceEstimate], named: list[tuple[str, ResolvedInput]]
) -> Iterator[_Model]:
    for name, given in node.given.items():
        for value in scalars(given):
            if isinstance(value, StepOutput) and value.step in before:
                made = before[value.step]
                yield _Model(name, made.disk, made.n_parameters)
    for name, thing in named:
        if thing.n_bytes is not None:
            yield _Model(name, thing.n_bytes, thing.n_parameters)


def _loads(node: RecipeStep) -> bool:
    command = node.command.name
    tunes = command == "merge logits" and node.given.get("tune") is not None
    measures = node.given.get("no-measure") is not True
    return tunes or (measures and any(command == each or command.startswith(f"{each} ") for each in LOADING))


def _memory(node: RecipeStep, models: list[_Model], parameters: int | None) -> int:
    if node.command.name in GROWING:
        return PROGRAM + TRAINED * (parameters or 0)
    if _loads(node):
        return PROGRAM + round(LOADED * max((model.n_bytes or 0 for model in models), default=0))
    return WEIGHT_JOB


def _disk(node: RecipeStep, models: list[_Model], parameters: int | None) -> int:
    """Bytes of the output; of a model that is edited, those of its original."""
    command, given = node.command.name, node.given
    largest = max((model.n_bytes or 0 for model in models), default=0)
    if command == "vector extract":
        if given.get("rank") is not None:
            return SMALL + largest // 10
        width = 2 if given.get("dtype") in ("bfloat16", "float16") else FLOAT32
        return width * parameters if parameters else 2 * largest
    if command in ("vector apply", "vector transfer", "edit heads", "edit experts", "edit undo", "grow add"):
        role = "target" if command.startswith("vector") else "model"
        return max((model.n_bytes or 0 for model in models if model.parameter == role), default=largest)
    if command == "merge weights":
        return largest
    if command in ("merge logits", "merge unpack"):
        return sum(model.n_bytes or 0 for model in models)
    if command in GROWING:
        return 2 * FLOAT32 * (parameters or 0) + SMALL
    if command in ("grow embed", "grow init"):
        return FLOAT32 * (parameters or 0)
    return SMALL if node.command.writes else MB


def _parameters(node: RecipeStep, models: list[_Model]) -> int | None:
    """How many values the model has that a step makes."""
    command = node.command.name
    if command in GROWING or command in ("grow embed", "grow init"):
        return _grown(node, models)
    if command in ("merge logits", "merge unpack"):
        return sum(model.n_parameters or 0 for model in models) or None
    return max((model.n_parameters or 0 for model in models), default=0) or None


def _grown(node: RecipeStep, models: list[_Model]) -> int:
    """Parameters of an embedding, of the model that is begun on it, or of the last stage of a growth."""
    begun = max((model.n_parameters or 0 for model in models), default=0)
    width = _whole(node, "width") or _whole(node, "hidden") or WIDTH
    if node.command.name == "grow embed":
        return max(begun, EMBEDDING_ROWS * width)
    layers = _whole(node, "layers") or 0
    plan = node.given.get("plan")
    if isinstance(plan, str):
        from surgery.growth.plan import read_plan

        read, _ = read_plan(plan)
        layers = (read.model.layers if read.model else 0) + sum(stage.add for stage in read.expanded)
        width = (read.model.hidden if read.model else None) or width
    return (begun or EMBEDDING_ROWS * width) + layers * LAYERS * width * width


def _whole(node: RecipeStep, name: str) -> int | None:
    value = node.given.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
