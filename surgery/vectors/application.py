"""Add a task vector to a model: θ_target + α·(m ⊙ v), with v from disk or the difference of two models.

After arXiv 2509.01363, whose vectors are θ_GRPO − θ_SFT. One deviation: everything is computed in fp32 (fp64 for F64
tensors) and rounded once, where scripts that add checkpoints in bf16 round at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.reader import TensorInput
from surgery.engine.card import CardContent
from surgery.engine.checkpoint_writer import OutputDescription, check_destination, write_checkpoint
from surgery.engine.edit_report import EditReport, build_edit_report, edit_table, write_config_dtype
from surgery.engine.manifest import command_record
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, PlannedTensor, copy_tensor, plan_files
from surgery.engine.preflight import Preflight, check_ancestor, check_configs, check_quantised
from surgery.engine.result import ExecutionResult
from surgery.engine.unshared import UnsharedChoice
from surgery.io.escaping import markdown_text
from surgery.vectors.align import Alignment, VectorSettings, aligned_model, check_and_align
from surgery.vectors.choices import VocabPolicy
from surgery.vectors.selection import TensorSelection
from surgery.vectors.task_vector import VectorInput, model_difference, open_vector, stored_vector
from surgery.vectors.tied_heads import with_target_heads


def apply(
    vector: str,
    target: str,
    out: Path,
    *,
    scale: float = 1.0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    scale_for: Mapping[str, float] | None = None,
    vocab: VocabPolicy = "strict",
    dtype: str | None = None,
    allow_unrelated: bool = False,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    dequantise: bool = False,
    dry_run: bool = False,
    options: ExecutionOptions = ExecutionOptions(),
) -> EditReport:
    """Write θ_target + α·(m ⊙ v) to the folder `out` (arXiv 2509.01363, equation 2).

    Example:
        surgery.apply("reasoning", "lab:instruct", Path("OUT"), scale=0.5)

    Args:
        vector: a folder that `extract` wrote.
        scale: α; negative values subtract.
        include, exclude: globs over tensor names: m is 1 for the tensors they select, 0 elsewhere.
        scale_for: glob → α for the tensors that it matches; of several matches the last one counts.
        vocab: what to do where the tokenizers differ; see `surgery.vectors.align`.
        dtype: torch's name of the dtype to store float tensors in; None keeps each tensor's own.
        allow_unrelated: add the vector even to a target of another ancestry.
        keep: globs over names of tensors that only the target has: they stay as they are.
        drop: globs over names: OUT does not get these tensors, nor updates of those that the target lacks.
        dequantise: see models in FP8 with scales, or in MXFP4, as bf16; so is then what is written.
        dry_run: stop after the checks; nothing is written.

    Raises:
        SurgeryError: vector and target do not fit; `out` exists; NaN or infinite values came out; the disk is full.
    """
    opened = open_vector(vector)
    selection = TensorSelection(scale, tuple(include), tuple(exclude), scale_for or {})
    unshared = UnsharedChoice(tuple(keep), tuple(drop))
    settings = VectorSettings(selection, vocab, dtype, allow_unrelated, unshared, dequantise)
    command = command_record("vector apply", [vector, target], **settings.options)
    return _add(stored_vector(opened), target, out, settings, command, dry_run=dry_run, options=options)


def transfer(
    tuned: str,
    base: str,
    target: str,
    out: Path,
    *,
    scale: float = 1.0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    scale_for: Mapping[str, float] | None = None,
    vocab: VocabPolicy = "strict",
    dtype: str | None = None,
    allow_unrelated: bool = False,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    dequantise: bool = False,
    dry_run: bool = False,
    options: ExecutionOptions = ExecutionOptions(),
) -> EditReport:
    """Write θ_target + α·m ⊙ (θ_tuned − θ_base) to `out` in one pass, with no vector on disk.

    The bytes are those that `extract` in float32 and then `apply` give. Arguments and errors as in `apply`.

    Example:
        surgery.transfer("lab:grpo", "lab:sft", "lab:instruct", Path("OUT"), exclude=["*embed*"])
    """
    selection = TensorSelection(scale, tuple(include), tuple(exclude), scale_for or {})
    unshared = UnsharedChoice(tuple(keep), tuple(drop))
    settings = VectorSettings(selection, vocab, dtype, allow_unrelated, unshared, dequantise)
    command = command_record("vector transfer", [tuned, base, target], **settings.options)
    difference = model_difference(settings.open(tuned), settings.open(base))
    return _add(difference, target, out, settings, command, dry_run=dry_run, options=options)


def _add(
    vector: VectorInput,
    target: str,
    out: Path,
    settings: VectorSettings,
    command: Mapping[str, Any],
    *,
    dry_run: bool,
    options: ExecutionOptions,
) -> EditReport:
    opened, preflight = settings.open(target), Preflight()
    check_destination(out, {"target": opened, **vector.checkpoints}, options, dry_run=dry_run)
    base, aligned, vector = fit_vector(preflight, opened, vector, settings, command=str(command["name"]))
    donors = vector.checkpoints
    sources = {"target": base, **donors}
    # Last of the checks: it reads values from every matrix of the target.
    check_ancestor(preflight, base, vector.read_sketch(), allow_unrelated=settings.allow_unrelated)
    planned = _plan_tensors(base, vector, aligned, settings)
    edited = [tensor.name for tensor in planned if tensor.kernel is vector.kernel]
    # Counted by the kernel, not by whether there is one: copies to another dtype have the identity kernel.
    if not edited:
        preflight.errors.add("nothing to do: every scale is 0, or the vector is zero where the mask lets it through.")
    plan = Plan(command, sources, plan_files(planned, like=base), base.side_files)
    preview = EditReport(out, preflight.facts, preflight.warnings, len(edited), len(planned), dry_run=dry_run)

    def describe(folder: Path, result: ExecutionResult) -> OutputDescription[EditReport]:
        report = build_edit_report(preview, base, edited, result)
        if settings.stored_dtype:
            write_config_dtype(folder, settings.stored_dtype)
        return OutputDescription(report, report.summary(), _card(report, settings.selection.scale, donors, base))

    return write_checkpoint(
        plan, out, options, describe=describe, preflight=preflight, dry_run_report=preview if dry_run else None
    )


def fit_vector(
    preflight: Preflight,
    target: Checkpoint,
    vector: VectorInput,
    settings: VectorSettings,
    *,
    command: str,
    can_dequantise: bool = True,
) -> tuple[Checkpoint, Alignment, VectorInput]:
    """Check that a vector fits a target; return the target as it is seen, its inputs, and the vector as it is seen.

    Args:
        can_dequantise: whether the command has the option that messages recommend.

    Raises:
        SurgeryError: they do not fit, or `preflight` has errors.
    """
    # Before their layouts are looked at: codes have shapes of their own.
    check_quantised(preflight, [target, *vector.checkpoints.values()], has_option=can_dequantise)
    preflight.errors.raise_if_any(command)
    configs = [(donor.ref, donor.config) for donor in vector.checkpoints.values()]
    vector = vector.in_layout_of(target, preflight)
    donors = vector.checkpoints
    check_configs(preflight, target, configs)
    preflight.errors.raise_if_any(command)
    names = [name for model in (target, *donors.values()) for name in model.float_names()]
    target, vector = with_target_heads(preflight, target, vector, settings)
    models = list(vector.models.values())
    aligned = check_and_align(
        preflight, aligned_model(target), models, settings, command=command, zero=vector.zero, names=names
    )
    return target, aligned, vector


def _plan_tensors(
    base: Checkpoint, vector: VectorInput, aligned: Alignment, settings: VectorSettings
) -> list[PlannedTensor]:
    """Plan every tensor of `base` that OUT gets: through the vector's kernel where it has an update, else as a copy."""
    planned = []
    for name, tensor in base.tensors.items():
        if name in aligned.dropped:
            continue
        alpha = settings.selection.scale_of(name)
        # α = 0 keeps the tensor's bytes: through the kernel −0 and NaN payloads could change.
        if name in aligned.inputs and alpha != 0:
            dtype = settings.stored_dtype or tensor.dtype
            inputs = (TensorInput(tensor), *aligned.inputs[name])
            planned.append(PlannedTensor(name, dtype, tensor.shape, inputs, vector.kernel, {"scale": alpha}))
        else:
            planned.append(copy_tensor(tensor, dtype=settings.stored_dtype))
    return planned


def _card(report: EditReport, scale: float, donors: Mapping[str, Checkpoint], target: Checkpoint) -> CardContent:
    names = " − ".join(markdown_text(checkpoint.repo_id or checkpoint.ref) for checkpoint in donors.values())
    method = (
        f"{markdown_text(target.repo_id or target.ref)} + {scale:g} · ({names}), added on the weights (task vector, "
        f"arXiv:2509.01363): {report.edited} of {report.tensors} tensors changed. {report.delivered_fraction:.2%} of "
        "the non-zero updates change the stored value; the rest is lost to the rounding of the stored dtype."
    )
    return CardContent(
        "Model with a task vector added", method, ("task-vector", "merge"), edit_table(report).to_markdown()
    )
