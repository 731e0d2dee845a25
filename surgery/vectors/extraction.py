"""Extract a task vector from a pair of models: v = θ_tuned − θ_base (arXiv 2509.01363, equation 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.dtypes import dtype_name
from surgery.checkpoint.reader import SourceFiles, TensorInput, TensorReader, segments
from surgery.engine.card import CardContent
from surgery.engine.checkpoint_writer import OutputDescription, check_destination, write_checkpoint
from surgery.engine.layouts import see_as
from surgery.engine.manifest import command_record
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, PlannedTensor, plan_files
from surgery.engine.preflight import Preflight, check_ancestor, check_config, check_quantised, sketch
from surgery.engine.result import ExecutionResult
from surgery.engine.unshared import UnsharedChoice
from surgery.engine.work.workers import run_shared
from surgery.errors import SurgeryError
from surgery.io.output_files import write_output
from surgery.reporting.report import Column, Table
from surgery.vectors.align import VectorSettings, aligned_model, check_and_align
from surgery.vectors.choices import VocabPolicy
from surgery.vectors.kernels import DIFFERENCE
from surgery.vectors.selection import TensorSelection
from surgery.vectors.task_vector import DONOR, FORMAT, SKETCH, STEM
from surgery.vectors.tied_heads import with_pair_heads

COMMAND = "vector extract"


@dataclass(frozen=True)
class ExtractReport:
    """What `extract` wrote.

    tensors, zero: how many tensors differ between the models, and how many do not. norm: ‖v‖. relative: ‖v‖/‖θ_base‖
    over the tensors that differ. inexact: how many of their `elements` base + v does not restore bit for bit.
    """

    out: Path
    preflight: Mapping[str, str]
    warnings: Sequence[str]
    tensors: int = 0
    zero: int = 0
    norm: float = 0.0
    relative: float = 0.0
    inexact: int = 0
    elements: int = 0
    dry_run: bool = False

    def summary(self) -> dict[str, Any]:
        """Return what the manifest records."""
        return {
            "norm": self.norm,
            "relative_norm": self.relative,
            "tensors": self.tensors,
            "zero_tensors": self.zero,
            "elements": self.elements,
            "inexact_elements": self.inexact,
        }

    def table(self) -> Table:
        """Return the vector's numbers as a table."""
        return Table(
            "Task vector",
            [
                Column("tensors", "count"),
                Column("zero", "count"),
                Column("‖v‖", "number"),
                Column("‖v‖/‖θ_base‖", "percent"),
                Column("inexact", "count"),
            ],
            [(self.tensors, self.zero, self.norm, self.relative, self.inexact)],
            note="zero: tensors that do not differ, not stored. "
            "inexact: elements that base + v does not restore bit for bit; --dtype float64 leaves none.",
        )


