"""p-values, false-discovery rates and bootstrap intervals of experts' scores.

Legend: B resamples, G blocks of documents, M markers, X experts of all layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from probes.experts.association import CountTable
from surgery.evaluation.statistics import LEVEL, MOST_NUMBERS, Floats

# Totals closer together than this differ by float64's rounding alone. Blocks may agree that closely, and a standard
# error made of rounding would make any score significant.
ROUNDING = 1e-12


@dataclass(frozen=True)
class ScoreIntervals:
    """95 % intervals over resampled blocks: ends of the scores' (X,), NaN with one block alone; ends of the ranks'."""

    low: Floats
    high: Floats
    ranks: Sequence[tuple[int, int]]


def jackknife_p_values(blocks: CountTable, smoothed: Floats, weights: Floats, smoothing: float) -> Floats:
    """Return the one-sided p-values that the smoothed total is at most 0: (X,); 1 with one block alone.

    t test with G − 1 degrees of freedom and the standard error of the delete-one-block jackknife.

    Source: Efron and Tibshirani 1993, chapter 11.
    """
    from scipy.special import stdtr

    n = len(blocks.total)
    if n < 2:
        return np.ones_like(smoothed)
    # One block at a time, not all in one call: G copies of the whole table need not fit the memory.
    without = np.stack([blocks.weighted(row[None]).smoothed(weights, smoothing)[0] for row in 1.0 - np.eye(n)])
    # (n − 1)/n · Σ (leave-one-out − mean)²: the jackknife's variance.
    error = np.sqrt((n - 1) * without.var(axis=0))
    error[error < ROUNDING] = 0.0
    # Without any error between blocks a total above 0 is certain: t is infinite, and p 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        p: Floats = np.where(smoothed > ROUNDING, stdtr(n - 1, -smoothed / error), 1.0)
    return p


def fisher_p_values(pooled: CountTable, marker: int) -> Floats:
    """Return the p-values of Fisher's exact test that an expert fires more often at the marker than elsewhere: (X,).

    P(at least k of the marker's M positions are among the K of T at which the expert fires), hypergeometric.
    """
    from scipy.stats import hypergeom

    tail = hypergeom.sf(pooled.together[marker] - 1, pooled.total, pooled.marker[marker], pooled.fires)
    # The tail's sum may exceed 1 by rounding.
    p: Floats = np.clip(np.asarray(tail, dtype=np.float64), 0.0, 1.0)
    return p


def false_discovery_rates(p: ArrayLike) -> Floats:
    """Return q of each of the p-values (n,): min over p_j ≥ p_i of n · p_j / (how many are ≤ p_j), 1 at most.

    Source: Benjamini and Hochberg 1995, J. R. Statist. Soc. B 57.
    """
    # Not scipy.stats.false_discovery_control: it multiplies p by n/i, where this divides n · p by i, and the last bit
    # of most q differs. Findings are to stay the same to the byte.
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    raised = values[order] * len(values) / np.arange(1, len(values) + 1)
    q = np.empty_like(values)
    q[order] = np.minimum(np.minimum.accumulate(raised[::-1])[::-1], 1.0)
    return q


def bootstrap_intervals(
    blocks: CountTable, weights: Floats, smoothing: float, ranked: Sequence[int], *, resamples: int, seed: int
) -> ScoreIntervals:
    """Return the intervals of all smoothed totals, and of the ranks among the experts `ranked` (places in X).

    Blocks are drawn with replacement. With a single block nothing can be resampled: no interval is known.
    """
    from scipy.stats import rankdata

    n, n_experts = blocks.fires.shape
    low, high = np.full(n_experts, math.nan), np.full(n_experts, math.nan)
    if n < 2:
        return ScoreIntervals(low, high, [])
    # How often each block is drawn, (B, G), is all that sums over drawn blocks depend on.
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    quantiles = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    # (B, M, X) numbers of a wide model do not fit the memory: a slice of the experts at a time.
    width = max(1, MOST_NUMBERS // (resamples * len(weights)))
    samples = np.empty((resamples, len(ranked)))
    ranked_experts = np.array(ranked, dtype=np.int64)
    for start in range(0, n_experts, width):
        part = slice(start, start + width)
        totals = blocks.experts(part).weighted(draws).smoothed(weights, smoothing)
        low[part], high[part] = np.quantile(totals, quantiles, axis=0)
        here = (ranked_experts >= start) & (ranked_experts < start + width)
        samples[:, here] = totals[:, ranked_experts[here] - start]
    if not ranked:
        return ScoreIntervals(low, high, [])
    ranks = rankdata(-samples, method="ordinal", axis=1)
    # Ranks are whole numbers: an interpolated quantile between two of them would be none.
    first, last = np.quantile(ranks, quantiles, axis=0, method="inverted_cdf").astype(np.int64)
    return ScoreIntervals(low, high, list(zip(first.tolist(), last.tolist(), strict=True)))
