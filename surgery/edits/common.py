"""Write edits of heads and experts: the edited model with manifest, model card and undo file.

An `Edit` lists the tensors that change, with their kernels and the stored blocks that they overwrite. Only these differ
in the output; `surgery.edits.undo_file` restores them.
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
from surgery.engine.edit_report import EditReport, build_edit_report, edit_table
from surgery.engine.manifest import command_record
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, PlannedTensor, copy_tensor, plan_files
from surgery.engine.preflight import Preflight
from surgery.engine.result import ExecutionResult
from surgery.errors import ErrorList, listing
from surgery.io.escaping import markdown_text

MODEL = "model"
NOT_MEASURED = "Side effects were not measured."

T = TypeVar("T")


@dataclass(frozen=True)
class EditNotes:
    """Measurements of an edited model: JSON-able data for the manifest, and Markdown for the model card."""

    measured: Mapping[str, Any]
    markdown: str


Measure = Callable[[Path], EditNotes]
"""Measure the model in a folder with weights, config and tokenizer; raise SurgeryError to reject it."""


@dataclass(frozen=True)
class TensorChange:
    """One tensor of the edited model, and the blocks of the stored one that it overwrites."""

    planned: PlannedTensor
    blocks: UndoBlocks


@dataclass(frozen=True)
class EditDescription:
    """The model card's description of an edit.

    title: of the card.
    what: the change of the model ("… scaled (z ← γ·z)").
    paper: the source of the method.
    how: the change of the weights.
    tags: for the Hub.
    column: header of the factors in the table of parts.
    caution: a warning to readers, or empty.
    label: shown instead of the factors.
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
    """An edit of `base`.

    nouns: plural name of the parts, "heads".
    scales: part → factor, for the parts that change.
    changes: at most one per tensor.
    command: the manifest's record.
    sources: role → other checkpoints that are read.
    warnings: for the user.
    """

    base: Checkpoint
    structure: ModelStructure
    nouns: str
    scales: Mapping[Part, float]
    changes: Sequence[TensorChange]
    description: EditDescription
    command: Mapping[str, Any]
    sources: Mapping[str, Checkpoint] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def require_in_layer(
    by_layer: Mapping[int, T],
    layer: int,
    named: str,
    structure: ModelStructure,
    ref: str,
    errors: ErrorList,
    *,
    what: str,
    why: str = "",
) -> T | None:
    """Return `by_layer[layer]`; where it has no such layer, add the reason to `errors` and return None.

    Args:
        by_layer: layer → the module that is needed, for the layers that have it.
        named: the requested parts, as text.
        what: the module's name, as in "has no …".
        why: the reason, in parentheses, why a layer may lack it; or empty.
    """
    numbers = [block.index for block in structure.blocks]
    if not by_layer:
        errors.add(f"{ref} has no {what} in any layer.")
    elif layer not in numbers:
        errors.add(f"{named}: there is no layer {layer}, expected {numbers[0]} to {numbers[-1]}.", usage=True)
    elif layer not in by_layer:
        errors.add(
            f"{named}: layer {layer} has no {what}{why}; layers that have: {listing(map(str, by_layer))}.", usage=True
        )
    return by_layer.get(layer)


def check_indices(kind: type[P], layer: int, indices: Sequence[int], n: int, errors: ErrorList) -> None:
    """Add an error where one of `indices` is not a part of a layer that has `n` of them."""
    outside = [str(kind(layer, index)) for index in indices if not 0 <= index < n]
    if outside:
        errors.add(f"{listing(outside, 3)}: layer {layer} has the {kind.NOUN}s 0 to {n - 1}.", usage=True)


def edit_options(scales: Mapping[P, float], noun: str) -> dict[str, Any]:
    """Return the command-line options that repeat the edit."""
    ordered = dict(sorted(scales.items()))
    # One factor for all is typed once, each part's own factor beside its name.
    values = set(ordered.values())
    if len(values) == 1:
        (value,) = values
        return {noun: list(map(str, ordered)), "scale": int(value) if float(value).is_integer() else value}
    return {noun: [f"{part}={scale!r}" for part, scale in ordered.items()]}


def write_edit(
    edit: Edit, out: Path, *, measure: Measure | None, dry_run: bool, options: ExecutionOptions
) -> EditReport:
    """Write the edited model to the folder `out`.

    Args:
        measure: measures the result before it is committed, for manifest and card; where it raises SurgeryError
            nothing is kept.
        dry_run: stop after the checks; nothing is written.

    Raises:
        SurgeryError: `out` exists or is inside a source; NaN or infinite values came out; the disk is full; `measure`
            rejected the result.
    """
    base = edit.base
    sources = {MODEL: base, **edit.sources}
    check_destination(out, sources, options, dry_run=dry_run)
    replaced = {change.planned.name: change.planned for change in edit.changes}
    planned = [replaced.get(name) or copy_tensor(tensor) for name, tensor in base.tensors.items()]
    plan = Plan(edit.command, sources, plan_files(planned, like=base), base.side_files)
    preflight = Preflight(warnings=list(edit.warnings))
    layers = len({part.layer for part in edit.scales})
    preflight.facts[edit.nouns] = f"{len(edit.scales)} in {layers} of {edit.structure.layers} layers"
    preview = EditReport(out, preflight.facts, preflight.warnings, len(replaced), len(planned), dry_run=dry_run)
    # Filled by `validate`, which must come before anything is written about the weights.
    notes: list[EditNotes] = []

    def validate(folder: Path, _: ExecutionResult) -> None:
        if measure is not None:
            notes.append(measure(folder))

    def describe(folder: Path, result: ExecutionResult) -> OutputDescription[EditReport]:
        measured = notes[0] if notes else None
        # Before the manifest: it fails where the source has changed since it was read.
        write_undo(folder, [change.blocks for change in edit.changes], result, role=MODEL)
        report = build_edit_report(preview, base, sorted(replaced), result)
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
        writes=(UNDO.as_posix(),),
    )


def record(base: Checkpoint, command: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest's record of an edit of `base`."""
    return command_record(command, [base.ref], **options)


def _card(edit: Edit, report: EditReport, notes: EditNotes | None) -> CardContent:
    text, name = edit.description, markdown_text(edit.base.repo_id or edit.base.ref)
    caution = f"{text.caution} " if text.caution else ""
    method = (
        f"{name} with {text.what} at all positions, after {text.paper}, in the weights: {text.how}. {caution}"
        f"{report.edited} of {report.tensors} tensors changed; `{UNDO}` holds what they were, and `surgery edit undo` "
        "puts it back."
    )
    by_factor: dict[str, list[str]] = {}
    # One row per factor: an edit of hundreds of experts has few different ones.
    for part, scale in sorted(edit.scales.items()):
        by_factor.setdefault(text.label or f"{scale:g}", []).append(str(part))
    rows = [f"| {factor} | {', '.join(parts)} |" for factor, parts in by_factor.items()]
    header = [f"## {edit.nouns.capitalize()}", "", f"| {text.column} | {edit.nouns} |", "|---|---|"]
    effects = f"## Side effects\n\n{notes.markdown if notes else NOT_MEASURED}"
    body = "\n\n".join(["\n".join([*header, *rows]), effects, edit_table(report).to_markdown()])
    return CardContent(text.title, method, text.tags, body)
