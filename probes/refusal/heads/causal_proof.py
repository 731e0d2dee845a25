"""Prove by ablation which of the heads that a run screened suppress refusal.

Heads are ablated one by one, which shows how well the screen ranked them, then in sets. A set grows by the head that
helps most, as long as the KL on harmless answers stays within a budget; random sets of the same sizes are the control.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from probes.data.records import IntervalRecord, interval_record, parse_top
from probes.model.ablation import AblationSweep
from probes.refusal.findings import (
    CausalRecord,
    EffectRecord,
    Findings,
    GreedyStepRecord,
    read_findings,
    write_findings,
)
from probes.refusal.heads.ablation_study import HARMLESS, AblationStudy, ProofOptions
from probes.refusal.probed_model import open_probed_model
from surgery.checkpoint.selectors import Head
from surgery.engine.options import ExecutionOptions
from surgery.errors import SurgeryError, usage_error
from surgery.evaluation.statistics import bootstrap_mean, spearman
from surgery.io.output_folder import extended_output
from surgery.runtime.collectives import on_main

# 5 % of a small model's heads are one or two, too few for a set to grow from.
LEAST_CANDIDATES = 6
NO_BUDGET_NOTE = (
    f"No example is {HARMLESS}: what ablations do to harmless answers was not measured, and no budget held."
)


def prove_heads(
    model: str,
    run: Path,
    *,
    proof: ProofOptions = ProofOptions(),
    dtype: str = "auto",
    batch_tokens: int | None = None,
    options: ExecutionOptions = ExecutionOptions(),
) -> Findings:
    """Ablate heads of `model`, add the effects to the findings in `run`, and write the report again.

    Example:
        prove_heads("lab:cliff", Path("RUN"))

    Raises:
        SurgeryError: `run` has findings of another model, or none; an option is out of range; heads were scored on
            harmless examples, because there were no others, or none writes against refusal.
    """
    findings = read_findings(run)
    n_candidates = _check(findings, run, proof)
    probed = open_probed_model(model, findings, run, dtype=dtype, options=options)
    study = AblationStudy(probed, run, proof, batch_tokens=batch_tokens, options=options)
    effects = study.ablate_single_heads()
    candidates = [row.name for row in findings.ranked[:n_candidates] if findings.score_of(row) < 0]
    if not candidates:
        raise SurgeryError("no head writes against refusal: every attribution is above 0", where=run)
    # By the same code as the sets, so that its numbers can be compared with theirs.
    base = study.measure_set(())
    steps, stopped = study.grow(candidates)
    causal = CausalRecord(
        ablation=proof.kind if proof.kind != "scale" else f"scale {proof.scale:g}",
        positions="all" if proof.positions is None else f"last {study.last}",
        method=effects.method,
        cell=findings.heads_cell,
        n=len(study.scored.examples),
        effects=_effect_records(effects, study.scored.groups),
        spearman=_rank_correlation(findings, effects),
        candidates=[str(head) for head in candidates],
        base=base,
        steps=steps,
        stopped=stopped,
        control=_measure_controls(study, candidates, len(steps), proof, options),
        kl_budget=proof.budget,
    )
    warnings = list(findings.warnings)
    # Only once, for a proof can be repeated on the same findings.
    if not study.harmless and NO_BUDGET_NOTE not in warnings:
        warnings.append(NO_BUDGET_NOTE)
    proven = findings.model_copy(update={"causal": causal, "warnings": warnings})
    on_main(_write, run, proven)
    return proven


def _check(findings: Findings, run: Path, proof: ProofOptions) -> int:
    """Return the number of candidates; raise SurgeryError for what can be seen without any ablation."""
    if not math.isfinite(proof.scale):
        raise usage_error(f"got {proof.scale}, expected a finite number", where="--scale")
    if proof.scale == 1 and proof.kind == "scale":
        raise usage_error("got 1, which leaves heads as they are", where="--scale")
    if not proof.budget >= 0:
        raise usage_error(f"got {proof.budget}, expected 0 or more", where="--kl-budget")
    if findings.heads_cell.startswith("harmless"):
        raise usage_error(
            f"its heads were scored on {findings.heads_cell} examples, because it has no others: there is no refusal "
            "to bring back",
            where=run,
            hint="Probe the model on harmful examples, too.",
        )
    count = len(findings.heads)
    if not count:
        raise SurgeryError("has no heads that are understood", where=run)
    requested = parse_top(proof.top, count)
    # Random sets are drawn from the heads that are no candidates, and are as large.
    if proof.controls and requested > count // 2:
        raise usage_error(
            f"got {proof.top!r}, which is {requested} of {count} heads: too few are left to draw as many at random",
            where="--top",
            hint=f"Use --top {count // 2} at most, or --controls 0.",
        )
    return max(requested, min(LEAST_CANDIDATES, count // 2))


def _measure_controls(
    study: AblationStudy, candidates: Sequence[Head], size: int, proof: ProofOptions, options: ExecutionOptions
) -> list[list[GreedyStepRecord]]:
    control = []
    with options.progress("Random heads", proof.controls, "steps") as advance:
        for number in range(proof.controls if size else 0):
            # A seed of its own for each set, so that more controls leave the first ones as they were.
            control.append(study.random_sets(candidates, size, proof.seed + number))
            advance(1)
    return control


def _effect_records(effects: AblationSweep, groups: Sequence[str]) -> list[EffectRecord]:
    band = bootstrap_mean(effects.effects.numpy(), groups=groups)
    return [
        EffectRecord(layer=head.layer, head=head.index, effect=interval_record(band.at(column), len(groups)))
        for column, head in enumerate(effects.heads)
    ]


def _rank_correlation(findings: Findings, effects: AblationSweep) -> IntervalRecord:
    """How well the screen ranks heads by their causal effect: a low attribution should go with a large effect."""
    means = effects.effects.mean(0)
    effect_of = {head: float(value) for head, value in zip(effects.heads, means, strict=True)}
    scores = [-findings.score_of(row) for row in findings.heads]
    return interval_record(spearman(scores, [effect_of[row.name] for row in findings.heads]), len(scores))


def _write(run: Path, findings: Findings) -> None:
    # Matplotlib is slow to import, and only the process that writes needs it.
    from probes.refusal.report import write_report

    with extended_output(run):
        write_findings(run, findings)
        write_report(run, name=str(run))
