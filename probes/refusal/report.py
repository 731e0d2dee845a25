"""Write the HTML report of a refusal run: its tables, sentences and figures on one page."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from probes.data.examples import Example, TokenSequence
from probes.data.records import REPORT, read_examples
from probes.refusal import plots
from probes.refusal.cliffs import mean_traces
from probes.refusal.findings import (
    TRACES,
    CausalRecord,
    Findings,
    HeadRecord,
    read_findings,
)
from probes.refusal.heads.plots import cumulative_figure, head_map_figure, screen_figure
from probes.refusal.tables import TABLE_HEADS, keyed_tables, ranked_score, refusal_sentences
from surgery.checkpoint.selectors import Head
from surgery.checkpoint.tensor_file import load_tensors
from surgery.errors import SurgeryError
from surgery.evaluation.statistics import EstimateWithInterval, Floats
from surgery.io.safe_paths import contained_file
from surgery.reporting.report import Figure, Report

AGAIN = "Probe the model again."

FIGURES = ("cliffs", "heads", "probes", "misalignment", "cumulative", "screen")
# Of the lowest head's contribution: a smaller one may differ from 0 and still be negligible.
MARKED_SHARE = 0.1


def write_report(folder: Path, *, name: str) -> Path:
    """Write report.html and its figures into a run's folder, from the findings there; `name` is its final name."""
    findings = read_findings(folder)
    page = Report(f"The refusal cliff of {findings.model.ref}", " ".join(refusal_sentences(findings)))
    for warning in findings.warnings:
        page.add(f"Note: {warning}")
    # An earlier report may have had figures that this one does not. The loop rebinds `name`, so that the page ends with
    # "Folder screen" (known; pages stay as they are until that is changed on purpose).
    for name in FIGURES:
        (folder / f"{name}.png").unlink(missing_ok=True)
    keyed = keyed_tables(findings)
    page.add(keyed.pop("cells"))
    for key, figure in figures(folder, findings).items():
        figure.save(folder / f"{key}.png")
        page.add(figure)
        if key in keyed:
            page.add(keyed.pop(key))
    for table in keyed.values():
        page.add(table)
    page.add(
        f"Folder {name}. Model {findings.model.ref}, weights {findings.model.xxh3}. Data {findings.data.ref}, rows "
        f"{findings.data.xxh3}{f', revision {findings.data.revision}' if findings.data.revision else ''}."
    )
    return page.write(folder / REPORT)


def figures(folder: Path, findings: Findings) -> dict[str, Figure]:
    """Return the figures, by the table that each precedes."""
    by_table: dict[str, Figure] = {}
    examples, sequences, traces = read_traces(folder)
    means = mean_traces(sequences, traces, [e.cell for e in examples], [e.group for e in examples])
    if means:
        closing = max(mean.closing for mean in means.values())
        longest = max(len(mean.band.mean) for mean in means.values())
        segments = {"thinking": 1 - longest, **({"closing template": 1 - closing} if closing else {})}
        by_table["cliffs"] = plots.trace_figure(
            "Refusal, token by token up to the answer",
            {cell: plots.TraceCurve.ending(mean.band) for cell, mean in means.items()},
            segments=segments,
            caption="Mean of the probe's score at each position, aligned at the last token before the answer; bands "
            "are 95 % intervals by bootstrap over groups. Curves end where fewer than three examples reach back.",
        )
    if findings.heads:
        by_table["heads"] = head_map_figure(
            "What each head writes along the probe, at the last token before the answer",
            _head_values(findings),
            marked=_heads_to_mark(findings),
            measure="contribution to the refusal logit" if findings.attribution == "exact" else "along the unit probe",
            caption=f"Mean over {findings.heads_n} {findings.heads_cell} examples. Outlined: of the {TABLE_HEADS} "
            f"lowest, those whose interval lies below 0, and that write at least {MARKED_SHARE:.0%} of what the lowest "
            "does.",
        )
    by_table["probes"] = plots.layer_auroc_figure(
        "Where refusal can be read",
        [row.auroc.estimate for row in findings.probes],
        selectivity=[row.selectivity for row in findings.probes],
        caption="Out of fold. Depth 0 is the embedding, the last one the final norm's output. Selectivity: AUROC less "
        "that of probes trained on shuffled labels.",
    )
    misalignment = _misalignment(examples, sequences, traces)
    if misalignment:
        by_table["misalignment"] = plots.histogram_figure(
            "Misalignment: plateau less final score", misalignment, caption="One value per example."
        )
    if findings.causal is not None:
        by_table |= _proof_figures(findings, findings.causal)
    return by_table


