"""Refusal traces and the cliffs in them (arXiv 2510.06036): the probe's score at every token, and what becomes of it.

In come one trace per example, out come per-example measures (plateau, final score, misalignment, onset), their means by
cell with intervals, and end-aligned average curves. Traces are aligned at the last token before the answer and masked:
padding never enters a mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from probes.data.examples import TokenSequence
from surgery.errors import SurgeryError
from surgery.evaluation.statistics import Band, EstimateWithInterval, Floats, align_ends, bootstrap_mean

LAST = 8  # tokens of thinking that the mean at its end is taken over
PERCENTILE = 90
# Curves stop where fewer traces than this reach back: a mean of two says nothing.
LEAST_TRACES = 3
# A fall smaller than this is no cliff, and has no onset.
SMALLEST_CLIFF = 0.1


@dataclass(frozen=True)
class RefusalCliff:
    """One example's trace in numbers; scores are probabilities.

    plateau: the highest score in the thinking. p90, last: its 90th percentile, and the mean over its last tokens.
    final: the score at the last token before the answer. misalignment: plateau − final (the paper's MS).
    onset: where the score falls for good below the middle between plateau and final, as a position relative to the
        last token before the answer (0 is that token); None where it falls by less than 0.1.
    thinking: tokens of thinking. Without any, plateau and misalignment are NaN.
    """

    key: str
    cell: str
    group: str
    plateau: float
    p90: float
    last: float
    final: float
    misalignment: float
    onset: int | None
    thinking: int


@dataclass(frozen=True)
class CellCliffs:
    """The cliffs of a cell: means with 95 % intervals by bootstrap over groups; the onset is a median."""

    n: int
    plateau: EstimateWithInterval
    p90: EstimateWithInterval
    last: EstimateWithInterval
    final: EstimateWithInterval
    misalignment: EstimateWithInterval
    onset: float | None


@dataclass(frozen=True, eq=False)
class MeanTrace:
    """A mean score with its band, whose last column is the last token before the answer; tokens of closing template
    in most of its examples."""

    band: Band
    closing: int


def measure_cliff(sequence: TokenSequence, scores: Sequence[float] | Floats, *, cell: str, group: str) -> RefusalCliff:
    """One example's cliff. scores: at least up to the last token before the answer."""
    trace = np.asarray(scores, dtype=np.float64)[: sequence.decision + 1]
    if len(trace) <= sequence.decision:
        raise SurgeryError(
            f"its trace has {len(trace)} scores, and {sequence.decision + 1} tokens stand before the answer",
            where=sequence.key,
        )
    final = float(trace[-1])
    thinking = trace[sequence.span("thinking").start : sequence.span("thinking").stop]
    if not len(thinking):
        return RefusalCliff(sequence.key, cell, group, math.nan, math.nan, math.nan, final, math.nan, None, 0)
    plateau = float(thinking.max())
    onset = None
    if plateau - final >= SMALLEST_CLIFF:
        high = np.flatnonzero(trace >= (plateau + final) / 2)
        onset = int(high[-1]) + 1 - sequence.decision
    return RefusalCliff(
        sequence.key,
        cell,
        group,
        plateau,
        float(np.percentile(thinking, PERCENTILE)),
        float(thinking[-LAST:].mean()),
        final,
        plateau - final,
        onset,
        len(thinking),
    )


def mean_cliffs(cliffs: Sequence[RefusalCliff], *, seed: int = 0) -> dict[str, CellCliffs]:
    """The means of every cell, of the examples with any thinking; cells without such are absent."""
    found = {}
    for cell in sorted({cliff.cell for cliff in cliffs}):
        rows = [cliff for cliff in cliffs if cliff.cell == cell and cliff.thinking]
        if not rows:
            continue
        names = ("plateau", "p90", "last", "final", "misalignment")
        values = np.array([[getattr(row, name) for name in names] for row in rows])
        band = bootstrap_mean(values, groups=[row.group for row in rows], seed=seed)
        means = {
            name: EstimateWithInterval(float(band.mean[at]), float(band.low[at]), float(band.high[at]))
            for at, name in enumerate(names)
        }
        onsets = [row.onset for row in rows if row.onset is not None]
        found[cell] = CellCliffs(n=len(rows), onset=statistics.median(onsets) if onsets else None, **means)
    return found


def mean_traces(
    sequences: Sequence[TokenSequence],
    traces: Sequence[Floats],
    cells: Sequence[str],
    groups: Sequence[str],
    *,
    seed: int = 0,
) -> dict[str, MeanTrace]:
    """The average trace of every cell, over thinking and closing template, aligned at the last token before the answer.

    A curve reaches back as far as at least `LEAST_TRACES` of its traces do (all of them, where there are fewer).
    """
    found = {}
    for cell in sorted(set(cells)):
        rows = [at for at, own in enumerate(cells) if own == cell and len(sequences[at].span("thinking"))]
        if not rows:
            continue
        parts = [np.asarray(traces[at])[sequences[at].ends[0] : sequences[at].decision + 1] for at in rows]
        values, mask = align_ends(parts)
        kept = mask.sum(0) >= min(LEAST_TRACES, len(rows))
        first = int(np.flatnonzero(kept)[0])
        band = bootstrap_mean(values[:, first:], mask[:, first:], groups=[groups[at] for at in rows], seed=seed)
        closing = statistics.mode(len(sequences[at].span("closing")) for at in rows)
        found[cell] = MeanTrace(band, closing)
    return found


def most_misaligned(cliffs: Sequence[RefusalCliff], count: int) -> list[RefusalCliff]:
    """The `count` examples with the largest misalignment score, largest first; ties by key. Cliff-as-a-Judge."""
    known = [cliff for cliff in cliffs if cliff.thinking]
    return sorted(known, key=lambda cliff: (-cliff.misalignment, cliff.key))[:count]


def count_cells(cells: Sequence[str]) -> Mapping[str, int]:
    """Cell → examples, sorted by name."""
    return {cell: list(cells).count(cell) for cell in sorted(set(cells))}
