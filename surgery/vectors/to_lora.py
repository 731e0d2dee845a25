"""Extract a task vector as a PEFT LoRA adapter: the best rank-r approximation, by SVD, of each matrix of v.

v ≈ B·A with B = U_r·√S_r, A = √S_r·V_rᵀ (Eckart–Young). The residual is always reported: what the rank cuts off, and
what an adapter cannot hold (norms, biases, embeddings, experts that transformers fuses in memory).
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.checkpoint.adapters.adapter_weights import PREFIX, WEIGHTS
from surgery.checkpoint.checkpoint import ADAPTER_CONFIG, Checkpoint
from surgery.checkpoint.reader import TensorInput
from surgery.checkpoint.structure import model_structure
from surgery.engine.card import CardContent
from surgery.engine.checkpoint_writer import OutputDescription, write_checkpoint
from surgery.engine.kernel import Kernel, Sums
from surgery.engine.manifest import command_record
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, PlannedTensor, plan_files
from surgery.engine.reduce import reduce_tensors
from surgery.engine.result import ExecutionResult
from surgery.engine.unshared import UnsharedChoice
from surgery.errors import SurgeryError, usage_error
from surgery.io.output_files import write_output
from surgery.reporting.report import Column, Table
from surgery.vectors.align import VectorSettings
from surgery.vectors.extraction import COMMAND, prepare_extraction
from surgery.vectors.selection import TensorSelection

# Columns beyond the rank, at least 16 and at least half of it, and power iterations. The spectra of RL deltas fall
# slowly, so more than the usual 2 are needed: with these the error is within 2e-4 of the best where singular values
# fall as i^-0.3 (6 iterations and 16 columns: 7e-3 at rank 128).
OVERSAMPLING = 16
POWER_ITERATIONS = 8


@dataclass(frozen=True)
class AdapterReport:
    """What `extract_adapter` wrote.

    residual: ‖v − BA‖/‖v‖ over the whole model. of_matrices: the same over the matrices in the adapter. rest: names of
    the changed tensors that an adapter cannot hold.
    """

    out: Path
    preflight: Mapping[str, str]
    warnings: Sequence[str]
    rank: int
    matrices: int
    rest: Sequence[str]
    residual: float = math.nan
    of_matrices: float = math.nan
    dry_run: bool = False

    def summary(self) -> dict[str, Any]:
        """Return what the manifest records."""
        return {
            "rank": self.rank,
            "residual": self.residual,
            "residual_of_matrices": self.of_matrices,
            "rest": self.rest,
        }

    def table(self) -> Table:
        """Return the residual as a table."""
        return Table(
            f"Adapter of rank {self.rank}",
            [Column("tensors"), Column("number", "count"), Column("‖v − BA‖/‖v‖", "percent")],
            [
                ("matrices in the adapter", self.matrices, self.of_matrices),
                ("moved, but beyond an adapter", len(self.rest), 1.0 if self.rest else 0.0),
                ("whole vector", self.matrices + len(self.rest), self.residual),
            ],
            note="The residual is what the tuned model has and base + adapter lacks.",
        )


def extract_adapter(
    tuned: str,
    base: str,
    out: Path,
    *,
    rank: int,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_unrelated: bool = False,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    dequantise: bool = False,
    dry_run: bool = False,
    options: ExecutionOptions = ExecutionOptions(),
) -> AdapterReport:
    """Write the best approximation of θ_tuned − θ_base of this rank as a PEFT LoRA adapter; arguments as in `extract`.

    Example:
        surgery.extract_adapter("lab:grpo", "lab:sft", Path("adapter"), rank=8)

    Raises:
        SurgeryError: the models do not fit each other or do not differ in any matrix; `out` exists.
    """
    if rank < 1:
        raise usage_error(f"got {rank}, expected 1 or more", where="--rank")
    selection = TensorSelection(include=tuple(include), exclude=tuple(exclude))
    unshared = UnsharedChoice(tuple(keep), tuple(drop))
    settings = VectorSettings(selection, allow_unrelated=allow_unrelated, unshared=unshared, dequantise=dequantise)
    # An adapter names the modules of its base.
    pair = prepare_extraction(tuned, base, out, settings, dry_run=dry_run, options=options, layout_of="base")
    matrices, rest, transposed = _split(pair.changed, pair.base)
    if not matrices:
        raise SurgeryError("no matrix differs, so there is nothing for an adapter to hold", where=tuned)
    command = command_record(COMMAND, [tuned, base], rank=rank, **settings.globs, **settings.input_options)
    planned = [
        tensor
        for name in matrices
        for tensor in _factors(name, pair.base.tensors[name].shape, pair.aligned[name], rank, transposed)
    ]
    # PEFT reads an adapter from one file, however large.
    files = plan_files(planned, stem=WEIGHTS.removesuffix(".safetensors"), shard_bytes=1 << 62)
    plan = Plan(command, pair.sources, files)
    facts, warnings = pair.preflight.facts, pair.preflight.warnings
    preview = AdapterReport(out, facts, warnings, rank, len(matrices), rest, dry_run=dry_run)

    def describe(folder: Path, result: ExecutionResult) -> OutputDescription[AdapterReport]:
        report = _with_residual(preview, result, matrices, pair.aligned, options)
        config = _config(pair.base, matrices, rank, transposed)
        write_output(folder, ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
        return OutputDescription(report, report.summary(), _card(report), kind="adapter")

    return write_checkpoint(
        plan,
        out,
        options,
        describe=describe,
        preflight=pair.preflight,
        dry_run_report=preview if dry_run else None,
        writes=(ADAPTER_CONFIG,),
    )


def _card(report: AdapterReport) -> CardContent:
    method = (
        f"θ_tuned − θ_base (arXiv:2509.01363) as a LoRA adapter of rank {report.rank} by SVD. It leaves out "
        f"{report.residual:.2%} of the vector's norm."
    )
    return CardContent("Task vector as a LoRA adapter", method, ("task-vector", "lora", "peft"))


def low_rank(tensors: Sequence[Tensor], *, rank: int, seed: int, transposed: bool) -> tuple[Tensor, Tensor]:
    """Return (A, B) with B·A the best rank-r approximation of v = θ_tuned − θ_base (of vᵀ where `transposed`).

    tuned, base: (out, in) → A: (r, in), B: (out, r). Randomised subspace iteration (arXiv 0909.4061, algorithm 4.4),
    exact where the rank plus its oversampling covers the smaller side.
    """
    tuned, base = tensors
    v = (tuned - base).T if transposed else tuned - base
    width = min(rank + max(OVERSAMPLING, rank // 2), *v.shape)
    generator = torch.Generator(v.device).manual_seed(seed)
    basis = torch.linalg.qr(v @ torch.randn(v.shape[1], width, generator=generator, device=v.device, dtype=v.dtype)).Q
    # A basis of full width spans everything already: iterating could only add rounding.
    if width < min(v.shape):
        for _ in range(POWER_ITERATIONS):
            basis = torch.linalg.qr(v @ torch.linalg.qr(v.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ v, full_matrices=False)
    # √S on both sides: neither factor outgrows a 16-bit dtype that the adapter may be cast to.
    root = s[:rank].sqrt()
    return (root[:, None] * vh[:rank]).contiguous(), ((basis @ u[:, :rank]) * root).contiguous()


def measure_low_rank(tensors: Sequence[Tensor], stored: Tensor, *, rank: int, seed: int, transposed: bool) -> Sums:
    """Return Σv², and Σ(v − v·V·Vᵀ)² where `stored` is A, whose rows are V's directions: what the factors lose.

    The difference is taken before it is squared: Σv² − ΣS² would drown a small residual in rounding.
    """
    tuned, base = tensors
    v = (tuned - base).T if transposed else tuned - base
    squares = (v * v).sum(dtype=torch.float64)
    if stored.shape[1] != v.shape[1]:  # B, which would give the same sum again
        return squares, torch.zeros_like(squares)
    directions = torch.nn.functional.normalize(stored, eps=torch.finfo(stored.dtype).tiny)
    lost = v - (v @ directions.T) @ directions
    return squares, (lost * lost).sum(dtype=torch.float64)


LOW_RANK = Kernel("low_rank", low_rank, "whole", ("squares_v", "lost"), measure_low_rank)


def _split(changed: Sequence[str], model: Checkpoint) -> tuple[list[str], list[str], bool]:
    """Return the matrices that LoRA can hold, the other names, and whether matrices are stored (in, out)."""
    structure = model_structure(model)
    if structure.stack is not None and "." not in structure.stack:
        raise SurgeryError(
            f'names its layers "{structure.stack}.0…", without the component under which transformers loads them, '
            "so an adapter could not name them",
            where=model.ref,
            hint="Save it once with transformers 5 (from_pretrained, save_pretrained) and extract from that.",
        )
    experts = {name for layer in structure.experts.values() for name in layer.names}
    # Some routers are modules that PEFT cannot wrap. It also takes every module that has the name of an expert's part
    # (a dense layer's or shared expert's gate_proj) for one of the fused experts, and would drop its factors silently.
    routers = {name for layer in structure.experts.values() for name in layer.routers}
    expert_modules = {_module(name) for name in experts}
    outside = experts | routers | set(structure.token_embeddings) | set(structure.lm_heads)
    matrices = [
        name
        for name in changed
        if name.endswith(".weight")
        and len(model.tensors[name].shape) == 2
        and structure.layer_of(name) is not None
        and name not in outside
        and _module(name) not in expert_modules
    ]
    transposed = any(heads.transposed for heads in structure.output_projections.values())
    return matrices, [name for name in changed if name not in set(matrices)], transposed


def _module(name: str) -> str:
    """Return the last component of a weight's module: "gate_proj" of model.layers.0.mlp.gate_proj.weight."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _factors(
    name: str, shape: tuple[int, ...], inputs: tuple[TensorInput, ...], rank: int, transposed: bool
) -> list[PlannedTensor]:
    rows, columns = shape[::-1] if transposed else shape
    # A matrix smaller than the rank has that many directions at most; `_config` records its rank apart.
    actual_rank = min(rank, rows, columns)
    # A seed per tensor name: bytes depend neither on the order of tensors nor on which of them are included.
    params = {"rank": rank, "seed": zlib.crc32(name.encode()), "transposed": transposed}
    module = PREFIX + name.removesuffix(".weight")
    return [
        PlannedTensor(f"{module}.lora_A.weight", "F32", (actual_rank, columns), inputs, LOW_RANK, params, part=0),
        PlannedTensor(f"{module}.lora_B.weight", "F32", (rows, actual_rank), inputs, LOW_RANK, params, part=1),
    ]


