"""Scale attention heads in the weights: z_h ← γ·z_h at every position, as W_h ← γ·W_h in the output projections.

After arXiv 2510.06036, which sets γ to 0 in forward passes; head outputs can also be replaced by their means. Only the
named layers' output projections (and their biases, for means) change. A head's contribution to the residual stream is
linear in its block of the output projection's columns, so the edit has the effect of a hook on that projection's input:
to the bit for γ = 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.checkpoint.checkpoint import Checkpoint, read_file
from surgery.checkpoint.reader import TensorInput
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.selectors import Head, Part, by_layer
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.checkpoint.structure import ModelStructure, model_structure
from surgery.edits.common import (
    Edit,
    EditDescription,
    Measure,
    TensorChange,
    check_indices,
    edit_options,
    record,
    require_in_layer,
    write_edit,
)
from surgery.edits.kernels import ADD_MEANS, SCALE_BLOCKS
from surgery.edits.undo_file import UndoBlocks
from surgery.engine.edit_report import EditReport
from surgery.engine.kernel import Parameter
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import PlannedTensor
from surgery.engine.preflight import Preflight, check_quantised
from surgery.errors import ErrorList, listing, usage_error

COMMAND = "edit heads"
MEANS = "means"
PAPER = "arXiv:2510.06036"
TAGS = ("attention-heads", "ablation")
TITLE = "Model with attention heads edited"


@dataclass(frozen=True)
class _Projection:
    """One output projection, (out, n·d) or transposed, with γ per head: (n,).

    bias, means: its bias, and the (n, d) means that replace the heads' outputs; None where heads are scaled.
    """

    layer: int
    weight: StoredTensor
    scales: tuple[float, ...]
    transposed: bool
    bias: StoredTensor | None = None
    means: StoredTensor | None = None

    @property
    def heads(self) -> tuple[int, ...]:
        """The heads that change, ascending."""
        return tuple(index for index, scale in enumerate(self.scales) if scale != 1)

    @property
    def changes(self) -> Iterable[TensorChange]:
        """The changes of the weight and, for means, of the bias."""
        w, b, mu = self.weight, self.bias, self.means
        scaled: dict[str, Parameter] = {"scales": self.scales, "transposed": self.transposed}
        blocks = UndoBlocks(w, self.heads, len(self.scales), self.transposed)
        yield TensorChange(PlannedTensor(w.name, w.dtype, w.shape, (TensorInput(w),), SCALE_BLOCKS, scaled), blocks)
        if b is not None and mu is not None:
            moved: dict[str, Parameter] = {"heads": self.heads, "transposed": self.transposed}
            # w as the source has it: the zeros that replace the heads' columns are only in the output.
            inputs = (TensorInput(b), TensorInput(w), TensorInput(mu))
            yield TensorChange(PlannedTensor(b.name, b.dtype, b.shape, inputs, ADD_MEANS, moved), UndoBlocks(b))


def scale_heads(
    model: str,
    out: Path,
    *,
    scales: Mapping[Head, float],
    measure: Measure | None = None,
    dry_run: bool = False,
    options: ExecutionOptions = ExecutionOptions(),
) -> EditReport:
    """Write `model` with W_O[:, h·d:(h+1)·d] ← γ·W_O[:, h·d:(h+1)·d] for every head of `scales` to the folder `out`.

    Heads are query heads: under grouped queries keys and values, which other heads share, are never touched. The
    product is taken in fp32 (fp64 for F64) and rounded once to the stored dtype; other heads' columns, and every other
    tensor, keep their bytes. `surgery.edits.undo_file.undo` restores the model.

    Example:
        from surgery.checkpoint import Head
        surgery.scale_heads("lab:cliff", Path("OUT"), scales={Head(2, 1): 0.0})

    Args:
        scales: head → γ; 0 removes the head, exactly; heads with γ = 1 are left alone.
        measure: measures the result before it is committed, for manifest and card; where it raises SurgeryError
            nothing is kept.
        dry_run: stop after the checks; nothing is written.

    Raises:
        SurgeryError: a head is not there or its layer has none that are recognised, γ is not finite, nothing would
            change, the model is quantised (all errors are listed); `out` exists; NaN or infinite values came out; the
            disk is full; `measure` rejected the result.
    """
    edit = _edit(open_checkpoint(model), scales, None)
    return write_edit(edit, out, measure=measure, dry_run=dry_run, options=options)


def mean_heads(
    model: str,
    out: Path,
    *,
    heads: Iterable[Head],
    means: Path,
    measure: Measure | None = None,
    dry_run: bool = False,
    options: ExecutionOptions = ExecutionOptions(),
) -> EditReport:
    """Write `model` with z_h ← μ_h for every head of `heads`: W_h ← 0 and b ← b + Σ_h W_h·μ_h, summed in fp64.

    Possible only where the output projection has a stored bias to add the constant to. Arguments and errors as in
    `scale_heads`; `undo` restores the model likewise.

    Args:
        means: a safetensors file with μ as `layer.{l}`, (n_heads, head_dim), for every layer l of `heads`.
    """
    edit = _edit(open_checkpoint(model), dict.fromkeys(heads, 0.0), read_file(means))
    return write_edit(edit, out, measure=measure, dry_run=dry_run, options=options)


def _edit(base: Checkpoint, scales: Mapping[Head, float], means: Checkpoint | None) -> Edit:
    if not scales:
        raise usage_error("no heads were given", where=COMMAND, hint="Name them: --head L12H7.")
    structure = model_structure(base)
    projections = _checked(base, structure, scales, means)
    # γ = 1 changes nothing, and would be listed in the card as an edited head.
    changed: dict[Part, float] = {head: scale for head, scale in scales.items() if scale != 1}
    options = edit_options(scales, Head.NOUN)
    description = EditDescription(
        TITLE,
        f"{len(changed)} attention head(s) scaled (z ← γ·z)",
        PAPER,
        "their columns of the output projections multiplied by γ",
        TAGS,
        "γ",
    )
    if means is not None:
        options = {"head": options["head"], "means": means.ref}
        description = replace(
            description,
            what=f"the outputs of {len(changed)} attention head(s) replaced by their means (z ← μ)",
            how="zeros in the output projections' columns and W·μ in their biases",
            column="output",
            label="μ",
        )
    return Edit(
        base,
        structure,
        "heads",
        changed,
        [change for projection in projections for change in projection.changes],
        description,
        record(base, COMMAND, options),
        {} if means is None else {MEANS: means},
    )


def _checked(
    base: Checkpoint, structure: ModelStructure, scales: Mapping[Head, float], means: Checkpoint | None
) -> list[_Projection]:
    """Return one projection per layer that changes. Raises SurgeryError with all errors of the request."""
    errors = ErrorList()
    quantised = Preflight()
    check_quantised(quantised, [base])
    errors.extend(quantised.errors)
    for head, scale in sorted(scales.items()):
        if not math.isfinite(scale):
            errors.add(f"{head}: got γ = {scale}, expected a finite number.", usage=True)
    if quantised.errors:
        errors.raise_if_any(COMMAND)  # such weights cannot be checked any further
    projections = [
        projection
        for layer, indices in by_layer(scales).items()
        if (projection := _projection(base, structure, layer, indices, scales, errors)) is not None
    ]
    if means is not None:
        projections = [_with_means(projection, base, means, errors) for projection in projections]
        _refuse_without_bias([projection for projection in projections if projection.bias is None], errors)
    errors.raise_if_any(COMMAND)
    # Layers in which every γ is 1 were checked like the others, but do not change.
    projections = [projection for projection in projections if projection.heads]
    if not projections:
        raise usage_error("nothing to do: every γ is 1.", where=COMMAND)
    return projections


def _projection(
    base: Checkpoint,
    structure: ModelStructure,
    layer: int,
    indices: Sequence[int],
    scales: Mapping[Head, float],
    errors: ErrorList,
) -> _Projection | None:
    """Return a layer's output projection, where it exists and the number of its heads is known."""
    named = listing((str(Head(layer, index)) for index in indices), 3)
    heads = require_in_layer(
        structure.output_projections,
        layer,
        named,
        structure,
        base.ref,
        errors,
        what="attention output projection that is recognised",
        why=" (linear attention and Mamba have none)",
    )
    if heads is None:
        return None
    # Guessing the number of heads would scale parts of several heads at once.
    n = heads.n_heads
    if n is None:
        shape = list(base.tensors[heads.name].shape)
        errors.add(
            f"{named}: neither config nor shapes say how many heads {heads.name} {shape} is cut into. "
            "Give the folder with its config.json, and num_attention_heads in it."
        )
        return None
    check_indices(Head, layer, indices, n, errors)
    per_head = tuple(scales.get(Head(layer, index), 1.0) for index in range(n))
    return _Projection(layer, base.tensors[heads.name], per_head, heads.transposed)


