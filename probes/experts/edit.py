"""Experts scaled in a checkpoint, and the result measured before it is kept (arXiv 2505.14681, baked, not hooked).

In come a model and which experts: by name, or the first of a run's findings; out comes the edited checkpoint of
`surgery.edits.experts`, with what the edit did in its card: answers that collapse into a loop, thinking that never
closes, KL and perplexity against the original. A result that collapses is not kept, unless that is asked for. What is
baked acts on prompts, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from probes.data.examples import Example
from probes.data.markers import find_markers, never_closed
from probes.data.preparation import GenerationOptions, open_model, options_from_findings, resolve_markers
from probes.data.reader import read_data
from probes.data.records import check_model, read_examples
from probes.experts.findings import ExpertFindings, read_expert_findings
from probes.experts.repetition import is_repetitive
from probes.side_effects.compare import (
    EffectRow,
    bare_prompts,
    counts_text,
    divergence_by_topic,
    divergence_rows,
    effects_table,
    generate_answers,
    manifest_record,
    share_text,
    should_measure,
)
from probes.side_effects.effects import Rate
from surgery.checkpoint.checkpoint import Checkpoint, loadable_folder
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.selectors import Expert, parse_expert_scales
from surgery.checkpoint.tokenizer_files import TOKENIZER_FILES
from surgery.edits.common import EditNotes, Measure
from surgery.edits.experts import scale_experts
from surgery.engine.edit_report import EditReport
from surgery.engine.options import ExecutionOptions
from surgery.errors import SurgeryError, usage_error
from surgery.models.loaded_model import LoadedModel
from surgery.models.loading import load_tokenizer
from surgery.reporting.report import Table

# How much larger the share of answers that loop may become before a result is not kept.
MORE_LOOPS = 0.1


@dataclass(frozen=True)
class ExpertSelection:
    """Which experts, and how strongly: `top` of the ranked ones of a run, or by name, each L12E45 or L12E45=β."""

    run: Path | None = None
    top: int | None = None
    experts: Sequence[str] = ()
    scale: float = 1.0


@dataclass(frozen=True)
class ExpertEffects:
    """The edited model beside its original. loops: answers that end in a repetition. tokens: of an answer, mean."""

    loops: tuple[Rate, Rate]
    never_closed: tuple[Rate, Rate]
    tokens: tuple[float, float]
    kl: Mapping[str, tuple[float, float, float]]
    perplexity: Mapping[str, tuple[float, float]]

    def table(self) -> Table:
        """Before and after, a row per measure."""
        rows: list[EffectRow] = []
        for name, (before, after) in (
            ("answers that end in a loop", self.loops),
            ("thinking never closed", self.never_closed),
        ):
            rows.append((name, share_text(before), share_text(after), counts_text(before, after)))
        rows.append(("tokens of an answer", f"{self.tokens[0]:.1f}", f"{self.tokens[1]:.1f}", None))
        rows += divergence_rows(self.kl, self.perplexity)
        return effects_table(rows)


@dataclass(frozen=True)
class ExpertEditResult:
    """What an edit of experts did to the weights, and to the model; `measured` is None where that was not looked at."""

    report: EditReport
    experts: Mapping[str, float]
    measured: ExpertEffects | None


def edit_experts(
    model: str,
    out: Path,
    *,
    choice: ExpertSelection,
    data: str | None = None,
    wanted: bool = True,
    examples: int = 64,
    force: bool = False,
    dtype: str = "auto",
    dry_run: bool = False,
    options: ExecutionOptions = ExecutionOptions(),
) -> ExpertEditResult:
    """Writes `model` with the chosen experts' down projections × β to `out`; measures it before it is kept.

    Args:
        data: prompts to measure on; None takes the run's. wanted: False leaves measuring out, and the card says so.
        examples: prompts at most. force: keep a result whose answers collapse.

    Raises:
        SurgeryError: no experts, or experts that are not there; findings of another model; β is not finite or below 0;
            without a run, the tokenizer does not say how the model thinks; the answers collapse; else as
            `surgery.edits.experts.scale_experts`.
    """
    measured = should_measure("edit experts", wanted=wanted, dry_run=dry_run, run=choice.run, data=data)
    checkpoint = open_checkpoint(model)
    findings = None if choice.run is None else read_expert_findings(choice.run)
    if findings is not None and choice.run is not None:
        check_model(findings, checkpoint, choice.run, options=options)
    scales = select_experts(choice, findings)
    kept: list[ExpertEffects] = []
    measure = None
    if measured:
        asking = options_from_findings(findings.settings) if findings else GenerationOptions()
        if findings is None:
            _check_thinking(checkpoint)
        rows = read_data(data).examples if data is not None else read_examples(choice.run or Path())
        measure = _measure(model, checkpoint, list(rows), asking, examples, force, dtype, options, kept)
    # The device is the models': scaling a few matrices is no work for it.
    report = scale_experts(
        model, out, scales=scales, measure=measure, dry_run=dry_run, options=replace(options, device="cpu")
    )
    named = {str(expert): scale for expert, scale in sorted(scales.items())}
    return ExpertEditResult(report, named, kept[0] if kept else None)


def select_experts(choice: ExpertSelection, findings: ExpertFindings | None) -> dict[Expert, float]:
    """Expert → β. Raises SurgeryError for a choice that says nothing, or two things."""
    if choice.experts and choice.top is not None:
        raise usage_error("--expert names experts, --top chooses them: give one of them.")
    if choice.experts:
        return parse_expert_scales(choice.experts, scale=choice.scale)
    if findings is None:
        raise usage_error("no experts were given.", hint="Name them (--expert L12E45), or give --from RUN --top 2.")
    ranked = findings.ranked
    count = 2 if choice.top is None else choice.top
    if count > len(ranked):
        raise usage_error(
            f"{len(ranked)} experts have evidence enough to be ranked, {count} were asked for",
            where="--top",
            hint="Name experts with --expert to go beyond what the counts support.",
        )
    return {row.name: choice.scale for row in ranked[:count]}


def _check_thinking(checkpoint: Checkpoint) -> None:
    """Raises SurgeryError where it cannot be known how the model thinks: before anything is written, not after."""
    if not {path.name for path in checkpoint.side_files} & set(TOKENIZER_FILES):
        raise usage_error(
            "has no tokenizer beside its weights",
            where=checkpoint.ref,
            hint="Copy its tokenizer.json into the folder, or add --no-measure.",
        )
    tokenizer = load_tokenizer(loadable_folder(checkpoint), checkpoint.ref)
    try:
        find_markers(tokenizer, where=checkpoint.ref)
    except SurgeryError as error:
        raise usage_error(
            error.what,
            where=checkpoint.ref,
            hint="Give --from RUN, which says how it thinks (or with --no-thinking that it does not), or --no-measure.",
        ) from error


def _measure(
    model: str,
    checkpoint: Checkpoint,
    rows: Sequence[Example],
    asking: GenerationOptions,
    most: int,
    force: bool,
    dtype: str,
    options: ExecutionOptions,
    kept: list[ExpertEffects],
) -> Measure:
    prompts = bare_prompts(rows, most, any_topic=True)

    def measure(folder: Path) -> EditNotes:
        before = open_model(model, device=options.device, dtype=dtype)
        after = open_model(folder, device=options.device, dtype=dtype, name="the edited model")
        markers = resolve_markers(before, asking)
        first, second = (generate_answers(live, prompts, asking, markers, options) for live in (before, after))
        lost = {row.key for row in never_closed(first)}
        whole = [row for row in first if row.key not in lost]
        kl, perplexity = divergence_by_topic(before, after, whole, markers, options)
        found = ExpertEffects(
            loops=(_looping(before, first), _looping(before, second)),
            never_closed=(_open(first), _open(second)),
            tokens=(_tokens(before, first), _tokens(before, second)),
            kl=kl,
            perplexity=perplexity,
        )
        if found.loops[1].value > found.loops[0].value + MORE_LOOPS and not force:
            raise SurgeryError(
                f"{found.loops[1].value:.1%} of its answers end in a loop, {found.loops[0].value:.1%} of the "
                f"original's (n = {found.loops[1].n}), so the result is not kept",
                where=checkpoint.ref,
                hint="Use a smaller --scale or fewer experts, or add --force.",
            )
        kept[:] = [found]
        return EditNotes(manifest_record(found), found.table().to_markdown())

    return measure


def _written(live: LoadedModel, row: Example) -> list[int]:
    text = f"{row.thinking or ''}{row.closing or ''}{row.response or ''}"
    ids: list[int] = live.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _looping(live: LoadedModel, rows: Sequence[Example]) -> Rate:
    return Rate.of([is_repetitive(_written(live, row)) for row in rows])


def _open(rows: Sequence[Example]) -> Rate:
    lost = {row.key for row in never_closed(rows)}
    return Rate.of([row.key in lost for row in rows])


def _tokens(live: LoadedModel, rows: Sequence[Example]) -> float:
    return sum(len(_written(live, row)) for row in rows) / len(rows)
