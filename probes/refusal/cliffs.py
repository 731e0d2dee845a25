"""Measure refusal cliffs in traces of the probe's score (arXiv 2510.06036), and average traces and cliffs by cell.

A trace has one score for each token of an example. Traces of different lengths are aligned at the last token before
the answer and masked, so that padding never enters a mean.
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

MEASURES = ("plateau", "p90", "last", "final", "misalignment")  # the fields of a cliff that are averaged
LAST_TOKENS = 8  # of the thinking, for the mean at its end
PERCENTILE = 90  # beside the maximum, which is high by chance in long thinking
# Mean traces stop where fewer traces than this reach back: a mean of two shows single examples.
LEAST_TRACES = 3
# A smaller fall is within the noise of scores: no cliff, and so no onset.
SMALLEST_CLIFF = 0.1


@dataclass(frozen=True)
class RefusalCliff:
    """The measures of one example's trace; scores are probabilities.

    plateau: the highest score in the thinking. p90, last: its 90th percentile, and the mean over its last 8 tokens.
    final: the score at the last token before the answer. misalignment: plateau − final (the paper's MS).
    onset: the first token from which on the score stays below the middle of plateau and final, as a position relative
        to the last token before the answer (0 is that token); None where the score falls by less than 0.1.
    thinking: the number of tokens of thinking. Without any, plateau, p90, last and misalignment are NaN.
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
    """Mean measures of a cell's cliffs, with 95 % intervals by bootstrap over groups; the onset is a median."""

    n: int
    plateau: EstimateWithInterval
    p90: EstimateWithInterval
    last: EstimateWithInterval
    final: EstimateWithInterval
    misalignment: EstimateWithInterval
    onset: float | None


@dataclass(frozen=True, eq=False)
class MeanTrace:
    """The mean trace of a cell.

    band: its last position is the last token before the answer.
    closing: the number of tokens of the closing template, as most examples have it.
    """

    band: Band
    closing: int


def measure_cliff(sequence: TokenSequence, scores: Sequence[float] | Floats, *, cell: str, group: str) -> RefusalCliff:
    """Measure one example's cliff.

    Args:
        scores: p(refused) at each token, at least up to the last token before the answer.

    Raises:
        SurgeryError: there are fewer scores.
    """
    trace = np.asarray(scores, dtype=np.float64)[: sequence.decision + 1]
    if len(trace) <= sequence.decision:
        raise SurgeryError(
            f"its trace has {len(trace)} scores, and {sequence.decision + 1} tokens stand before the answer",
            where=sequence.key,
        )
    # The answer itself is cut off: what its tokens say is no evidence of what was decided before.
    final = float(trace[-1])
    thinking = trace[sequence.span("thinking").start : sequence.span("thinking").stop]
    if not len(thinking):
        return RefusalCliff(sequence.key, cell, group, math.nan, math.nan, math.nan, final, math.nan, None, 0)
    plateau = float(thinking.max())
    onset = None
    if plateau - final >= SMALLEST_CLIFF:
        # The last crossing, not the first: scores may dip below the middle and recover.
        above_middle = np.flatnonzero(trace >= (plateau + final) / 2)
        onset = int(above_middle[-1]) + 1 - sequence.decision
    return RefusalCliff(
        sequence.key,
        cell,
        group,
        plateau,
        float(np.percentile(thinking, PERCENTILE)),
        float(thinking[-LAST_TOKENS:].mean()),
        final,
        plateau - final,
        onset,
        len(thinking),
    )


def mean_cliffs(cliffs: Sequence[RefusalCliff], *, seed: int = 0) -> dict[str, CellCliffs]:
    """Return cell → mean measures over its examples with any thinking; cells without such examples are absent."""
    means_of = {}
    for cell in sorted({cliff.cell for cliff in cliffs}):
        rows = [cliff for cliff in cliffs if cliff.cell == cell and cliff.thinking]
        if not rows:
            continue
        values = np.array([[getattr(row, name) for name in MEASURES] for row in rows])
        band = bootstrap_mean(values, groups=[row.group for row in rows], seed=seed)
        means = {name: band.at(column) for column, name in enumerate(MEASURES)}
        onsets = [row.onset for row in rows if row.onset is not None]
        means_of[cell] = CellCliffs(n=len(rows), onset=statistics.median(onsets) if onsets else None, **means)
    return means_of


def mean_traces(
    sequences: Sequence[TokenSequence],
    traces: Sequence[Floats],
    cells: Sequence[str],
    groups: Sequence[str],
    *,
    seed: int = 0,
) -> dict[str, MeanTrace]:
    """Return cell → mean trace over thinking and closing template, aligned at the last token before the answer.

    A mean trace reaches back as far as at least `LEAST_TRACES` of its traces do (all of them, where there are fewer).
    """
    means_of = {}
    for cell in sorted(set(cells)):
        rows = [at for at, own in enumerate(cells) if own == cell and len(sequences[at].span("thinking"))]
        if not rows:
            continue
        parts = [np.asarray(traces[at])[sequences[at].ends[0] : sequences[at].decision + 1] for at in rows]
        values, mask = align_ends(parts)
        first = int(np.flatnonzero(mask.sum(0) >= min(LEAST_TRACES, len(rows)))[0])
        band = bootstrap_mean(values[:, first:], mask[:, first:], groups=[groups[at] for at in rows], seed=seed)
        # The template is the same text for all, but a tokenizer may merge its first token with the thinking.
        closing = statistics.mode(len(sequences[at].span("closing")) for at in rows)
        means_of[cell] = MeanTrace(band, closing)
    return means_of


def most_misaligned(cliffs: Sequence[RefusalCliff], count: int) -> list[RefusalCliff]:
    """Return the `count` cliffs with the largest misalignment (Cliff-as-a-Judge), largest first, ties by key."""
    with_thinking = [cliff for cliff in cliffs if cliff.thinking]
    # Keys break ties, so that the choice does not depend on the order of the pool.
    return sorted(with_thinking, key=lambda cliff: (-cliff.misalignment, cliff.key))[:count]


def count_cells(cells: Sequence[str]) -> Mapping[str, int]:
    """Return cell → number of examples, sorted by name."""
    return {cell: list(cells).count(cell) for cell in sorted(set(cells))}
