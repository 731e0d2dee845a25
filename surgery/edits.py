"""Heads scaled in the weights: z_h ← γ·z_h at every position, as W_h ← γ·W_h in the output projections.

After arXiv 2510.06036, which sets γ to 0 in forward passes. In come a model and how strongly each head is to be scaled,
or the mean outputs that take the place of theirs; out comes the model in which only the named layers' output
projections (and their biases, for means) differ, with a file that undoes it (see `surgery.undo`). What a head writes
into the residual stream is linear in its block of the output projection's columns, so that the edit does what a hook
on that projection's input does: the same to the bit for γ = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.anatomy import Anatomy, anatomy
from surgery.blocks import ADD_MEANS, SCALE_BLOCKS
from surgery.checkpoint import Checkpoint, StoredTensor, read_file
from surgery.commit import check_free
from surgery.edit import EditReport, edit_report, edit_table
from surgery.errors import FAILED, WRONG_USAGE, SurgeryError, listing, usage_error
from surgery.execute import Options, Outcome
from surgery.heads import Head, by_layer
from surgery.inspection import Heads
from surgery.manifest import Card, build_manifest, command_record, write_card, write_manifest
from surgery.plan import Parameter, Plan, PlannedTensor, check_output, copied, plan_files
from surgery.preflight import Preflight, check_quantised, check_space
from surgery.refs import open_checkpoint
from surgery.stream import Input
from surgery.undo import UNDO, Blocks, execute_judged, write_undo

COMMAND = "edit heads"
MODEL, MEANS = "model", "means"
NOT_MEASURED = "Side effects were not measured."
PAPER = "arXiv:2510.06036"


@dataclass(frozen=True)
class EditNotes:
    """What was measured of an edited model: JSON-able data for the manifest, and Markdown for the model card."""

    measured: Mapping[str, Any]
    markdown: str


Measure = Callable[[Path], EditNotes]
"""Measures the model in a folder (weights, config and tokenizer are there); raises SurgeryError to refuse it."""


@dataclass(frozen=True)
class _Edit:
    """One output projection, (out, n·d) or transposed, with γ per head: (n,).

    bias, means: where its bias lies, and the (n, d) that take the place of the heads' outputs; None where heads are
    scaled.
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
    def planned(self) -> Iterable[PlannedTensor]:
        w, b, mu = self.weight, self.bias, self.means
        scaled: dict[str, Parameter] = {"scales": self.scales, "transposed": self.transposed}
        yield PlannedTensor(w.name, w.dtype, w.shape, (Input(w),), SCALE_BLOCKS, scaled)
        if b is not None and mu is not None:
            moved: dict[str, Parameter] = {"heads": self.heads, "transposed": self.transposed}
            yield PlannedTensor(b.name, b.dtype, b.shape, (Input(b), Input(w), Input(mu)), ADD_MEANS, moved)

    @property
    def blocks(self) -> Iterable[Blocks]:
        """What is overwritten."""
        yield Blocks(self.weight, self.heads, len(self.scales), self.transposed)
        if self.bias is not None:
            yield Blocks(self.bias)


@dataclass
class _Faults:
    """What stands against an edit; `usage` where the request itself is wrong."""

    usage: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def settle(self) -> None:
        """Raises SurgeryError with every fault, if there are any."""
        if self.usage or self.others:
            code = WRONG_USAGE if self.usage else FAILED
            raise SurgeryError("\n  ".join([*self.usage, *self.others]), where=COMMAND, exit_code=code)


def scale_heads(
    model: str,
    out: Path,
    *,
    scales: Mapping[Head, float],
    measure: Measure | None = None,
    dry_run: bool = False,
    options: Options = Options(),
) -> EditReport:
    """Writes `model` with W_O[:, h·d:(h+1)·d] ← γ·W_O[:, h·d:(h+1)·d] for every head of `scales` to the folder `out`.

    Heads are query heads: under grouped queries keys and values, which other heads share, are never touched. The
    product is taken in fp32 (fp64 for F64) and rounded once to the stored dtype; other heads' columns, and every other
    tensor, keep their bytes. `surgery.undo.undo` leads back.

    Args:
        scales: head → γ; 0 removes the head, exactly; heads with γ = 1 are left alone.
        measure: judges the result before it is kept: what it returns goes into manifest and card; where it raises
            SurgeryError nothing is kept.
        dry_run: stop after the checks; nothing is written.

    Raises:
        SurgeryError: a head is not there or its layer has none that are recognised, γ is not finite, nothing would
            change, the model is quantised (every fault is named); `out` exists; NaN or infinite values came out; the
            disk is full; `measure` refused the result.
    """
    base = open_checkpoint(model)
    return _edit(base, out, scales, None, measure=measure, dry_run=dry_run, options=options)


