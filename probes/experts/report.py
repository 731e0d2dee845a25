"""Report findings about experts: tables and sentences for the terminal, and an HTML page with tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from probes.data.records import REPORT
from probes.experts import plots
from probes.experts.findings import (
    ExpertFindings,
    ExpertRecord,
    PointRecord,
    SweepRecord,
    read_expert_findings,
)
from surgery.evaluation.statistics import EstimateWithInterval, Floats
from surgery.reporting.report import Column, Figure, Report, Table, Value

TABLE_EXPERTS = 12  # rows of the table, and outlined experts of the map
PLOTTED_EXPERTS = 15  # in the plot of the ranking


def expert_tables(findings: ExpertFindings) -> list[Table]:
    """Return the tables of the counts, of the best experts, and of the sweep if there is one."""
    tables = [_counts_table(findings), _ranking_table(findings)]
    if findings.sweep is not None:
        tables.append(_sweep_table(findings.sweep))
    return tables


def expert_sentences(findings: ExpertFindings) -> list[str]:
    """Return the main results as sentences."""
    ranked = findings.ranked
    if not ranked:
        return ["No expert has evidence enough to be ranked."]
    first = ranked[0]
    sentences = [
        f"{first.name} goes most with the markers: nPMI {first.npmi:.3f} as published, {first.smoothed.text()} "
        f"smoothed; it fires at {first.rate:.1%} of all positions."
    ]
    # The published score favours rare experts; readers who know the paper will look for its first.
    published = min(findings.experts, key=lambda row: row.published_rank)
    if published.name != first.name:
        sentences.append(
            f"By the published score alone {published.name} would come first ({published.why or 'ranked below'})."
        )
    if findings.overlap is not None:
        sentences.append(
            f"Of the first {findings.overlap.top}, {len(findings.overlap.shared)} are among those of "
            f"{findings.overlap.data.ref}, too."
        )
    if findings.sweep is not None:
        sentences.append(_sweep_sentence(findings.sweep))
    return sentences


def write_expert_report(folder: Path, *, name: str) -> Path:
    """Write report.html and its plots into a run's folder, from the findings there; `name` is its final name."""
    findings = read_expert_findings(folder)
    page = Report(f"The cognitive experts of {findings.model.ref}", " ".join(expert_sentences(findings)))
    for warning in findings.warnings:
        page.add(f"Note: {warning}")
    counted, ranking, *rest = expert_tables(findings)
    figures = _figures(findings)
    for key, figure in figures.items():
        figure.save(folder / f"{key}.png")
    page.add(counted).add(figures["experts"])
    if "ranking" in figures:
        page.add(figures["ranking"])
    page.add(ranking)
    for key, figure in figures.items():
        if key.startswith("beta"):
            page.add(figure)
    for table in rest:
        page.add(table)
    page.add(
        f"Folder {name}. Model {findings.model.ref}, weights {findings.model.xxh3}. Data {findings.data.ref}, rows "
        f"{findings.data.xxh3}{f', revision {findings.data.revision}' if findings.data.revision else ''}."
    )
    return page.write(folder / REPORT)


def _figures(findings: ExpertFindings) -> dict[str, Figure]:
    ranked = findings.ranked
    figures = {
        "experts": plots.expert_map(
            "nPMI of every expert with the markers",
            _npmi_grid(findings),
            layers=findings.layers,
            marked=[(row.layer, row.expert) for row in ranked[:TABLE_EXPERTS]],
            measure="nPMI, as published",
            caption=f"Counted on {findings.sequences} texts, {findings.positions:,} positions. Outlined: the first "
            f"{min(TABLE_EXPERTS, len(ranked))} that are ranked.",
        )
    }
    if ranked:
        best = ranked[:PLOTTED_EXPERTS]
        figures["ranking"] = plots.ranking(
            "The experts that go most with the markers",
            [str(row.name) for row in best],
            [row.smoothed.estimate for row in best],
            published=[row.npmi for row in best],
            caption="Smoothed score with its 95 % interval by bootstrap over documents; hollow: as published.",
        )
    if findings.sweep is not None:
        for index, task in enumerate(findings.sweep.tasks):
            figures[f"beta-{index}"] = _beta_curve(findings.sweep, task)
    return figures


def _beta_curve(sweep: SweepRecord, task: str) -> Figure:
    grid = sorted((p for p in sweep.points if p.control is None and p.part == "choice"), key=lambda p: p.beta)
    # The band spans the random sets themselves: with a handful of them an interval would claim too much.
    controls = [p for p in sweep.points if p.control is not None]
    values = [p.scores[task].value or 0.0 for p in controls]
    band = None
    if controls:
        band = (controls[0].beta, EstimateWithInterval(float(np.mean(values)), min(values), max(values)))
    unchanged = next(p for p in grid if p.beta == 1)
    return plots.beta_curve(
        f"{task}: {', '.join(sweep.experts)} × β",
        [p.beta for p in grid],
        [p.scores[task].estimate for p in grid],
        random=band,
        unchanged=unchanged.scores[task].value or 0.0,
        collapsed=[None if p.collapsed is None else p.collapsed.value for p in grid],
        caption=f"On the half of the samples that β is chosen on; 95 % intervals. Random: {len(controls)} sets of "
        "experts of the same layers that fire about as often, on the other half.",
    )


