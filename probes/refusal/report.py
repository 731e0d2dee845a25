"""A run's findings for people: the tables that the terminal shows, and one HTML page with tables and pictures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from probes.data.examples import Example, TokenSequence
from probes.data.records import REPORT, IntervalRecord, read_examples
from probes.refusal import plots
from probes.refusal.cliffs import mean_traces
from probes.refusal.findings import (
    TRACES,
    CausalRecord,
    Findings,
    GreedyStepRecord,
    HeadRecord,
    ProbeRecord,
    read_findings,
)
from probes.refusal.heads.plots import cumulative_figure, head_map_figure, screen_figure
from probes.refusal.linear.training import CELLS
from surgery.checkpoint.selectors import Head
from surgery.evaluation.statistics import EstimateWithInterval, Floats
from surgery.reporting.report import Column, Figure, Report, Table, Value

PICTURES = ("cliffs", "heads", "probes", "misalignment", "cumulative", "screen")
SHOWN_HEADS = 12
MARKED = 0.1  # of the lowest head's contribution: what is less is told from 0 and is next to nothing all the same
SHOWN_PROBES = 6


def tables(findings: Findings) -> list[Table]:
    """What was found, as tables: cells, probes, cliffs, heads, and the proof where there is one."""
    found = [_cells(findings), _probes("Probes, by depth", findings.probes, findings)]
    if findings.transfer is not None and findings.transfer_data is not None:
        found.append(_probes(f"The same probes on {findings.transfer_data.ref}", findings.transfer, findings))
    if findings.cliffs:
        found.append(_cliffs(findings))
    found.append(_heads(findings))
    if findings.causal is not None:
        found.append(_proof(findings.causal))
    return found


def summary_sentences(findings: Findings) -> list[str]:
    """The finding in words."""
    last = findings.probes[findings.depth]
    said = [
        f"The probe after the final norm tells refused from complied with an AUROC of {last.auroc.text()} "
        f"({findings.folds}-fold, by groups)."
    ]
    row = next((cliff for cliff in findings.cliffs if cliff.cell == findings.heads_cell), None)
    if row is not None:
        onset = "" if row.onset is None else f"; it falls {_before_answer(row.onset)}"
        said.append(
            f"On {row.cell} examples (n = {row.n}) refusal stands at {row.plateau.text()} in the thinking and at "
            f"{row.final.text()} just before the answer{onset}."
        )
        # The highest of many scores is high by chance, too: harmless examples show how high.
        calm = next((cliff for cliff in findings.cliffs if cliff.cell == "harmless/complied"), None)
        if calm is not None and calm is not row:
            said.append(f"For comparison, {calm.cell} (n = {calm.n}): {calm.plateau.text()} and {calm.final.text()}.")
    lowest = next(iter(findings.ranked), None)
    if lowest is not None and findings.score_of(lowest) < 0:
        size = f" ({findings.score_of(lowest):.3g} on the probe's logit)" if findings.attribution == "exact" else ""
        said.append(f"The head that writes most against refusal there is {lowest.name}{size}.")
    else:
        said.append("No head writes against refusal there." if findings.heads else "No head is understood.")
    if findings.causal is not None:
        said.append(_verdict(findings.causal))
    return said


def write_report(folder: Path, *, name: str) -> Path:
    """Writes report.html and its pictures into a run's folder, from what lies there. `name` is what it is called."""
    findings = read_findings(folder)
    page = Report(f"The refusal cliff of {findings.model.ref}", " ".join(summary_sentences(findings)))
    for warning in findings.warnings:
        page.add(f"Note: {warning}")
    for name in PICTURES:
        (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier report, which had more to show
    shown = dict(zip(("cells", "probes", *_rest(findings)), tables(findings), strict=True))
    page.add(shown.pop("cells"))
    for key, figure in figures(folder, findings).items():
        figure.save(folder / f"{key}.png")
        page.add(figure)
        if key in shown:
            page.add(shown.pop(key))
    for table in shown.values():
        page.add(table)
    page.add(
        f"Folder {name}. Model {findings.model.ref}, weights {findings.model.xxh3}. Data {findings.data.ref}, rows "
        f"{findings.data.xxh3}{f', revision {findings.data.revision}' if findings.data.revision else ''}."
    )
    return page.write(folder / REPORT)


def figures(folder: Path, findings: Findings) -> dict[str, Figure]:
    """The pictures, by the table that each stands above."""
    found: dict[str, Figure] = {}
    examples, sequences, traces = read_traces(folder)
    drawn = mean_traces(sequences, traces, [e.cell for e in examples], [e.group for e in examples])
    if drawn:
        closing = max(curve.closing for curve in drawn.values())
        longest = max(len(curve.band.mean) for curve in drawn.values())
        segments = {"thinking": 1 - longest, **({"closing template": 1 - closing} if closing else {})}
        found["cliffs"] = plots.trace_figure(
            "Refusal, token by token up to the answer",
            {cell: plots.TraceCurve.ending(curve.band) for cell, curve in drawn.items()},
            segments=segments,
            caption="Mean of the probe's score at each position, aligned at the last token before the answer; bands "
            "are 95 % intervals by bootstrap over groups. Curves end where fewer than three examples reach back.",
        )
    if findings.heads:
        found["heads"] = head_map_figure(
            "What each head writes along the probe, at the last token before the answer",
            _head_values(findings),
            marked=_marked(findings),
            measure="contribution to the refusal logit" if findings.attribution == "exact" else "along the unit probe",
            caption=f"Mean over {findings.heads_n} {findings.heads_cell} examples. Outlined: of the {SHOWN_HEADS} "
            f"lowest, those whose interval lies below 0, and that write at least {MARKED:.0%} of what the lowest does.",
        )
    found["probes"] = plots.layer_auroc_figure(
        "Where refusal can be read",
        [row.auroc.estimate for row in findings.probes],
        selectivity=[row.selectivity for row in findings.probes],
        caption="Out of fold. Depth 0 is the embedding, the last one the final norm's output. Selectivity: AUROC less "
        "that of probes trained on shuffled labels.",
    )
    misalignment = _misalignment(examples, sequences, traces)
    if misalignment:
        found["misalignment"] = plots.histogram_figure(
            "Misalignment: plateau less final score", misalignment, caption="One value per example."
        )
    if findings.causal is not None:
        found |= _proof_figures(findings, findings.causal)
    return found


def read_traces(folder: Path) -> tuple[list[Example], list[TokenSequence], list[Floats]]:
    """A run's examples, their segments (without ids) and the last depth's scores of each."""
    examples, stored = read_examples(folder), load_file(folder / TRACES)
    ends = [tuple(int(end) for end in row) for row in stored["ends"]]
    scores = stored["scores"].double().numpy()
    starts = np.cumsum([0, *(row[3] for row in ends)])
    sequences = [
        TokenSequence(example.key, (0,) * row[3], (row[0], row[1], row[2], row[3]))
        for example, row in zip(examples, ends, strict=True)
    ]
    return examples, sequences, [scores[a:b] for a, b in itertools.pairwise(starts)]


def _rest(findings: Findings) -> list[str]:
    return [
        *(["transfer"] if findings.transfer is not None else []),
        *(["cliffs"] if findings.cliffs else []),
        "heads",
        *(["cumulative"] if findings.causal is not None else []),
    ]


def _cells(findings: Findings) -> Table:
    known = [(cell, findings.cells.get(cell, 0)) for cell in CELLS]
    others = [(cell, count) for cell, count in findings.cells.items() if cell not in CELLS]
    note = f"{findings.generated} examples were completed by the model"
    note += f"; {findings.never_closed} never closed their thinking and are left out." if findings.never_closed else "."
    return Table("Examples", ["cell", Column("examples", "count")], [*known, *others], note=note)


def _probes(title: str, rows: Sequence[ProbeRecord], findings: Findings) -> Table:
    step = max(1, round((len(rows) - 1) / (SHOWN_PROBES - 1)))
    shown = sorted({*range(0, len(rows), step), len(rows) - 1})
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
        for at in shown
    ]
    note = f"On examples that a probe was not fitted to. Depth {findings.depth} is after the final norm."
    return Table(title, columns, body, note=note)


