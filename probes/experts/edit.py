"""Scale experts in a checkpoint, and measure the result before it is committed.

Experts are chosen by name, or as the first of a run's findings. The edited checkpoint is that of
`surgery.edits.experts` (arXiv 2505.14681, in the weights instead of by hooks), and its card reports the measured side
effects (`probes.experts.edit_effects`). A result whose answers collapse into repetition is rejected, unless forced.
Unlike hooks with phase `generated`, an edit of the weights also acts on prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from probes.data.examples import Example
from probes.data.markers import find_markers
from probes.data.preparation import GenerationOptions, options_from_findings
from probes.data.reader import read_data
from probes.data.records import check_model, read_examples
from probes.experts.edit_effects import ExpertEffectMeasurement, ExpertEffects
from probes.experts.findings import ExpertFindings, read_expert_findings
from probes.side_effects.compare import bare_prompts, should_measure
from surgery.checkpoint.checkpoint import Checkpoint, loadable_folder
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.selectors import Expert, parse_expert_scales
from surgery.checkpoint.tokenizer_files import TOKENIZER_FILES
from surgery.edits.experts import scale_experts
from surgery.engine.edit_report import EditReport
from surgery.engine.options import ExecutionOptions
from surgery.errors import SurgeryError, usage_error
from surgery.models.choices import SpecialTokens
from surgery.models.loading import load_tokenizer

DEFAULT_TOP = 2  # ranked experts, as many as the paper reinforces


@dataclass(frozen=True)
class ExpertSelection:
    """Which experts to scale, and by how much.

    run: a folder with findings of the model. top: how many of its ranked experts; None for 2.
    experts: experts by name instead, each L12E45 or L12E45=β.
    scale: β of those that do not name one.
    """

    run: Path | None = None
    top: int | None = None
    experts: Sequence[str] = ()
    scale: float = 1.0


@dataclass(frozen=True)
class ExpertEditResult:
    """What an edit of experts changed: the weights, expert → β, and the measured effects, None if not measured."""

    report: EditReport
    experts: Mapping[str, float]
    measured: ExpertEffects | None


def edit_experts(
    model: str,
    out: Path,
    *,
    choice: ExpertSelection,
    data: str | None = None,
    special_tokens: SpecialTokens = "text",
    wanted: bool = True,
    examples: int = 64,
    force: bool = False,
    dtype: str = "auto",
    dry_run: bool = False,
    options: ExecutionOptions = ExecutionOptions(),
) -> ExpertEditResult:
    """Write `model` with the chosen experts' down projections × β to `out`, after measuring the effects.

    Example:
        edit_experts("lab:moe", Path("OUT"), choice=ExpertSelection(...), wanted=False)

    Args:
        data: prompts to measure on; None takes the run's.
        special_tokens: what special tokens in `data` are, see `probes.data.reader.read_data`.
        wanted: False leaves measuring out, and the card reports that.
        examples: prompts at most.
        force: keep a result whose answers collapse.
        dtype: that the models compute in while they are measured.
        options: its device is that of measuring.

    Raises:
        SurgeryError: no experts, or experts that are not there; findings of another model; β is not finite or below 0;
            without a run, the tokenizer does not show how the model thinks; the answers collapse; otherwise as
            `surgery.edits.experts.scale_experts`.
    """
    measured = should_measure("edit experts", wanted=wanted, dry_run=dry_run, run=choice.run, data=data)
    checkpoint = open_checkpoint(model)
    findings = None if choice.run is None else read_expert_findings(choice.run)
    if findings is not None and choice.run is not None:
        check_model(findings, checkpoint, choice.run, options=options)
    scales = select_experts(choice, findings)
    measure = None
    if measured:
        if findings is None:
            _check_thinking(checkpoint)
        generation = options_from_findings(findings.settings) if findings else GenerationOptions()
        prompts = bare_prompts(_examples(data, choice.run, special_tokens), examples, any_topic=True)
        measure = ExpertEffectMeasurement(model, checkpoint.ref, prompts, generation, dtype, force, options)
    # On the CPU: scaling a few matrices is faster than moving them to the device, which is for measuring.
    report = scale_experts(
        model, out, scales=scales, measure=measure, dry_run=dry_run, options=replace(options, device="cpu")
    )
    # By name and in order, as the command prints them and --json has them.
    named = {str(expert): scale for expert, scale in sorted(scales.items())}
    return ExpertEditResult(report, named, None if measure is None else measure.effects)


def select_experts(choice: ExpertSelection, findings: ExpertFindings | None) -> dict[Expert, float]:
    """Return expert → β. Raises SurgeryError if no experts are chosen, or in two ways."""
    if choice.experts and choice.top is not None:
        raise usage_error("--expert names experts, --top chooses them: give one of them.")
    if choice.experts:
        return parse_expert_scales(choice.experts, scale=choice.scale)
    if findings is None:
        raise usage_error("no experts were given.", hint="Name them (--expert L12E45), or give --from RUN --top 2.")
    ranked = findings.ranked
    count = DEFAULT_TOP if choice.top is None else choice.top
    # Unranked experts are not used as a substitute: their scores may be chance.
    if count > len(ranked):
        raise usage_error(
            f"{len(ranked)} experts have evidence enough to be ranked, {count} were asked for",
            where="--top",
            hint="Name experts with --expert to go beyond what the counts support.",
        )
    return {row.name: choice.scale for row in ranked[:count]}


def _examples(data: str | None, run: Path | None, special_tokens: SpecialTokens) -> Sequence[Example]:
    if data is not None:
        return read_data(data, special_tokens=special_tokens).examples
    assert run is not None  # `should_measure` requires one of the two
    return read_examples(run)


def _check_thinking(checkpoint: Checkpoint) -> None:
    """Raise SurgeryError if the model's thinking markers are unknown: before the checkpoint is written, not after."""
    if not checkpoint.side_files.keys() & set(TOKENIZER_FILES):
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