def _counts_table(findings: ExpertFindings) -> Table:
    rows: list[Sequence[Value]] = [(part, count, None) for part, count in findings.by_part.items()]
    rows += [(f"marker {m.text}", m.positions, m.weight) for m in findings.markers]
    note = (
        f"{findings.sequences} texts, {findings.positions:,} positions; {findings.generated} were completed by the "
        f"model. {sum(findings.n_experts)} experts in {len(findings.layers)} layers."
    )
    return Table("What was counted", ["", Column("positions", "count"), Column("weight", "number")], rows, note=note)


def _ranking_table(findings: ExpertFindings) -> Table:
    columns = [
        Column("expert"),
        Column("rank", "count"),
        Column("95 %"),
        Column("nPMI", "score"),
        Column("smoothed"),
        Column("difference", "score"),
        Column("fires", "percent"),
        Column("at marker", "count"),
        Column("q", "number"),
        Column("‖adds‖/‖x‖", "percent"),
        Column("published rank", "count"),
    ]
    # If none is ranked, the first by the published score.
    best = findings.ranked[:TABLE_EXPERTS] or findings.experts[:TABLE_EXPERTS]
    rows: list[Sequence[Value]] = [
        (
            str(row.name),
            row.rank,
            _rank_interval(row),
            row.npmi,
            row.smoothed.text(),
            row.difference,
            row.rate,
            row.at_marker,
            row.q,
            row.norm_ratio,
            row.published_rank,
        )
        for row in best
    ]
    unranked = sum(row.rank is None for row in findings.experts)
    note = (
        f"{unranked} of {len(findings.experts)} experts lack the evidence for a rank. nPMI: as published; difference: "
        "share of the marker's positions at which it fires less that of all others, weighted; q: share of false "
        "discoveries."
    )
    return Table("Experts by nPMI with the markers", columns, rows, note=note)


def _sweep_table(sweep: SweepRecord) -> Table:
    columns = [
        Column("part"),
        Column("experts"),
        Column("β", "number"),
        *(Column(task) for task in sweep.tasks),
        Column("collapsed", "percent"),
    ]
    rows: list[Sequence[Value]] = [
        (
            p.part,
            _experts_text(p),
            p.beta,
            *(p.scores[task].text() for task in sweep.tasks),
            None if p.collapsed is None else p.collapsed.value,
        )
        for p in sweep.points
    ]
    note = (
        f"{', '.join(sweep.experts)} reinforced ({sweep.way}, {sweep.phase}). β was chosen on one half of the samples "
        f"(best: {sweep.best:g}) and tested on the other. collapsed: answers that end in a loop."
    )
    return Table("β, chosen and tested", columns, rows, note=note)


def _sweep_sentence(sweep: SweepRecord) -> str:
    def tested(beta: float) -> PointRecord:
        return next(p for p in sweep.points if p.part == "test" and p.control is None and p.beta == beta)

    task = sweep.tasks[0]
    before, after = tested(1.0).scores[task], tested(sweep.best).scores[task]
    randoms = [p.scores[task].value or 0.0 for p in sweep.points if p.control is not None]
    control = f"; random experts of the same layers give {min(randoms):.1%} to {max(randoms):.1%}" if randoms else ""
    # Nothing helped: the report shows what a strong β does instead.
    if sweep.best == 1:
        other = next((p for p in sweep.points if p.part == "test" and p.beta != 1), None)
        strong = f"; β = {other.beta:g} gives {other.scores[task].text('.1%')}" if other is not None else ""
        return (
            f"No β of the grid is better than leaving {task} as it is ({before.text('.1%')} on the test half{strong}"
            f"{control})."
        )
    return (
        f"β = {sweep.best:g}, chosen on one half of {task}, takes the other from {before.text('.1%')} to "
        f"{after.text('.1%')}{control}."
    )


def _experts_text(point: PointRecord) -> str:
    return ", ".join(point.experts) if point.control is None else f"random {point.control}: {', '.join(point.experts)}"


def _npmi_grid(findings: ExpertFindings) -> Floats:
    row_of = {layer: row for row, layer in enumerate(findings.layers)}
    # NaN where a layer has fewer experts than the widest.
    values = np.full((len(findings.layers), max(findings.n_experts)), np.nan)
    for row in findings.experts:
        values[row_of[row.layer], row.expert] = row.npmi
    return values


def _rank_interval(row: ExpertRecord) -> str:
    return "–" if row.rank_low is None else f"{row.rank_low} to {row.rank_high}"
