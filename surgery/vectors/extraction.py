"""Taking a task vector out of a pair of models: v = θ_tuned − θ_base (arXiv 2509.01363, equation 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.dtypes import dtype_name
from surgery.checkpoint.reader import SourceFiles, TensorInput, TensorReader, segments
from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.card import CardContent
from surgery.engine.checkpoint_writer import OutputDescription, check_destination, write_checkpoint
from surgery.engine.manifest import command_record
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, PlannedTensor, plan_files
from surgery.engine.preflight import Preflight, check_ancestor, check_config, check_quantised, sketch
from surgery.engine.result import ExecutionResult
from surgery.engine.workers import run_shared
from surgery.errors import SurgeryError
from surgery.reporting.report import Column, Table
from surgery.vectors.align import VocabPolicy, align_tensors, aligned_model, check_policy
from surgery.vectors.application import DONOR, FORMAT, SKETCH, STEM
from surgery.vectors.kernels import DIFFERENCE
from surgery.vectors.masks import Mask


@dataclass(frozen=True)
class ExtractReport:
    """What `extract` found. `norm` is ‖v‖, `relative` is ‖v‖/‖θ_base‖ over the tensors that moved."""

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
        """The vector in numbers."""
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
    dry_run: bool = False,
    options: ExecutionOptions = ExecutionOptions(),
) -> ExtractReport:
    """Writes v = θ_tuned − θ_base to the folder `out` (arXiv 2509.01363, equation 1).

    Args:
        dtype: what v is stored in: float32, float64, bfloat16 or float16. F64 tensors keep F64 under float32, which
            restores a 16-bit model bit for bit (but for values 2¹⁶ times smaller than they were). Of F32 tensors
            some elements come back an ulp off, since fp32 cannot hold every difference of two fp32 numbers: float64
            can. The report counts what does not come back.
        include, exclude: globs over tensor names.
        vocab: what to do where the two tokenizers differ; see `surgery.vectors.align`.
        dry_run: stop after the checks; nothing is written.

    Raises:
        SurgeryError: the models do not fit each other, or do not differ; `out` exists; the disk is full.
    """
    stored_as = dtype_name(dtype)
    preparation = prepare_extraction(
        "vector extract",
        tuned,
        base,
        out,
        include=include,
        exclude=exclude,
        vocab=vocab,
        allow_unrelated=allow_unrelated,
        dry_run=dry_run,
        options=options,
    )
    sources, fitted, moved = preparation.sources, preparation.fitted, preparation.moved
    kernel_tensors = [
        PlannedTensor(
            name,
            "F64" if stored_as == "F32" and sources["tuned"].tensors[name].dtype == "F64" else stored_as,
            sources["tuned"].tensors[name].shape,
            fitted[name],
            DIFFERENCE[sources["tuned"].tensors[name].dtype],
        )
        for name in moved
    ]
    zero = sorted(set(fitted) - set(moved))
    left_out = sorted(
        name for name, tensor in sources["tuned"].tensors.items() if tensor.is_float and name not in fitted
    )
    command = command_record(
        "vector extract", [tuned, base], dtype=dtype, include=include, exclude=exclude, vocab=vocab
    )
    plan = Plan(
        command,
        sources,
        plan_files(kernel_tensors, stem=STEM),
        {f"{DONOR}/{path.name}": path for path in sources["tuned"].side_files},
        index_name=f"{STEM}.safetensors.index.json",
    )
    facts, warnings = preparation.preflight.facts, preparation.preflight.warnings
    preview = ExtractReport(out, facts, warnings, len(moved), len(zero), dry_run=dry_run)

    def describe(folder: Path, result: ExecutionResult) -> OutputDescription[ExtractReport]:
        norm, base_norm = math.sqrt(result.total("squares")), math.sqrt(result.total("base_squares"))
        report = replace(
            preview,
            norm=norm,
            relative=norm / base_norm if base_norm else math.inf,
            inexact=int(result.total("missed")),
            elements=sum(sources["tuned"].tensors[name].n_elements for name in moved),
        )
        (folder / DONOR).mkdir(exist_ok=True)
        save_file(dict(preparation.sketch), folder / DONOR / SKETCH)
        vector = {"format": FORMAT, "dtype": stored_as, "zero": zero, "left_out": left_out}
        return OutputDescription(
            report, report.summary(), _card(report, stored_as), kind="vector", fields={"vector": vector}
        )

    return write_checkpoint(
        plan,
        out,
        options,
        describe=describe,
        preflight=preparation.preflight,
        dry_run_report=preview if dry_run else None,
    )


def _card(report: ExtractReport, stored_as: str) -> CardContent:
    method = (
        f"The task vector θ_tuned − θ_base (arXiv:2509.01363) of {report.tensors} tensors, stored as {stored_as}; "
        f"‖v‖ = {report.norm:.4g}, {report.relative:.3%} of ‖θ_base‖. It is no model: "
        "`surgery vector apply` adds it to one."
    )
    return CardContent("Task vector", method, ("task-vector",))


@dataclass(frozen=True)
class Extraction:
    """Two models found fit for each other: what each tensor of v is made of, and which of them are not zero."""

    name: str
    preflight: Preflight
    sources: Mapping[str, Checkpoint]
    fitted: Mapping[str, tuple[TensorInput, ...]]
    moved: Sequence[str]
    sketch: Mapping[str, torch.Tensor]


def prepare_extraction(
    name: str,
    tuned: str,
    base: str,
    out: Path,
    *,
    include: Sequence[str],
    exclude: Sequence[str],
    vocab: VocabPolicy,
    allow_unrelated: bool,
    dry_run: bool,
    options: ExecutionOptions,
) -> Extraction:
    """Everything that is checked before v = θ_tuned − θ_base is written, in whatever form. Raises SurgeryError."""
    check_policy(vocab)
    mask = Mask(include=tuple(include), exclude=tuple(exclude))
    sources = {"tuned": open_checkpoint(tuned), "base": open_checkpoint(base)}
    check_destination(out, sources, options, dry_run=dry_run)
    preflight = Preflight()
    check_config(preflight, sources["tuned"], sources["base"].config, base)
    preflight.errors.raise_if_any(name)
    check_quantised(preflight, sources.values())
    mask.check(sorted({*sources["tuned"].float_names(), *sources["base"].float_names()}))
    sides = [aligned_model(sources["tuned"]), aligned_model(sources["base"])]
    fitted = align_tensors(preflight, sides[0], sides, mask, vocab)
    preflight.errors.raise_if_any(name)
    base_sketch = sketch(sources["base"])
    check_ancestor(preflight, sources["tuned"], base_sketch, allow_unrelated=allow_unrelated)
    preflight.errors.raise_if_any(name)
    moved = _moved(fitted, options)
    if not moved:
        raise SurgeryError(f"no tensor differs from {base}: the vector would be empty", where=tuned)
    return Extraction(name, preflight, sources, fitted, moved, base_sketch)


def _moved(fitted: Mapping[str, tuple[TensorInput, ...]], options: ExecutionOptions) -> list[str]:
    """The names whose two inputs differ somewhere; reading stops at a tensor's first difference."""
    files = {path for inputs in fitted.values() for source in inputs for path in source.tensor.files}

    def differs(name: str, reader: TensorReader) -> tuple[str, bool]:
        tuned, base = fitted[name]
        for begin, end in segments(math.prod(tuned.shape)):
            a = reader.values(tuned, begin, end, "tuned")
            b = reader.values(base, begin, end, "base")
            if bool((a.to(torch.float64) - b.to(torch.float64)).bool().any()):
                return name, True
        return name, False

    with SourceFiles(files) as opened, options.progress("Comparing", len(fitted), "steps") as advance:
        moved = set()
        for name, moves in run_shared(list(fitted), differs, opened, threads=options.threads):
            advance(1)
            if moves:
                moved.add(name)
    return [name for name in fitted if name in moved]