def extract(
    tuned: str,
    base: str,
    out: Path,
    *,
    dtype: str = "float32",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    vocab: VocabPolicy = "strict",
    allow_unrelated: bool = False,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    dequantise: bool = False,
    dry_run: bool = False,
    options: ExecutionOptions = ExecutionOptions(),
) -> ExtractReport:
    """Write v = θ_tuned − θ_base to the folder `out` (arXiv 2509.01363, equation 1).

    Example:
        surgery.extract("lab:grpo", "lab:sft", Path("reasoning"))

    Args:
        dtype: what v is stored in: float32, float64, bfloat16 or float16. F64 tensors keep F64 under float32, which
            restores a 16-bit model bit for bit (but for values 2¹⁶ times smaller than they were). Of F32 tensors
            some elements come back an ulp off, since fp32 cannot hold every difference of two fp32 numbers: float64
            can. The report counts what does not come back.
        include, exclude: globs over tensor names.
        vocab: what to do where the two tokenizers differ; see `surgery.vectors.align`.
        keep, drop: globs over names: the vector has nothing of these tensors; `keep` for those that one model lacks.
        dequantise: see models in FP8 with scales, or in MXFP4, as bf16.
        dry_run: stop after the checks; nothing is written.

    Raises:
        SurgeryError: the models do not fit each other, or do not differ; `out` exists; the disk is full.
    """
    selection = TensorSelection(include=tuple(include), exclude=tuple(exclude))
    unshared = UnsharedChoice(tuple(keep), tuple(drop))
    settings = VectorSettings(selection, vocab, dtype, allow_unrelated, unshared, dequantise)
    pair = prepare_extraction(tuned, base, out, settings, dry_run=dry_run, options=options)
    given = {"dtype": dtype, **settings.globs, "vocab": vocab, **settings.input_options}
    command = command_record(COMMAND, [tuned, base], **given)
    stored_dtype = dtype_name(dtype)
    plan = _plan(pair, command, stored_dtype)
    facts, warnings = pair.preflight.facts, pair.preflight.warnings
    preview = ExtractReport(out, facts, warnings, len(pair.changed), len(pair.unchanged), dry_run=dry_run)

    def describe(folder: Path, result: ExecutionResult) -> OutputDescription[ExtractReport]:
        report = _with_norms(preview, pair, result)
        write_output(folder, f"{DONOR}/{SKETCH}", save(dict(pair.sketch)))
        fields = {"vector": _vector_record(pair, stored_dtype)}
        card = _card(report, stored_dtype)
        return OutputDescription(report, report.summary(), card, kind="vector", fields=fields)

    return write_checkpoint(
        plan, out, options, describe=describe, preflight=pair.preflight, dry_run_report=preview if dry_run else None
    )


@dataclass(frozen=True)
class ModelPair:
    """Two models that passed the checks for an extraction.

    aligned: tensor name → its inputs in the tuned model and in the base. changed: those that differ between the two.
    sketch: of the base.
    """

    preflight: Preflight
    sources: Mapping[str, Checkpoint]
    aligned: Mapping[str, tuple[TensorInput, ...]]
    changed: Sequence[str]
    sketch: Mapping[str, torch.Tensor]

    @property
    def tuned(self) -> Checkpoint:
        """The tuned model."""
        return self.sources["tuned"]

    @property
    def base(self) -> Checkpoint:
        """The model that it was tuned from."""
        return self.sources["base"]

    @property
    def unchanged(self) -> list[str]:
        """Names of the aligned tensors that do not differ, sorted."""
        return sorted(set(self.aligned) - set(self.changed))

    @property
    def left_out(self) -> list[str]:
        """Names of the tuned model's float tensors that are not part of v, sorted."""
        tensors = self.tuned.tensors.items()
        return sorted(name for name, tensor in tensors if tensor.is_float and name not in self.aligned)


def prepare_extraction(
    tuned: str,
    base: str,
    out: Path,
    settings: VectorSettings,
    *,
    dry_run: bool,
    options: ExecutionOptions,
    layout_of: Literal["tuned", "base"] = "tuned",
) -> ModelPair:
    """Open and check two models before v = θ_tuned − θ_base is written in any form.

    Args:
        layout_of: the model whose names and layout v gets.

    Raises:
        SurgeryError: the models do not fit each other, or do not differ; `out` exists.
    """
    preflight = Preflight()
    opened = {"tuned": settings.open(tuned), "base": settings.open(base)}
    check_quantised(preflight, opened.values(), has_option=True)
    preflight.errors.raise_if_any(COMMAND)
    other = "base" if layout_of == "tuned" else "tuned"
    opened[other] = see_as(preflight, opened[other], opened[layout_of]).checkpoint
    check_destination(out, opened, options, dry_run=dry_run)
    check_config(preflight, opened["tuned"], opened["base"].config, base)
    preflight.errors.raise_if_any(COMMAND)
    names = [name for model in opened.values() for name in model.float_names()]
    sources = dict(zip(opened, with_pair_heads(preflight, *opened.values()), strict=True))
    models = [aligned_model(checkpoint) for checkpoint in sources.values()]
    aligned = check_and_align(
        preflight, models[0], models, settings, command=COMMAND, names=names, makes_model=False
    ).inputs
    base_sketch = sketch(sources["base"])
    check_ancestor(preflight, sources["tuned"], base_sketch, allow_unrelated=settings.allow_unrelated)
    # Finding what changed reads both models: not before all that is cheap to check has passed.
    preflight.errors.raise_if_any(COMMAND)
    changed = _changed(aligned, options)
    if not changed:
        raise SurgeryError(f"no tensor differs from {base}: the vector would be empty", where=tuned)
    return ModelPair(preflight, sources, aligned, changed, base_sketch)