def _with_residual(
    report: AdapterReport,
    result: ExecutionResult,
    matrices: Sequence[str],
    aligned: Mapping[str, tuple[TensorInput, ...]],
    options: ExecutionOptions,
) -> AdapterReport:
    keys = [f"{PREFIX}{name.removesuffix('.weight')}.lora_A.weight" for name in matrices]
    squares = math.fsum(result.sums[key]["squares_v"] for key in keys)
    lost = math.fsum(result.sums[key]["lost"] for key in keys)
    rest = reduce_tensors(
        {name: [source.tensor for source in aligned[name]] for name in report.rest},
        lambda pair: (torch.dot(pair[0] - pair[1], pair[0] - pair[1]),),
        label="Measuring the residual",
        threads=options.threads,
    )
    # In full: the adapter has nothing of these tensors.
    beyond = math.fsum(values[0] for values in rest.values() if values)
    return replace(
        report,
        of_matrices=math.sqrt(lost / squares) if squares else 0.0,
        residual=math.sqrt((lost + beyond) / (squares + beyond)),
    )


def _config(model: Checkpoint, matrices: Sequence[str], rank: int, transposed: bool) -> dict[str, object]:
    """Return adapter_config.json as PEFT reads it; lora_alpha = r makes the scale 1."""
    # PEFT scales by alpha / r, so both patterns need the smaller rank for the scale to stay 1.
    smaller = {
        name.removesuffix(".weight"): min(model.tensors[name].shape)
        for name in matrices
        if min(model.tensors[name].shape) < rank
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.repo_id or str((model.folder or Path(model.ref)).resolve()),
        "revision": model.revision,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": [name.removesuffix(".weight") for name in matrices],
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "inference_mode": True,
    }
