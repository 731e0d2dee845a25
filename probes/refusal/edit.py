"""Scale heads in a checkpoint, or replace them by their means, and measure the result before it is committed.

Heads are chosen by name, or as the lowest or the proven ones of a run's findings. The edited checkpoint is that of
`surgery.edits.heads` (arXiv 2510.06036, in the weights instead of by hooks), and its card reports the measured effects
(`probes.refusal.edit_effects`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from probes.data.choices import EditMode
from probes.data.examples import Example
from probes.data.preparation import GenerationOptions, options_from_findings
from probes.data.reader import read_data
from probes.data.records import check_model, parse_top, read_examples
from probes.refusal.edit_effects import HeadEffectMeasurement, HeadEffects
from probes.refusal.findings import HEADS, Findings, read_findings
from probes.side_effects.compare import bare_prompts, should_measure
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.selectors import Head, parse_head_scales
from surgery.edits.heads import mean_heads, scale_heads
from surgery.engine.edit_report import EditReport
from surgery.engine.options import ExecutionOptions
from surgery.errors import usage_error
from surgery.io.safe_paths import contained_file
from surgery.models.choices import SpecialTokens


@dataclass(frozen=True)
class HeadSelection:
    """Which heads to edit, and how.

    Args:
        run: a folder with findings of the model; effects are measured on its examples, too.
        top: the lowest heads of the run, as a share or a count.
        proven: the set that `surgery probe heads` grew instead.
        heads: heads by name, each L12H7 or L12H7=γ.
        scale: γ of heads that do not name one.
        mode: scale multiplies the heads' outputs by γ; mean replaces them by the run's means.
    """

    run: Path | None = None
    top: str | None = None
    proven: bool = False
    heads: Sequence[str] = ()
    scale: float = 0.0
    mode: EditMode = "scale"


@dataclass(frozen=True)
class EffectOptions:
    """How the effects of an edit are measured.

    Args:
        data: examples with a topic; None takes the run's.
        wanted: False leaves measuring out, and the card reports that.
        examples: prompts of each topic at most.
        force: keep a result in which refusal of harmful prompts fell.
        asking: how answers are generated; None takes the run's options.
        special_tokens: what special tokens in `data` are, see `probes.data.reader.read_data`.
    """

    data: str | None = None
    wanted: bool = True
    examples: int = 64
    force: bool = False
    asking: GenerationOptions | None = None
    special_tokens: SpecialTokens = "text"


@dataclass(frozen=True)
class HeadEditResult:
    """What an edit of heads changed: the weights, head → γ, and the measured effects, None if not measured."""

    report: EditReport
    heads: Mapping[str, float]
    measured: HeadEffects | None


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
    """Write `model` with the chosen heads scaled, or replaced by their means, to `out`, after measuring the effects.

    Example:
        edit_heads("lab:cliff", Path("OUT"), choice=HeadSelection(...), measuring=EffectOptions(...))

    Args:
        dtype: that the models compute in while they are measured.
        options: its device is that of measuring.

    Raises:
        SurgeryError: no heads, or heads that are not there; findings of another model; means without a bias to hold
            them; refusal of harmful prompts fell; otherwise as `surgery.edits.heads.scale_heads`.
    """
    measured = should_measure(
        "edit heads", wanted=measuring.wanted, dry_run=dry_run, run=choice.run, data=measuring.data
    )
    # Headers only: the weights are read when they are written.
    checkpoint = open_checkpoint(model)
    findings = None if choice.run is None else read_findings(choice.run)
    if findings is not None and choice.run is not None:
        check_model(findings, checkpoint, choice.run, options=options)
    scales = select_heads(choice, findings)
    # Prepared before anything is written: missing prompts or a wrong phrase file must not cost a checkpoint.
    measure = None
    if measured:
        prompts = _prompts(choice.run, measuring)
        generation = measuring.asking or (options_from_findings(findings.settings) if findings else GenerationOptions())
        measure = HeadEffectMeasurement(
            model, checkpoint.ref, prompts, generation, dtype=dtype, force=measuring.force, options=options
        )
    # On the CPU: scaling a few columns is faster than moving them to the device, which is for measuring.
    writing = replace(options, device="cpu")
    if choice.mode == "mean":
        assert choice.run is not None  # `select_heads` requires it
        means = contained_file(choice.run, HEADS)
        report = mean_heads(model, out, heads=scales, means=means, measure=measure, dry_run=dry_run, options=writing)
    else:
        report = scale_heads(model, out, scales=scales, measure=measure, dry_run=dry_run, options=writing)
    named = {str(head): scale for head, scale in sorted(scales.items())}
    return HeadEditResult(report, named, None if measure is None else measure.effects)


def select_heads(choice: HeadSelection, findings: Findings | None) -> dict[Head, float]:
    """Return head → γ. Raises SurgeryError if no heads are chosen, or in two ways."""
    # Options by their names on the command line: the messages are for its users.
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
    # Scaling a head that writes for refusal would weaken it, the opposite of a repair.
    if wrong := [row for row in lowest if findings.score_of(row) >= 0]:
        raise usage_error(
            f"{len(wrong)} of the {count} lowest heads do not write against refusal: {wrong[0].name} has an "
            f"attribution of {findings.score_of(wrong[0]):.3g}",
            where="--top",
            hint=f"Use --top {count - len(wrong)}." if count > len(wrong) else "There is nothing to repair here.",
        )
    return {row.name: choice.scale for row in lowest}


def _prompts(run: Path | None, measuring: EffectOptions) -> list[Example]:
    """Return the prompts to measure on: those of `measuring.data`, or of the run."""
    examples: Sequence[Example]
    if measuring.data is not None:
        examples = read_data(measuring.data, special_tokens=measuring.special_tokens).examples
    else:
        assert run is not None  # `should_measure` requires one of the two
        examples = read_examples(run)
    prompts = bare_prompts(examples, measuring.examples)
    if not any(example.topic == "harmful" for example in prompts):
        raise usage_error(
            "no example is harmful, so that it cannot be seen whether refusal fell",
            where=measuring.data or run,
            hint="Give data with labels, or --no-measure.",
        )
    return prompts