def read_traces(folder: Path) -> tuple[list[Example], list[TokenSequence], list[Floats]]:
    """Read a run's examples, their sequences (segments, with zeros for ids), and the last depth's scores of each."""
    path = contained_file(folder, TRACES)
    examples, stored = read_examples(folder), load_tensors(path, {"ends": ("I64", 2), "scores": (None, 1)}, hint=AGAIN)
    ends = [tuple(int(end) for end in row) for row in stored["ends"]]
    scores = stored["scores"].double().numpy()
    whole = all(len(row) == 4 and 0 <= row[0] <= row[1] <= row[2] <= row[3] for row in ends)
    if not whole or len(ends) != len(examples) or sum(row[3] for row in ends) != len(scores):
        raise SurgeryError(f"does not belong to the {len(examples):,} examples beside it", where=path, hint=AGAIN)
    # Scores are stored one example after the other.
    starts = np.cumsum([0, *(row[3] for row in ends)])
    sequences = [
        TokenSequence(example.key, (0,) * row[3], (row[0], row[1], row[2], row[3]))
        for example, row in zip(examples, ends, strict=True)
    ]
    return examples, sequences, [scores[a:b] for a, b in itertools.pairwise(starts)]


def _proof_figures(findings: Findings, causal: CausalRecord) -> dict[str, Figure]:
    sizes = list(range(len(causal.steps) + 1))
    # No head ablated is the same for random sets.
    random_scores = [causal.base.score.estimate]
    for size in range(len(causal.steps)):
        values = [steps[size].score.value or 0.0 for steps in causal.control]
        if values:
            random_scores.append(EstimateWithInterval(float(np.mean(values)), min(values), max(values)))
    costs = [step.kl.value if step.kl and step.kl.value is not None else float("nan") for step in causal.steps]
    by_table = {}
    if causal.steps:
        by_table["cumulative"] = cumulative_figure(
            "Heads ablated, set by set",
            sizes,
            [step.score.estimate for step in (causal.base, *causal.steps)],
            random=random_scores if causal.control else (),
            kl=[0.0, *costs],
            budget=causal.kl_budget,
            measure="refusal score before the answer",
            caption=f"Greedy sets, ablated at all positions. Random: lowest, mean and highest of {len(causal.control)} "
            "draws of heads that are no candidates.",
        )
    by_name = {Head(row.layer, row.head): row for row in causal.effects}
    rows = [row for row in findings.heads if row.name in by_name]
    marked = set(causal.candidates)
    by_table["screen"] = screen_figure(
        "Screen against proof",
        [findings.score_of(row) for row in rows],
        [by_name[row.name].effect.value or 0.0 for row in rows],
        names=[str(row.name) for row in rows],
        marked=[at for at, row in enumerate(rows) if str(row.name) in marked],
        y="change of the refusal logit when it is ablated",
        caption=f"Marked: candidates. Single heads, {causal.positions} positions.",
    )
    return by_table


def _misalignment(
    examples: Sequence[Example], sequences: Sequence[TokenSequence], traces: Sequence[Floats]
) -> Mapping[str, Sequence[float]]:
    """Return cell → misalignment of each of its examples with thinking."""
    by_cell: dict[str, list[float]] = {}
    for example, sequence, trace in zip(examples, sequences, traces, strict=True):
        thinking = sequence.span("thinking")
        if len(thinking):
            plateau = float(trace[thinking.start : thinking.stop].max())
            by_cell.setdefault(example.cell, []).append(plateau - float(trace[sequence.decision]))
    return by_cell


def _heads_to_mark(findings: Findings) -> list[tuple[int, int]]:
    lowest_score = findings.score_of(findings.ranked[0])
    lowest = [row for row in findings.ranked[:TABLE_HEADS] if findings.score_of(row) <= MARKED_SHARE * lowest_score]
    return [(row.layer, row.head) for row in lowest if _is_below_zero(row)]


def _head_values(findings: Findings) -> Floats:
    layers = 1 + max((*(row.layer for row in findings.heads), *findings.skipped_layers))
    values = np.full((layers, 1 + max(row.head for row in findings.heads)), np.nan)
    for row in findings.heads:
        values[row.layer, row.head] = findings.score_of(row)
    return values


def _is_below_zero(row: HeadRecord) -> bool:
    """Whether the whole interval of a head's attribution is below 0."""
    high = ranked_score(row).high
    return high is not None and high < 0
