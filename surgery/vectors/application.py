"""Task vectors: v = θ_tuned − θ_base out of one pair of models, and θ_target + α·(m ⊙ v) into another.

After arXiv 2509.01363, whose vectors are θ_GRPO − θ_SFT. One deviation: everything is computed in fp32 (fp64 for F64
tensors) and rounded once, where scripts that add checkpoints in bf16 round at every step.

A vector on disk is a folder: `vector.safetensors` (or shards with an index) with one delta per tensor, fp32 unless
asked otherwise; tensors whose delta is zero are not stored but listed; `surgery.json` with the format's version, that
list, and the hashes of both donors; `donor/` with the tuned model's config and tokenizer, and a sketch of its base, by
which a target's ancestry is judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.dtypes import dtype_name
from surgery.checkpoint.reader import TensorInput
from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.card import CardContent
from surgery.engine.checkpoint_writer import OutputDescription, check_destination, write_checkpoint
from surgery.engine.edit_report import EditReport, edit_report, edit_table, write_config_dtype
from surgery.engine.kernel import Kernel
from surgery.engine.manifest import command_record, read_manifest
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, PlannedTensor, copy_tensor, plan_files
from surgery.engine.preflight import (
    Preflight,
    check_ancestor,
    check_config,
    check_quantised,
    sketch,
)
from surgery.engine.result import ExecutionResult
from surgery.errors import usage_error
from surgery.io.atomic import MANIFEST
from surgery.io.json_io import read_json
from surgery.vectors.align import AlignedModel, VocabPolicy, align_tensors, aligned_model, check_policy
from surgery.vectors.kernels import ADD_DIFFERENCE, ADD_VECTOR
from surgery.vectors.masks import Mask

FORMAT = 1
STEM = "vector"
DONOR = "donor"
SKETCH = "sketch.safetensors"


@dataclass(frozen=True)
class TaskVector:
    """A task vector on disk. `zero` are the tensors whose delta is zero; `donor` holds the tuned model's side files."""

    checkpoint: Checkpoint
    zero: frozenset[str]
    donor: Path
    manifest: Mapping[str, Any]

    @property
    def ref(self) -> str:
        return self.checkpoint.ref


def open_vector(ref: str | Path) -> TaskVector:
    """Opens a vector folder. Raises SurgeryError where `ref` is something else."""
    folder = Path(ref).expanduser()
    if not folder.is_dir():
        raise usage_error("no such vector folder", where=ref, hint="`surgery vector extract` writes one.")
    if not (folder / MANIFEST).is_file():
        raise usage_error(
            "is not a vector: it has no surgery.json",
            where=ref,
            hint="To use the difference of two models at once, give both to `surgery vector transfer`.",
        )
    manifest = read_manifest(folder)
    if manifest.get("kind") != "vector" or manifest.get("vector", {}).get("format") != FORMAT:
        raise usage_error(f"holds a {manifest.get('kind')}, expected a vector of format {FORMAT}", where=ref)
    # The donor's config lies apart, or tools would take the folder for a model.
    config = read_json(folder / DONOR / "config.json", missing={})
    checkpoint = replace(open_checkpoint(folder), ref=str(ref), config=config)
    return TaskVector(checkpoint, frozenset(manifest["vector"]["zero"]), folder / DONOR, manifest)


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
    dry_run: bool = False,
    options: ExecutionOptions = ExecutionOptions(),
) -> EditReport:
    """Writes θ_target + α·(m ⊙ v) to the folder `out` (arXiv 2509.01363, equation 2).

    Args:
        vector: a folder that `extract` wrote.
        scale: α; negative subtracts.
        include, exclude: globs over tensor names: m is 1 where they let a tensor through, 0 elsewhere.
        scale_for: glob → α for the tensors it matches; the last match counts.
        vocab: what to do where the tokenizers differ; see `surgery.vectors.align`.
        dtype: float32 and the like stores the float tensors so; None keeps each tensor's own.
        dry_run: stop after the checks; nothing is written.

    Raises:
        SurgeryError: vector and target do not fit; `out` exists; NaN or infinite values came out; the disk is full.
    """
    opened = open_vector(vector)
    mask = Mask(scale, tuple(include), tuple(exclude), scale_for or {})
    command = command_record("vector apply", [vector, target], vocab=vocab, dtype=dtype, **_mask_options(mask))
    donor_sketch = load_file(opened.donor / SKETCH)
    return _add(
        command,
        {"vector": opened.checkpoint},
        [AlignedModel(opened.checkpoint, opened.donor)],
        ADD_VECTOR,
        target,
        out,
        mask,
        donor_config=opened.checkpoint.config,
        donor_sketch=donor_sketch,
        zero=opened.zero,
        vocab=vocab,
        dtype=dtype,
        allow_unrelated=allow_unrelated,
        dry_run=dry_run,
        options=options,
    )


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
    dry_run: bool = False,
    options: ExecutionOptions = ExecutionOptions(),
) -> EditReport:
    """Writes θ_target + α·m ⊙ (θ_tuned − θ_base) to `out` in one pass, with no vector on disk.

    Bit for bit what `extract` in float32 and then `apply` give. Arguments and errors as in `apply`.
    """
    mask = Mask(scale, tuple(include), tuple(exclude), scale_for or {})
    command = command_record("vector transfer", [tuned, base, target], vocab=vocab, dtype=dtype, **_mask_options(mask))
    donors = {"tuned": open_checkpoint(tuned), "base": open_checkpoint(base)}
    return _add(
        command,
        donors,
        [aligned_model(donors["tuned"]), aligned_model(donors["base"])],
        ADD_DIFFERENCE,
        target,
        out,
        mask,
        donor_config=donors["base"].config,
        donor_sketch=None,
        zero=(),
        vocab=vocab,
        dtype=dtype,
        allow_unrelated=allow_unrelated,
        dry_run=dry_run,
        options=options,
    )