def mean_heads(
    model: str,
    out: Path,
    *,
    heads: Iterable[Head],
    means: Path,
    measure: Measure | None = None,
    dry_run: bool = False,
    options: Options = Options(),
) -> EditReport:
    """Writes `model` with z_h ← μ_h for every head of `heads`: W_h ← 0 and b ← b + Σ_h W_h·μ_h, summed in fp64.

    Possible only where the output projection has a stored bias to hold the constant. Arguments, errors and the way
    back as in `scale_heads`.

    Args:
        means: a safetensors file with μ as `layer.{l}`, (n_heads, head_dim), for every layer l of `heads`.
    """
    base = open_checkpoint(model)
    return _edit(
        base, out, dict.fromkeys(heads, 0.0), read_file(means), measure=measure, dry_run=dry_run, options=options
    )


def _edit(
    base: Checkpoint,
    out: Path,
    scales: Mapping[Head, float],
    means: Checkpoint | None,
    *,
    measure: Measure | None,
    dry_run: bool,
    options: Options,
) -> EditReport:
    if not scales:
        raise usage_error("no heads were given", where=COMMAND, hint="Name them: --head L12H7.")
    sources = {MODEL: base} if means is None else {MODEL: base, MEANS: means}
    check_output(out, sources)
    if not dry_run:
        check_free(out, overwrite=options.overwrite)
    structure = anatomy(base)
    edits = _checked(base, structure, scales, means)
    overwritten = [blocks for edit in edits for blocks in edit.blocks]
    made = {tensor.name: tensor for edit in edits for tensor in edit.planned}
    planned = [made.get(name) or copied(tensor) for name, tensor in base.tensors.items()]
    command = command_record(COMMAND, [base.ref], **_options(scales, means))
    side_files = {path.name: path for path in base.side_files}
    plan = Plan(command, sources, plan_files(planned, like=base), side_files)
    preflight = Preflight()
    changed = {h: scale for h, scale in sorted(scales.items()) if scale != 1}
    preflight.facts["heads"] = f"{len(changed)} in {len(edits)} of {structure.layers} layers"
    check_space(preflight, plan, out, options.threads)
    preflight.settle(COMMAND)
    report = EditReport(out, preflight.facts, preflight.warnings, len(made), len(planned), dry_run=dry_run)
    if dry_run:
        return report

    def judge(folder: Path, _: Outcome) -> EditNotes | None:
        return measure(folder) if measure else None

    def finish(folder: Path, outcome: Outcome, notes: EditNotes | None) -> None:
        nonlocal report
        write_undo(folder, overwritten, outcome, role=MODEL)
        report = edit_report(report, base, sorted(made), outcome)
        summary = report.summary() | {"heads": {str(h): scale for h, scale in changed.items()}}
        summary |= {"measured": None if notes is None else notes.measured}
        manifest = build_manifest(plan, outcome, kind="model", report=summary)
        write_manifest(folder, manifest)
        write_card(folder, manifest, sources, _card(report, base, changed, notes, by_means=means is not None))

    execute_judged(plan, out, options, judge=judge, finish=finish)
    return report


def _checked(
    base: Checkpoint, structure: Anatomy, scales: Mapping[Head, float], means: Checkpoint | None
) -> list[_Edit]:
    """One edit per layer that changes. Raises SurgeryError with all that stands against it."""
    faults = _Faults()
    quantised = Preflight()
    check_quantised(quantised, [base])
    faults.others += quantised.faults
    for head, scale in sorted(scales.items()):
        if not math.isfinite(scale):
            faults.usage.append(f"{head}: got γ = {scale}, expected a finite number.")
    if quantised.faults:
        faults.settle()  # nothing else can be said of such weights
    edits = [
        edit
        for layer, indices in by_layer(scales).items()
        if (edit := _layer_edit(base, structure, layer, indices, scales, faults)) is not None
    ]
    if means is not None:
        edits = [_with_means(edit, base, means, faults) for edit in edits]
        _refuse_without_bias([edit for edit in edits if edit.bias is None], faults)
    faults.settle()
    edits = [edit for edit in edits if edit.heads]
    if not edits:
        raise usage_error("nothing to do: every γ is 1.", where=COMMAND)
    return edits


def _layer_edit(
    base: Checkpoint,
    structure: Anatomy,
    layer: int,
    indices: Sequence[int],
    scales: Mapping[Head, float],
    faults: _Faults,
) -> _Edit | None:
    named = listing((str(Head(layer, index)) for index in indices), 3)
    projection = _projection(base, structure, layer, named, faults)
    if projection is None or projection.n_heads is None:
        return None
    n = projection.n_heads
    outside = [str(Head(layer, index)) for index in indices if not 0 <= index < n]
    if outside:
        faults.usage.append(f"{listing(outside, 3)}: layer {layer} has the heads 0 to {n - 1}.")
    per_head = tuple(scales.get(Head(layer, index), 1.0) for index in range(n))
    return _Edit(layer, base.tensors[projection.name], per_head, projection.transposed)


