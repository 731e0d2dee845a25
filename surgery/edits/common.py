"""Parts of layers scaled in the weights: what edits of heads and of experts have in common.

In comes an `Edit`: which tensors of a model are made anew, by which kernels, and what of them is overwritten. Out comes
the model in which only these differ, with manifest, model card and the file that undoes it (see
`surgery.edits.undo_file`); or an error with every fault of the request at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.selectors import P, Part
from surgery.checkpoint.structure import ModelStructure
from surgery.edits.undo_file import UNDO, UndoBlocks, write_undo
from surgery.engine.card import CardContent
from surgery.engine.checkpoint_writer import OutputDescription, check_destination, write_checkpoint
from surgery.engine.edit_report import EditReport, edit_report, edit_table
from surgery.engine.manifest import command_record
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, PlannedTensor, copy_tensor, plan_files
from surgery.engine.preflight import Preflight
from surgery.engine.result import ExecutionResult
from surgery.errors import ErrorList, listing

MODEL = "model"
NOT_MEASURED = "Side effects were not measured."

T = TypeVar("T")


@dataclass(frozen=True)
class EditNotes:
    """What was measured of an edited model: JSON-able data for the manifest, and Markdown for the model card."""

    measured: Mapping[str, Any]
    markdown: str


Measure = Callable[[Path], EditNotes]
"""Measures the model in a folder (weights, config and tokenizer are there); raises SurgeryError to refuse it."""


@dataclass(frozen=True)
class TensorChange:
    """One tensor of the edited model, and what of the stored one it overwrites."""

    planned: PlannedTensor
    blocks: UndoBlocks


@dataclass(frozen=True)
class EditDescription:
    """What the model card says of an edit.

    title: of the card. what: was done to the model ("… scaled (z ← γ·z) at all positions"). paper: after which. how: in
    the weights. caution: a sentence that readers must know, or nothing. tags: for the Hub. column: heads the factors in
    the table of parts. label: takes the place of the factors there.
    """

    title: str
    what: str
    paper: str
    how: str
    tags: tuple[str, ...]
    column: str
    caution: str = ""
    label: str | None = None


@dataclass(frozen=True)
class Edit:
    """What is to be done to `base`.

    nouns: what the parts are called: "heads". scales: part → factor, for the parts that change. sources: what else is
    read. command: the record for the manifest. changes: at most one per tensor. warnings: for the user.
    """

    base: Checkpoint
    structure: ModelStructure
    nouns: str
    scales: Mapping[Part, float]
    changes: Sequence[TensorChange]
    wording: EditDescription
    command: Mapping[str, Any]
    sources: Mapping[str, Checkpoint] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def require_in_layer(
    having: Mapping[int, T],
    layer: int,
    named: str,
    structure: ModelStructure,
    ref: str,
    errors: ErrorList,
    *,
    what: str,
    why: str = "",
) -> T | None:
    """What `having` holds of `layer`; where it holds nothing the reason goes to `errors`.

    Args:
        having: layer → what is sought; layers without it are absent.
        named: the parts that were asked for.
        what: what is sought, as in "has no …". why: a layer may lack it, or nothing.
    """
    numbers = [block.index for block in structure.blocks]
    if not having:
        errors.add(f"{ref} has no {what} in any layer.")
    elif layer not in numbers:
        errors.add(f"{named}: there is no layer {layer}, expected {numbers[0]} to {numbers[-1]}.", usage=True)
    elif layer not in having:
        errors.add(
            f"{named}: layer {layer} has no {what}{why}; layers that have: {listing(map(str, having))}.", usage=True
        )
    return having.get(layer)


def check_indices(kind: type[P], layer: int, indices: Sequence[int], n: int, errors: ErrorList) -> None:
    """Adds a fault where one of `indices` is not a part of a layer that has `n` of them."""
    outside = [str(kind(layer, index)) for index in indices if not 0 <= index < n]
    if outside:
        errors.add(f"{listing(outside, 3)}: layer {layer} has the {kind.NOUN}s 0 to {n - 1}.", usage=True)


def edit_options(scales: Mapping[P, float], noun: str) -> dict[str, Any]:
    """The options that type the edit again."""
    ordered = dict(sorted(scales.items()))
    values = set(ordered.values())
    if len(values) == 1:
        (value,) = values
        return {noun: list(map(str, ordered)), "scale": int(value) if float(value).is_integer() else value}
    return {noun: [f"{part}={scale!r}" for part, scale in ordered.items()]}


def write_edit(
    edit: Edit, out: Path, *, measure: Measure | None, dry_run: bool, options: ExecutionOptions
) -> EditReport:
    """Writes the edited model to the folder `out`.

    Args:
        measure: judges the result before it is kept: what it returns goes into manifest and card; where it raises
            SurgeryError nothing is kept.
        dry_run: stop after the checks; nothing is written.

    Raises:
        SurgeryError: `out` exists or lies in a source; NaN or infinite values came out; the disk is full; `measure`
            refused the result.
    """
    base = edit.base
    sources = {MODEL: base, **edit.sources}
    check_destination(out, sources, options, dry_run=dry_run)
    replaced = {change.planned.name: change.planned for change in edit.changes}
    planned = [replaced.get(name) or copy_tensor(tensor) for name, tensor in base.tensors.items()]
    side_files = {path.name: path for path in base.side_files}
    plan = Plan(edit.command, sources, plan_files(planned, like=base), side_files)
    preflight = Preflight(warnings=list(edit.warnings))
    layers = len({part.layer for part in edit.scales})
    preflight.facts[edit.nouns] = f"{len(edit.scales)} in {layers} of {edit.structure.layers} layers"
    preview = EditReport(out, preflight.facts, preflight.warnings, len(replaced), len(planned), dry_run=dry_run)
    notes: list[EditNotes] = []  # filled by `validate`, for manifest and card

    def validate(folder: Path, _: ExecutionResult) -> None:
        if measure is not None:
            notes.append(measure(folder))

    def describe(folder: Path, result: ExecutionResult) -> OutputDescription[EditReport]:
        measured = notes[0] if notes else None
        write_undo(folder, [change.blocks for change in edit.changes], result, role=MODEL)
        report = edit_report(preview, base, sorted(replaced), result)
        parts = {str(part): scale for part, scale in sorted(edit.scales.items())}
        summary = {edit.nouns: parts, "measured": None if measured is None else measured.measured}
        return OutputDescription(report, report.summary() | summary, _card(edit, report, measured))

    return write_checkpoint(
        plan,
        out,
        options,
        describe=describe,
        preflight=preflight,
        dry_run_report=preview if dry_run else None,
        validate=validate,
    )


def record(base: Checkpoint, command: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """How the manifest records an edit of `base`."""
    return command_record(command, [base.ref], **options)


def _card(edit: Edit, report: EditReport, notes: EditNotes | None) -> CardContent:
    words, name = edit.wording, edit.base.repo_id or edit.base.ref
    caution = f"{words.caution} " if words.caution else ""
    method = (
        f"{name} with {words.what} at all positions, after {words.paper}, in the weights: {words.how}. {caution}"
        f"{report.edited} of {report.tensors} tensors changed; `{UNDO}` holds what they were, and `surgery edit undo` "
        "puts it back."
    )
    by_factor: dict[str, list[str]] = {}
    for part, scale in sorted(edit.scales.items()):
        by_factor.setdefault(words.label or f"{scale:g}", []).append(str(part))
    rows = [f"| {factor} | {', '.join(parts)} |" for factor, parts in by_factor.items()]
    header = [f"## {edit.nouns.capitalize()}", "", f"| {words.column} | {edit.nouns} |", "|---|---|"]
    effects = f"## Side effects\n\n{notes.markdown if notes else NOT_MEASURED}"
    body = "\n\n".join(["\n".join([*header, *rows]), effects, edit_table(report).to_markdown()])
    return CardContent(words.title, method, words.tags, body)
