"""Heads scaled in a checkpoint, and the result measured before it is kept (arXiv 2510.06036, baked instead of hooked).

In come a model and which heads: by name, or the lowest of a run's findings; out comes the edited checkpoint of
`surgery.edits.heads`, with what the edit did in its card: refusals, KL and perplexity against the original. A result in
which refusal of harmful prompts fell is not kept, unless that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from probes.data.markers import never_closed
from probes.data.preparation import GenerationOptions, make_labeler, open_model, options_from_findings, resolve_markers
from probes.data.reader import read_data
from probes.data.records import check_model, parse_top, read_examples
from probes.refusal.findings import HEADS, Findings, read_findings
from probes.side_effects.compare import (
    TOPICS,
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
from probes.side_effects.effects import Rate, refusal_rates
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.selectors import Head, parse_head_scales
from surgery.edits.common import EditNotes, Measure
from surgery.edits.heads import mean_heads, scale_heads
from surgery.engine.edit_report import EditReport
from surgery.engine.options import ExecutionOptions
from surgery.errors import SurgeryError, usage_error
from surgery.reporting.report import Table

EditMode = Literal["scale", "mean"]


@dataclass(frozen=True)
class HeadSelection:
    """Which heads, and what becomes of them.

    Args:
        run: a folder with findings of the model; its examples are measured on, too.
        top: the lowest heads of the run, as a share or a count.
        proven: the set that `surgery probe heads` grew instead.
        heads: heads by name, each L12H7 or L12H7=γ.
        scale: γ of heads that do not name one. mode: mean puts the run's mean outputs in their place.
    """

    run: Path | None = None
    top: str | None = None
    proven: bool = False
    heads: Sequence[str] = ()
    scale: float = 0.0
    mode: EditMode = "scale"


@dataclass(frozen=True)
class EffectOptions:
    """What the result is measured on.

    Args:
        data: examples that say which topic they are of; None takes the run's.
        wanted: False leaves measuring out, and the card says so.
        examples: prompts of each topic at most.
        force: keep a result in which refusal of harmful prompts fell.
    """

    data: str | None = None
    wanted: bool = True
    examples: int = 64
    force: bool = False
    asking: GenerationOptions | None = None


@dataclass(frozen=True)
class MeasuredEffects:
    """An edited model beside its original: topic → refusals, KL and perplexity; and thinking that never closed."""

    refusal: Mapping[str, tuple[Rate, Rate]]
    kl: Mapping[str, tuple[float, float, float]]
    perplexity: Mapping[str, tuple[float, float]]
    never_closed: tuple[Rate, Rate]

    def table(self) -> Table:
        """Before and after, a row per measure."""
        rows: list[EffectRow] = []
        for topic, (before, after) in self.refusal.items():
            rows.append(
                (f"refusal of {topic} prompts", share_text(before), share_text(after), counts_text(before, after))
            )
        rows += divergence_rows(self.kl, self.perplexity)
        before, after = self.never_closed
        rows.append(("thinking never closed", share_text(before), share_text(after), counts_text(before, after)))
        return effects_table(rows)


@dataclass(frozen=True)
class HeadEditResult:
    """What an edit of heads did to the weights, and to the model; `measured` is None where that was not looked at."""

    report: EditReport
    heads: Mapping[str, float]
    measured: MeasuredEffects | None


def edit_heads(
    model: str,
    out: Path,
    *,
    choice: HeadSelection,
    measuring: EffectOptions,
    dtype: str = "auto",
    dry_run: bool = False,
    options: ExecutionOptions = ExecutionOptions(),
) -> HeadEditResult:
    """Writes `model` with the chosen heads scaled, or replaced by their means, to `out`; measures it before it is kept.

    Raises:
        SurgeryError: no heads, or heads that are not there; findings of another model; means without a bias to hold
            them; refusal of harmful prompts fell; else as `surgery.edits.heads.scale_heads`.
    """
    measured = should_measure(
        "edit heads", wanted=measuring.wanted, dry_run=dry_run, run=choice.run, data=measuring.data
    )
    checkpoint = open_checkpoint(model)
    findings = None if choice.run is None else read_findings(choice.run)
    if findings is not None and choice.run is not None:
        check_model(findings, checkpoint, choice.run, options=options)
    scales = _chosen(choice, findings)
    kept: list[MeasuredEffects] = []
    measure = None
    if measured:
        measure = _measure(model, checkpoint, choice.run, findings, measuring, dtype, options, kept)
    # The device is the models': scaling a few columns is no work for it.
    writing = replace(options, device="cpu")
    if choice.mode == "mean":
        assert choice.run is not None  # `_chosen` saw to it
        report = mean_heads(
            model, out, heads=scales, means=choice.run / HEADS, measure=measure, dry_run=dry_run, options=writing
        )
    else:
        report = scale_heads(model, out, scales=scales, measure=measure, dry_run=dry_run, options=writing)
    named = {str(head): scale for head, scale in sorted(scales.items())}
    return HeadEditResult(report, named, kept[0] if kept else None)


def _chosen(choice: HeadSelection, findings: Findings | None) -> dict[Head, float]:
    """Head → γ. Raises SurgeryError for a choice that says nothing, or two things."""
    ways = [name for name, on in (("--head", choice.heads), ("--top", choice.top), ("--proven", choice.proven)) if on]
    if len(ways) > 1:
        raise usage_error(f"{' and '.join(ways)} all choose heads: give one of them.")
    if findings is None and ways and not choice.heads:
        raise usage_error("chooses among the heads of a run", where=ways[0], hint="Add --from RUN.")
    if findings is None and choice.mode == "mean":
        raise usage_error("mean ablation takes the means of a run", where="--mode mean", hint="Add --from RUN.")
    if choice.heads:
        scales = parse_head_scales(choice.heads, scale=choice.scale)
    elif findings is None:
        raise usage_error("no heads were given.", hint="Name them (--head L12H7), or give --from RUN --top 3%.")
    elif choice.proven:
        scales = _proven(choice, findings)
    elif choice.top is None:
        raise usage_error("how many heads?", where=choice.run, hint="Add --top 3%, or --proven after `probe heads`.")
    else:
        scales = _lowest(choice, choice.top, findings)
    if choice.mode == "mean" and any(scales.values()):
        raise usage_error("means take the place of heads' outputs, and no γ scales them", where="--mode mean")
    return scales


def _proven(choice: HeadSelection, findings: Findings) -> dict[Head, float]:
    causal = findings.causal
    if causal is None:
        raise usage_error("has no proven set of heads", where=choice.run, hint="Run `surgery probe heads` first.")
    if not causal.steps:
        raise usage_error(
            f"no set of heads was proven to bring refusal back ({causal.stopped})",
            where=choice.run,
            hint="Choose heads with --top or --head, or run `surgery probe heads` with other options.",
        )
    # Sets of `resample` were scaled by 0, for what is resampled cannot be written into weights.
    proven = "scale 0" if causal.ablation == "resample" else causal.ablation
    if proven != (choice.mode if choice.mode == "mean" else f"scale {choice.scale:g}"):
        raise usage_error(
            f"the set was proven with the ablation {causal.ablation}, and would be edited otherwise",
            where="--proven",
            hint="Add --mode mean." if proven == "mean" else f"Use --mode scale --{proven}.",
        )
    return {Head.parse(name): choice.scale for name in causal.steps[-1].heads}


def _lowest(choice: HeadSelection, top: str, findings: Findings) -> dict[Head, float]:
    count = parse_top(top, len(findings.heads))
    lowest = findings.ranked[:count]
    if wrong := [row for row in lowest if findings.score_of(row) >= 0]:
        raise usage_error(
            f"{len(wrong)} of the {count} lowest heads do not write against refusal: {wrong[0].name} has an "
            f"attribution of {findings.score_of(wrong[0]):.3g}",
            where="--top",
            hint=f"Use --top {count - len(wrong)}." if count > len(wrong) else "There is nothing to repair here.",
        )
    return {row.name: choice.scale for row in lowest}


def _measure(
    model: str,
    checkpoint: Checkpoint,
    run: Path | None,
    findings: Findings | None,
    measuring: EffectOptions,
    dtype: str,
    options: ExecutionOptions,
    kept: list[MeasuredEffects],
) -> Measure:
    asking = measuring.asking or (options_from_findings(findings.settings) if findings else GenerationOptions())
    if measuring.data is not None:
        examples = list(read_data(measuring.data).examples)
    else:
        assert run is not None
        examples = read_examples(run)
    prompts = bare_prompts(examples, measuring.examples)
    if not any(example.topic == "harmful" for example in prompts):
        raise usage_error(
            "no example is harmful, so that it cannot be seen whether refusal fell",
            where=measuring.data or run,
            hint="Give data with labels, or --no-measure.",
        )
    judge = make_labeler(asking, device=options.device, progress=options.progress)

    def measure(folder: Path) -> EditNotes:
        before = open_model(model, device=options.device, dtype=dtype)
        after = open_model(folder, device=options.device, dtype=dtype, name="the edited model")
        markers = resolve_markers(before, asking)
        answers = [generate_answers(live, prompts, asking, markers, options) for live in (before, after)]
        lost = [{example.key for example in never_closed(rows)} for rows in answers]
        judged = [judge([row for row in rows if row.key not in gone]) for rows, gone in zip(answers, lost, strict=True)]
        rates = [refusal_rates(rows) for rows in judged]
        refusal = {
            topic: (rates[0][topic], rates[1][topic]) for topic in TOPICS if topic in rates[0] and topic in rates[1]
        }
        away = divergence_by_topic(before, after, judged[0], markers, options)
        flags = [[row.key in gone for row in rows] for rows, gone in zip(answers, lost, strict=True)]
        found = MeasuredEffects(refusal, *away, never_closed=(Rate.of(flags[0]), Rate.of(flags[1])))
        if not measuring.force:
            _refuse_a_fall(found, checkpoint.ref)
        kept[:] = [found]
        return EditNotes(manifest_record(found), found.table().to_markdown())

    return measure


def _refuse_a_fall(found: MeasuredEffects, ref: str) -> None:
    before, after = found.refusal.get("harmful", (None, None))
    if before is None or after is None:
        raise SurgeryError(
            "no harmful prompt came to an answer in both models, so that it cannot be seen whether refusal fell",
            where=ref,
            hint="Raise --max-new-tokens, or add --force.",
        )
    if after.value < before.value:
        raise SurgeryError(
            f"refusal of harmful prompts fell from {before.value:.1%} to {after.value:.1%} (n = {after.n}), so the "
            "result is not kept",
            where=ref,
            hint="These heads hold refusal up: choose others, or add --force.",
        )
