"""Estimate what a step takes before it runs: memory, disk, and what must be downloaded first.

From headers and listings alone: bounds that keep parallel steps from pushing each other out of memory, not
measurements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from surgery.errors import SurgeryError
from surgery.recipes.run.inputs import InputResolver, ResolvedInput
from surgery.recipes.run.paths import scalars, to_text
from surgery.recipes.types import RecipeStep, StepOutput

MB, GB = 10**6, 10**9
PROGRAM = 1 * GB  # of a command that loads models, beside the model: Python, torch, transformers, activations
WEIGHT_JOB = GB // 2  # of one that streams weights: it holds a few segments of each model
LOADED = 1.3  # bytes in memory per byte of a checkpoint
TRAINED = 16  # bytes per parameter: the weight, its gradient and AdamW's two moments, in fp32
FLOAT32 = 4  # bytes
SMALL = 50 * MB  # of results, pictures and tables
MEMORY_SHARE = 0.8  # of the memory that is free now: the rest is for what starts meanwhile

LOADING = ("eval", "probe", "edit heads", "edit experts", "vector sweep")
GROWING = ("grow run", "grow baseline")
EMBEDDING_ROWS = 50_000  # where a tokenizer's size is not known
WIDTH = 256  # where a plan's width is not known
LAYERS = 12  # times the width squared: entries of a layer's matrices


@dataclass(frozen=True)
class ResourceEstimate:
    """What a step takes.

    Attributes:
        memory: bytes at most, as far as that is known.
        disk: bytes of its output.
        n_parameters: of the model that it writes.
        notes: what is not known.
        downloads: repository → bytes that are not in the cache.
    """

    memory: int
    disk: int
    n_parameters: int | None = None
    notes: tuple[str, ...] = ()
    downloads: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Model:
    """A model among the inputs of a step."""

    parameter: str
    n_bytes: int | None
    n_parameters: int | None


def estimate(step: RecipeStep, before: Mapping[str, ResourceEstimate], inputs: InputResolver) -> ResourceEstimate:
    """Estimate what `step` takes. Raises SurgeryError as `InputResolver.resolve`."""
    named = list(_named(step, inputs))
    models = list(_models(step, before, named))
    parameters = _parameters(step, models)
    memory = _memory(step, models, parameters) if step.memory is None else step.memory
    notes = [resolved.note for _, resolved in named if resolved.note]
    if step.memory is None and _loads(step) and not any(model.n_bytes for model in models):
        notes.append(f"{step.name}: how large its models are is not known")
    downloads = {resolved.repo: resolved.missing for _, resolved in named if resolved.repo and resolved.missing}
    return ResourceEstimate(memory, _disk(step, models, parameters), parameters, tuple(dict.fromkeys(notes)), downloads)


def free_memory() -> int:
    """Return the bytes of memory that are available now."""
    return int(psutil.virtual_memory().available)


def check_disk(run: Path, needed: int, free: int) -> None:
    """Raise SurgeryError if the outputs of the steps that are to be done do not fit on the disk."""
    from surgery.reporting.report import format_value

    if needed > free:
        raise SurgeryError(
            f"the steps that are to be done write about {format_value(needed, 'bytes')}, and "
            f"{format_value(free, 'bytes')} are free on that disk",
            where=run,
            hint="Free some space, or choose a folder on a larger disk with -o.",
        )


def _named(step: RecipeStep, inputs: InputResolver) -> Iterator[tuple[str, ResolvedInput]]:
    for name, parameter in step.command.parameters.items():
        if parameter.kind not in ("text", "path"):
            continue
        for value in scalars(step.given.get(name)):
            if isinstance(value, StepOutput):
                continue
            text = to_text(value)
            for resolved in (inputs.resolve(text), *inputs.resolve_config(text)):
                if resolved is not None:
                    yield name, resolved


def _models(
    step: RecipeStep, before: Mapping[str, ResourceEstimate], named: list[tuple[str, ResolvedInput]]
) -> Iterator[_Model]:
    for name, given in step.given.items():
        for value in scalars(given):
            if isinstance(value, StepOutput) and value.step in before:
                source = before[value.step]
                yield _Model(name, source.disk, source.n_parameters)
    for name, resolved in named:
        if resolved.n_bytes is not None:
            yield _Model(name, resolved.n_bytes, resolved.n_parameters)


def _loads(step: RecipeStep) -> bool:
    command = step.command.name
    # Only tuning runs the ensemble; writing one is arithmetic on files.
    tunes = command == "merge logits" and step.given.get("tune") is not None
    measures = step.given.get("no-measure") is not True
    return tunes or (measures and any(command == each or command.startswith(f"{each} ") for each in LOADING))


def _memory(step: RecipeStep, models: list[_Model], parameters: int | None) -> int:
    if step.command.name in GROWING:
        return PROGRAM + TRAINED * (parameters or 0)
    if _loads(step):
        return PROGRAM + round(LOADED * max((model.n_bytes or 0 for model in models), default=0))
    return WEIGHT_JOB


def _disk(step: RecipeStep, models: list[_Model], parameters: int | None) -> int:
    """Return the bytes of the output; for an edited model, those of its original."""
    command, given = step.command.name, step.given
    largest = max((model.n_bytes or 0 for model in models), default=0)
    # A vector is stored in float32 unless another dtype is asked for, whatever dtype the models have.
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
    return SMALL if step.command.writes else MB


def _parameters(step: RecipeStep, models: list[_Model]) -> int | None:
    """Return how many values the model has that a step writes."""
    command = step.command.name
    if command in GROWING or command in ("grow embed", "grow init"):
        return _grown(step, models)
    if command in ("merge logits", "merge unpack"):
        return sum(model.n_parameters or 0 for model in models) or None
    return max((model.n_parameters or 0 for model in models), default=0) or None


def _grown(step: RecipeStep, models: list[_Model]) -> int:
    """Return the parameters of an embedding, of the model built on it, or of the last stage of a growth."""
    known = max((model.n_parameters or 0 for model in models), default=0)
    width = _integer(step, "width") or _integer(step, "hidden") or WIDTH
    if step.command.name == "grow embed":
        return max(known, EMBEDDING_ROWS * width)
    layers = _integer(step, "layers") or 0
    plan = step.given.get("plan")
    if isinstance(plan, str):
        from surgery.growth.plan import read_plan

        growth, _ = read_plan(plan)
        layers = (growth.model.layers if growth.model else 0) + sum(stage.add for stage in growth.expanded)
        width = (growth.model.hidden if growth.model else None) or width
    return (known or EMBEDDING_ROWS * width) + layers * LAYERS * width * width


def _integer(step: RecipeStep, name: str) -> int | None:
    value = step.given.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