def _with_means(projection: _Projection, base: Checkpoint, means: Checkpoint, errors: ErrorList) -> _Projection:
    w, n = projection.weight, len(projection.scales)
    inner, outer = w.shape if projection.transposed else w.shape[::-1]
    bias = base.tensors.get(f"{w.name.removesuffix('.weight')}.bias")
    # Another shape or dtype means that it is something else than this projection's bias.
    if bias is not None and (bias.shape != (outer,) or not bias.is_float):
        bias = None
    key, expected = f"layer.{projection.layer}", (n, inner // n)
    stored = means.tensors.get(key)
    if stored is None:
        errors.add(f'{means.ref}: has no "{key}" (it has {listing(means.tensors, 3)}).', usage=True)
    elif stored.shape != expected or not stored.is_float:
        errors.add(
            f'{means.ref}: "{key}" is {stored.dtype} {list(stored.shape)}, expected floats {list(expected)}: a row per '
            "head.",
            usage=True,
        )
    return replace(projection, bias=bias, means=stored)


def _refuse_without_bias(projections: Sequence[_Projection], errors: ErrorList) -> None:
    if projections:
        names = listing((projection.weight.name for projection in projections), 3)
        errors.add(
            f"{names}: mean ablation adds a constant to the residual stream, and this projection has no bias to hold "
            "it. Use --scale 0, which needs none.",
            usage=True,
        )
