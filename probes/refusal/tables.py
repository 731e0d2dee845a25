"""Refusal findings as tables and sentences, which the terminal and the report show."""

from __future__ import annotations

from collections.abc import Sequence

from probes.data.records import IntervalRecord
from probes.refusal.findings import CausalRecord, Findings, GreedyStepRecord, HeadRecord, ProbeRecord
from probes.refusal.linear.training import CELLS
from surgery.reporting.report import Column, Table, Value

# Rows: a table should fit a terminal; results.json has all heads and depths.
TABLE_HEADS = 12
TABLE_PROBES = 6


def refusal_tables(findings: Findings) -> list[Table]:
    """Return the tables of cells, probes, cliffs and heads, and of the ablated sets if heads were proven."""
    return list(keyed_tables(findings).values())


def keyed_tables(findings: Findings) -> dict[str, Table]:
    """Return the tables in their order, by the figure that each follows in the report."""
    keyed = {
        "cells": _cells_table(findings),
        "probes": _probes_table("Probes, by depth", findings.probes, findings),
    }
    if findings.transfer is not None and findings.transfer_data is not None:
        title = f"The same probes on {findings.transfer_data.ref}"
        keyed["transfer"] = _probes_table(title, findings.transfer, findings)
    if findings.cliffs:
        keyed["cliffs"] = _cliffs_table(findings)
    keyed["heads"] = _heads_table(findings)
    if findings.causal is not None:
        keyed["cumulative"] = _proof_table(findings.causal)
    return keyed


def refusal_sentences(findings: Findings) -> list[str]:
    """Return the main results as sentences."""
    last = findings.probes[findings.depth]
    sentences = [
        f"The probe after the final norm tells refused from complied with an AUROC of {last.auroc.text()} "
        f"({findings.folds}-fold, by groups)."
    ]
    row = next((cliff for cliff in findings.cliffs if cliff.cell == findings.heads_cell), None)
    if row is not None:
        onset = "" if row.onset is None else f"; it falls {_before_answer(row.onset)}"
        sentences.append(
            f"On {row.cell} examples (n = {row.n}) refusal stands at {row.plateau.text()} in the thinking and at "
            f"{row.final.text()} just before the answer{onset}."
        )
        # The highest of many scores is high by chance, too: harmless examples show how high.
        harmless = next((cliff for cliff in findings.cliffs if cliff.cell == "harmless/complied"), None)
        if harmless is not None and harmless is not row:
            sentences.append(
                f"For comparison, {harmless.cell} (n = {harmless.n}): {harmless.plateau.text()} and "
                f"{harmless.final.text()}."
            )
    lowest = next(iter(findings.ranked), None)
    if lowest is not None and findings.score_of(lowest) < 0:
        size = f" ({findings.score_of(lowest):.3g} on the probe's logit)" if findings.attribution == "exact" else ""
        sentences.append(f"The head that writes most against refusal there is {lowest.name}{size}.")
    else:
        sentences.append("No head writes against refusal there." if findings.heads else "No head is understood.")
    if findings.causal is not None:
        sentences.append(_proof_sentence(findings.causal))
    return sentences


def _cells_table(findings: Findings) -> Table:
    # The four cells even where they are empty: a missing one limits what the probe can know.
    known = [(cell, findings.cells.get(cell, 0)) for cell in CELLS]
    others = [(cell, count) for cell, count in findings.cells.items() if cell not in CELLS]
    note = f"{findings.generated} examples were completed by the model"
    note += f"; {findings.never_closed} never closed their thinking and are left out." if findings.never_closed else "."
    return Table("Examples", ["cell", Column("examples", "count")], [*known, *others], note=note)


def _probes_table(title: str, rows: Sequence[ProbeRecord], findings: Findings) -> Table:
    step = max(1, round((len(rows) - 1) / (TABLE_PROBES - 1)))
    # The last depth is always there: cliffs and heads are measured with its probe.
    depths = sorted({*range(0, len(rows), step), len(rows) - 1})
    columns = [
        Column("depth", "count"),
        Column("AUROC", "score"),
        Column("95 % from", "score"),
        Column("to", "score"),
        Column("accuracy", "percent"),
        Column("calibration error", "score"),
        Column("selectivity", "score"),
    ]
    body: list[Sequence[Value]] = [
        (
            rows[at].depth,
            rows[at].auroc.value,
            rows[at].auroc.low,
            rows[at].auroc.high,
            rows[at].accuracy.value,
            rows[at].ece,
            rows[at].selectivity,
        )
        for at in depths
    ]
    note = f"On examples that a probe was not fitted to. Depth {findings.depth} is after the final norm."
    return Table(title, columns, body, note=note)