def _projection(base: Checkpoint, structure: Anatomy, layer: int, named: str, faults: _Faults) -> Heads | None:
    """The output projection of a layer, where it is there and cut into a known number of heads."""
    projections = structure.output_projections
    numbers = [block.index for block in structure.blocks]
    if not projections:
        fault = f"{base.ref} has no attention output projection that is recognised in any layer"
        if f"{fault}." not in faults.others:
            faults.others.append(f"{fault}.")
        return None
    if layer not in numbers:
        faults.usage.append(f"{named}: there is no layer {layer}, expected {numbers[0]} to {numbers[-1]}.")
        return None
    if layer not in projections:
        faults.usage.append(
            f"{named}: layer {layer} has no attention output projection that is recognised (linear attention and "
            f"Mamba have none); layers that have: {listing(map(str, projections))}."
        )
        return None
    if projections[layer].n_heads is None:
        shape = list(base.tensors[projections[layer].name].shape)
        faults.others.append(
            f"{named}: neither config nor shapes say how many heads {projections[layer].name} {shape} is cut into. "
            "Give the folder with its config.json, and num_attention_heads in it."
        )
        return None
    return projections[layer]


def _with_means(edit: _Edit, base: Checkpoint, means: Checkpoint, faults: _Faults) -> _Edit:
    w, n = edit.weight, len(edit.scales)
    inner, outer = w.shape if edit.transposed else w.shape[::-1]
    bias = base.tensors.get(f"{w.name.removesuffix('.weight')}.bias")
    if bias is not None and (bias.shape != (outer,) or not bias.is_float):
        bias = None
    key, expected = f"layer.{edit.layer}", (n, inner // n)
    found = means.tensors.get(key)
    if found is None:
        faults.usage.append(f'{means.ref}: has no "{key}" (it has {listing(means.tensors, 3)}).')
    elif found.shape != expected or not found.is_float:
        faults.usage.append(
            f'{means.ref}: "{key}" is {found.dtype} {list(found.shape)}, expected floats {list(expected)}: a row per '
            "head."
        )
    return _Edit(edit.layer, w, edit.scales, edit.transposed, bias, found)


def _refuse_without_bias(edits: Sequence[_Edit], faults: _Faults) -> None:
    if edits:
        names = listing((edit.weight.name for edit in edits), 3)
        faults.usage.append(
            f"{names}: mean ablation adds a constant to the residual stream, and this projection has no bias to hold "
            "it. Use --scale 0, which needs none."
        )


def _options(scales: Mapping[Head, float], means: Checkpoint | None) -> dict[str, Any]:
    """The options that type the edit again."""
    ordered = dict(sorted(scales.items()))
    if means is not None:
        return {"head": list(map(str, ordered)), "means": means.ref}
    values = set(ordered.values())
    if len(values) == 1:
        return {"head": list(map(str, ordered)), "scale": values.pop()}
    return {"head": [f"{head}={scale!r}" for head, scale in ordered.items()]}


def _card(
    report: EditReport, base: Checkpoint, changed: Mapping[Head, float], notes: EditNotes | None, *, by_means: bool
) -> Card:
    count, name = len(changed), base.repo_id or base.ref
    if by_means:
        what = f"the outputs of {count} attention head(s) replaced by their means (z ← μ)"
        how = "zeros in the output projections' columns and W·μ in their biases"
    else:
        what = f"{count} attention head(s) scaled (z ← γ·z)"
        how = "their columns of the output projections multiplied by γ"
    method = (
        f"{name} with {what} at all positions, after {PAPER}, in the weights: {how}. {report.edited} of "
        f"{report.tensors} tensors changed; `{UNDO}` holds what they were, and `surgery edit undo` puts it back."
    )
    by_scale: dict[float, list[str]] = {}
    for head, scale in changed.items():
        by_scale.setdefault(scale, []).append(str(head))
    rows = [f"| {'μ' if by_means else f'{scale:g}'} | {', '.join(heads)} |" for scale, heads in by_scale.items()]
    heads = "\n".join(["## Heads", "", f"| {'output' if by_means else 'γ'} | heads |", "|---|---|", *rows])
    effects = f"## Side effects\n\n{notes.markdown if notes else NOT_MEASURED}"
    body = "\n\n".join([heads, effects, edit_table(report).to_markdown()])
    return Card("Model with attention heads edited", method, ("attention-heads", "ablation"), body)