def _cliffs(findings: Findings) -> Table:
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


def _heads(findings: Findings) -> Table:
    columns = [
        Column("head"),
        Column("contribution", "number"),
        Column("95 % from", "number"),
        Column("to", "number"),
        Column("paper's form", "number"),
    ]
    rows: list[Sequence[Value]] = []
    for row in findings.ranked[:SHOWN_HEADS]:
        chosen = _shown(row)
        rows.append((str(row.name), chosen.value, chosen.low, chosen.high, row.paper.value))
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


def _proof(causal: CausalRecord) -> Table:
    columns = [
        Column("ablated"),
        Column("score", "score"),
        Column("refusal", "percent"),
        Column("harmless refused", "percent"),
        Column("KL", "number"),
        Column("perplexity", "number"),
    ]
    rows = [_step("none", causal.base)]
    rows += [_step(f"{size}: + {step.heads[-1]}", step) for size, step in enumerate(causal.steps, start=1)]
    rows += [_step(f"random {number} ({len(steps)} heads)", steps[-1]) for number, steps in enumerate(causal.control)]
    note = (
        f"Ablation: {causal.ablation}, at all positions. Score: the probe's, just before the answer, on {causal.n} "
        f"{causal.cell} examples; refusal: of their answers. KL on harmless answers, nats per token. Stopped: "
        f"{causal.stopped}. Single heads were ablated at {causal.positions} positions ({causal.method}); rank "
        f"correlation of screen and proof {causal.spearman.text()}."
    )
    return Table("Heads ablated, set by set", columns, rows, note=note)