def _cliffs_table(findings: Findings) -> Table:
    columns = [
        Column("cell"),
        Column("n", "count"),
        Column("plateau"),
        Column("90th percentile", "score"),
        Column("end of thinking", "score"),
        Column("final"),
        Column("misalignment"),
        Column("onset", "number"),
    ]
    rows: list[Sequence[Value]] = [
        (
            row.cell,
            row.n,
            row.plateau.text(),
            row.p90.value,
            row.last.value,
            row.final.text(),
            row.misalignment.text(),
            row.onset,
        )
        for row in findings.cliffs
    ]
    note = (
        "Refusal scores: plateau is the highest in the thinking, final that of the last token before the answer, "
        "misalignment their difference; onset the token at which the score falls for good, counted from there (median)."
    )
    return Table("Cliffs", columns, rows, note=note)


def _heads_table(findings: Findings) -> Table:
    columns = [
        Column("head"),
        Column("contribution", "number"),
        Column("95 % from", "number"),
        Column("to", "number"),
        Column("paper's form", "number"),
    ]
    rows: list[Sequence[Value]] = []
    for row in findings.ranked[:TABLE_HEADS]:
        score = ranked_score(row)
        rows.append((str(row.name), score.value, score.low, score.high, row.paper.value))
    note = f"The lowest of {len(findings.heads)} heads on {findings.heads_n} {findings.heads_cell} examples. "
    if findings.unexplained is not None:
        note += (
            "Contributions are in units of the probe's logit; with the other parts they sum to it but for "
            f"{findings.unexplained:.1g} of its size. "
        )
    if findings.skipped_layers:
        layers = ", ".join(map(str, findings.skipped_layers))
        note += f"Layers without heads that are understood, skipped: {layers}."
    return Table("Heads that write against refusal", columns, rows, note=note.strip())


def _proof_table(causal: CausalRecord) -> Table:
    columns = [
        Column("ablated"),
        Column("score", "score"),
        Column("refusal", "percent"),
        Column("harmless refused", "percent"),
        Column("KL", "number"),
        Column("perplexity", "number"),
    ]
    rows = [_step_row("none", causal.base)]
    rows += [_step_row(f"{size}: + {step.heads[-1]}", step) for size, step in enumerate(causal.steps, start=1)]
    rows += [
        _step_row(f"random {number} ({len(steps)} heads)", steps[-1])
        for number, steps in enumerate(causal.control)
        if steps
    ]
    note = (
        f"Ablation: {causal.ablation}, at all positions. Score: the probe's, just before the answer, on {causal.n} "
        f"{causal.cell} examples; refusal: of their answers. KL on harmless answers, nats per token. Stopped: "
        f"{causal.stopped}. Single heads were ablated at {causal.positions} positions ({causal.method}); rank "
        f"correlation of screen and proof {causal.spearman.text()}."
    )
    return Table("Heads ablated, set by set", columns, rows, note=note)


def _step_row(name: str, step: GreedyStepRecord) -> Sequence[Value]:
    return (
        name,
        step.score.value,
        *(None if x is None else x.value for x in (step.refusal, step.harmless_refusal, step.kl)),
        step.perplexity,
    )


def _proof_sentence(causal: CausalRecord) -> str:
    if not causal.steps:
        return f"No set of heads was found: {causal.stopped}."
    before, after = causal.base.refusal, causal.steps[-1].refusal
    # Answers were only generated for the largest random sets.
    ends = [steps[-1].refusal for steps in causal.control if steps]
    most = max((rate.value for rate in ends if rate is not None and rate.value is not None), default=None)
    control = "" if most is None else f"; as many random heads give at most {most:.0%}"
    heads = ", ".join(causal.steps[-1].heads)
    # Findings may lack verdicts; the score is always there.
    if before is None or after is None or before.value is None or after.value is None:
        return f"Ablating {heads} raises the probe's score to {causal.steps[-1].score.text()}."
    return f"Ablating {heads} takes refusal from {before.value:.0%} to {after.value:.0%}{control}."


def _before_answer(onset: float) -> str:
    """Return an onset in words; 0 is the last token before the answer."""
    if onset == 0:
        return "at the last token before the answer"
    return f"{-onset:g} token{'s' * (onset != -1)} earlier"


def ranked_score(row: HeadRecord) -> IntervalRecord:
    """The attribution of a head by which it is ranked, with its interval."""
    return row.exact or row.paper