def _add(
    command: Mapping[str, Any],
    donors: Mapping[str, Checkpoint],
    sides: Sequence[AlignedModel],
    kernel: Kernel,
    target: str,
    out: Path,
    mask: Mask,
    *,
    donor_config: Mapping[str, Any],
    donor_sketch: Mapping[str, torch.Tensor] | None,
    zero: Sequence[str] | frozenset[str],
    vocab: VocabPolicy,
    dtype: str | None,
    allow_unrelated: bool,
    dry_run: bool,
    options: ExecutionOptions,
) -> EditReport:
    check_policy(vocab)
    stored_as = dtype_name(dtype) if dtype else None
    base = open_checkpoint(target)
    sources = {"target": base, **donors}
    check_destination(out, sources, options, dry_run=dry_run)
    preflight = Preflight()
    check_config(preflight, base, donor_config, next(iter(donors.values())).ref)
    preflight.errors.raise_if_any(str(command["name"]))
    check_quantised(preflight, sources.values())
    mask.check(sorted({name for checkpoint in sources.values() for name in checkpoint.float_names()}))
    fitted = align_tensors(preflight, aligned_model(base), sides, mask, vocab, zero=zero)
    preflight.errors.raise_if_any(str(command["name"]))
    check_ancestor(
        preflight,
        base,
        sketch(donors["base"]) if donor_sketch is None else donor_sketch,
        allow_unrelated=allow_unrelated,
    )
    planned = []
    for name, tensor in base.tensors.items():
        alpha = mask.scale_of(name)
        if name in fitted and alpha != 0:
            inputs = (TensorInput(tensor), *fitted[name])
            planned.append(
                PlannedTensor(name, stored_as or tensor.dtype, tensor.shape, inputs, kernel, {"scale": alpha})
            )
        else:
            planned.append(copy_tensor(tensor, dtype=stored_as))
    side_files = {path.name: path for path in base.side_files}
    plan = Plan(command, sources, plan_files(planned, like=base), side_files)
    edited = [tensor.name for tensor in planned if tensor.kernel is kernel]
    if not edited:
        preflight.errors.add("nothing to do: every scale is 0, or the vector is zero where the mask lets it through.")
    preview = EditReport(out, preflight.facts, preflight.warnings, len(edited), len(planned), dry_run=dry_run)

    def describe(folder: Path, result: ExecutionResult) -> OutputDescription[EditReport]:
        report = edit_report(preview, base, edited, result)
        if stored_as:
            write_config_dtype(folder, stored_as)
        return OutputDescription(report, report.summary(), _edit_card(report, mask, donors, base))

    return write_checkpoint(
        plan, out, options, describe=describe, preflight=preflight, dry_run_report=preview if dry_run else None
    )


def _edit_card(report: EditReport, mask: Mask, donors: Mapping[str, Checkpoint], target: Checkpoint) -> CardContent:
    names = " − ".join(checkpoint.repo_id or checkpoint.ref for checkpoint in donors.values())
    method = (
        f"{target.repo_id or target.ref} + {mask.scale:g} · ({names}), added on the weights (task vector, "
        f"arXiv:2509.01363): {report.edited} of {report.tensors} tensors changed. {report.delivered_fraction:.2%} of "
        "the non-zero updates change the stored value; the rest is lost to the rounding of the stored dtype."
    )
    return CardContent(
        "Model with a task vector added", method, ("task-vector", "merge"), edit_table(report).to_markdown()
    )


def _mask_options(mask: Mask) -> dict[str, Any]:
    return {
        "scale": mask.scale,
        "include": list(mask.include),
        "exclude": list(mask.exclude),
        "scale_for": dict(mask.scale_for),
    }