def _step(name: str, step: GreedyStepRecord) -> Sequence[Value]:
    return (
        name,
        step.score.value,
        *(None if x is None else x.value for x in (step.refusal, step.harmless_refusal, step.kl)),
        step.perplexity,
    )


def _verdict(causal: CausalRecord) -> str:
    if not causal.steps:
        return f"No set of heads was found: {causal.stopped}."
    before, after = causal.base.refusal, causal.steps[-1].refusal
    ends = [steps[-1].refusal for steps in causal.control]
    most = max((rate.value for rate in ends if rate is not None and rate.value is not None), default=None)
    control = "" if most is None else f"; as many random heads give at most {most:.0%}"
    heads = ", ".join(causal.steps[-1].heads)
    if before is None or after is None:
        return f"Ablating {heads} raises the probe's score to {causal.steps[-1].score.text()}."
    return f"Ablating {heads} takes refusal from {before.value:.0%} to {after.value:.0%}{control}."


def _proof_figures(findings: Findings, causal: CausalRecord) -> dict[str, Figure]:
    sizes = list(range(len(causal.steps) + 1))
    bands, costs = [causal.base.score.estimate], []
    for size in range(len(causal.steps)):
        values = [steps[size].score.value or 0.0 for steps in causal.control]
        if values:
            bands.append(EstimateWithInterval(float(np.mean(values)), min(values), max(values)))
    costs = [step.kl.value if step.kl and step.kl.value is not None else float("nan") for step in causal.steps]
    found = {}
    if causal.steps:
        found["cumulative"] = cumulative_figure(
            "Heads ablated, set by set",
            sizes,
            [step.score.estimate for step in (causal.base, *causal.steps)],
            random=bands if causal.control else (),
            kl=[0.0, *costs],
            budget=causal.kl_budget,
            measure="refusal score before the answer",
            caption=f"Greedy sets, ablated at all positions. Random: lowest, mean and highest of {len(causal.control)} "
            "draws of heads that are no candidates.",
        )
    by_name = {Head(row.layer, row.head): row for row in causal.effects}
    rows = [row for row in findings.heads if row.name in by_name]
    marked = set(causal.candidates)
    found["screen"] = screen_figure(
        "Screen against proof",
        [findings.score_of(row) for row in rows],
        [by_name[row.name].effect.value or 0.0 for row in rows],
        names=[str(row.name) for row in rows],
        marked=[at for at, row in enumerate(rows) if str(row.name) in marked],
        y="change of the refusal logit when it is ablated",
        caption=f"Marked: candidates. Single heads, {causal.positions} positions.",
    )
    return found


def _misalignment(
    examples: Sequence[Example], sequences: Sequence[TokenSequence], traces: Sequence[Floats]
) -> Mapping[str, Sequence[float]]:
    found: dict[str, list[float]] = {}
    for example, sequence, trace in zip(examples, sequences, traces, strict=True):
        thinking = sequence.span("thinking")
        if len(thinking):
            plateau = float(trace[thinking.start : thinking.stop].max())
            found.setdefault(example.cell, []).append(plateau - float(trace[sequence.decision]))
    return found


def _marked(findings: Findings) -> list[tuple[int, int]]:
    most = findings.score_of(findings.ranked[0])
    lowest = [row for row in findings.ranked[:SHOWN_HEADS] if findings.score_of(row) <= MARKED * most]
    return [(row.layer, row.head) for row in lowest if _is_below(row)]


def _head_values(findings: Findings) -> Floats:
    layers = 1 + max((*(row.layer for row in findings.heads), *findings.skipped_layers))
    values = np.full((layers, 1 + max(row.head for row in findings.heads)), np.nan)
    for row in findings.heads:
        values[row.layer, row.head] = findings.score_of(row)
    return values


def _before_answer(onset: float) -> str:
    """An onset in words: 0 is the last token before the answer."""
    if onset == 0:
        return "at the last token before the answer"
    return f"{-onset:g} token{'s' * (onset != -1)} earlier"


def _shown(row: HeadRecord) -> IntervalRecord:
    return row.exact or row.paper


def _is_below(row: HeadRecord) -> bool:
    high = _shown(row).high
    return high is not None and high < 0