def _changed(aligned: Mapping[str, tuple[TensorInput, ...]], options: ExecutionOptions) -> list[str]:
    """Return the names whose two inputs differ; reading stops at a tensor's first segment that differs."""
    files = {path for inputs in aligned.values() for source in inputs for path in source.tensor.files}

    def differs(name: str, reader: TensorReader) -> tuple[str, bool]:
        tuned, base = aligned[name]
        for begin, end in segments(math.prod(tuned.shape)):
            a = reader.values(tuned, begin, end, "tuned")
            b = reader.values(base, begin, end, "base")
            # In fp64, where the difference of two fp32 or 16-bit values is never rounded to zero.
            if bool((a.to(torch.float64) - b.to(torch.float64)).bool().any()):
                return name, True
        return name, False

    with SourceFiles(files) as opened, options.progress("Comparing", len(aligned), "steps") as advance:
        changed = set()
        for name, is_changed in run_shared(list(aligned), differs, opened, threads=options.threads):
            advance(1)
            if is_changed:
                changed.add(name)
    # In the models' order: results come in that of the workers, and a set has none.
    return [name for name in aligned if name in changed]


def _plan(pair: ModelPair, command: Mapping[str, Any], stored_dtype: str) -> Plan:
    return Plan(
        command,
        pair.sources,
        plan_files(_plan_tensors(pair, stored_dtype), stem=STEM),
        {f"{DONOR}/{name}": file for name, file in pair.tuned.side_files.items()},
        index_name=f"{STEM}.safetensors.index.json",
    )


def _plan_tensors(pair: ModelPair, stored_dtype: str) -> list[PlannedTensor]:
    """Plan the delta of every tensor that changed."""
    planned = []
    for name in pair.changed:
        tensor = pair.tuned.tensors[name]
        # fp32 would lose what F64 tensors differ by.
        dtype = "F64" if stored_dtype == "F32" and tensor.dtype == "F64" else stored_dtype
        planned.append(PlannedTensor(name, dtype, tensor.shape, pair.aligned[name], DIFFERENCE[tensor.dtype]))
    return planned


def _vector_record(pair: ModelPair, stored_dtype: str) -> dict[str, Any]:
    """Return the manifest's entry of the vector."""
    # With `zero` and `left_out` an application distinguishes a delta of zero from a tensor never compared.
    return {"format": FORMAT, "dtype": stored_dtype, "zero": pair.unchanged, "left_out": pair.left_out}


def _with_norms(report: ExtractReport, pair: ModelPair, result: ExecutionResult) -> ExtractReport:
    norm, base_norm = math.sqrt(result.total("squares")), math.sqrt(result.total("base_squares"))
    return replace(
        report,
        norm=norm,
        relative=norm / base_norm if base_norm else math.inf,
        inexact=int(result.total("missed")),
        elements=sum(pair.tuned.tensors[name].n_elements for name in pair.changed),
    )


def _card(report: ExtractReport, stored_dtype: str) -> CardContent:
    method = (
        f"The task vector θ_tuned − θ_base (arXiv:2509.01363) of {report.tensors} tensors, stored as {stored_dtype}; "
        f"‖v‖ = {report.norm:.4g}, {report.relative:.3%} of ‖θ_base‖. It is no model: "
        "`surgery vector apply` adds it to one."
    )
    return CardContent("Task vector", method, ("task-vector",))
