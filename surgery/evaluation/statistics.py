"""Estimates with 95 % intervals: proportions, AUROC, calibration, rank correlation and means. All in float64.

Examples that share a group (the same prompt, the same harmful word) are not independent, so bootstraps resample whole
groups: the cluster bootstrap of Efron and Tibshirani, An Introduction to the Bootstrap, 1993, sections 8.6 and 13.3.
Each bootstrap has a generator seeded for it and takes the groups in sorted order: no result depends on the order of the
data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from surgery.errors import SurgeryError

Floats = NDArray[np.float64]

LEVEL = 0.95
# The 97.5 % quantile of the normal distribution: the half-width of a 95 % interval in standard errors.
Z = 1.959963984540054
# With so many resamples the ends of a 95 % interval are known to within about a tenth of its width.
RESAMPLES = 1000
# Bins of the calibration error, as in Guo et al. 2017 and most papers since.
BINS = 10
# Numbers in memory at a time in a bootstrap: 128 MiB in float64.
MOST_NUMBERS = 2**24


@dataclass(frozen=True)
class EstimateWithInterval:
    """A measured value and the ends of its 95 % interval, which are NaN where the data allow none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Band:
    """A mean at each position with its 95 % interval and the number of traces: four (T,) arrays, NaN where `n` is 0."""

    mean: Floats
    low: Floats
    high: Floats
    n: NDArray[np.int64]

    def at(self, position: int) -> EstimateWithInterval:
        """Return the mean at one position with its interval."""
        return EstimateWithInterval(float(self.mean[position]), float(self.low[position]), float(self.high[position]))


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion (Wilson 1927).

    (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n) for p = successes / n.
    """
    # `scipy.stats.binomtest(k, n).proportion_ci(method="wilson")` is the same formula, but rounds differently in the
    # last place, and results.json has every digit. It would also load scipy.stats for one line of arithmetic.
    share, spread = successes / n, Z * Z / n
    centre = share + spread / 2
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4)
    # At shares of 0 and 1 a bound is the share itself; rounding must not carry it past.
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return max(0.0, min(share, low)), min(1.0, max(share, high))


def percentile_interval(samples: ArrayLike, *, level: float = LEVEL) -> tuple[float, float]:
    """Return the ends of the central `level` of `samples`, linearly interpolated; NaN samples are left out.

    Both ends are NaN where no sample is left.
    """
    known = np.asarray(samples, dtype=np.float64).ravel()
    known = known[~np.isnan(known)]
    if not known.size:
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def auroc(scores: ArrayLike, positive: ArrayLike, *, weights: ArrayLike | None = None) -> float:
    """Return the area under the ROC curve: P(a positive example scores above a negative one), ties counting half.

    Args:
        scores: (N,).
        positive: (N,) bool.
        weights: (N,) ≥ 0, how often each example counts; 1 each if None.

    Raises:
        SurgeryError: one of the two classes is empty, or a score is NaN.
    """
    values, truth = _scores(scores, positive)
    counts = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    area = float(_areas(values, truth, counts[None])[0])
    if math.isnan(area):
        raise SurgeryError("an AUROC needs examples of both classes, and one of them has none")
    return area


def bootstrap_auroc(
    scores: ArrayLike,
    positive: ArrayLike,
    *,
    groups: Sequence[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> EstimateWithInterval:
    """Return the AUROC and its 95 % percentile interval over resampled groups.

    scores, positive, groups: (N,). Resamples that lack a class are left out. Where the scores separate the classes
    perfectly the interval is [1, 1], for every resample does so too.

    Raises:
        SurgeryError: as `auroc`.
    """
    values, truth = _scores(scores, positive)
    members = _group_indices(groups)
    draws = _draws(int(members.max()) + 1, resamples, seed, width=len(values))
    areas = [_areas(values, truth, counts[:, members]) for counts in draws]
    return EstimateWithInterval(auroc(values, truth), *percentile_interval(np.concatenate(areas)))


def ece(probabilities: ArrayLike, positive: ArrayLike, *, weights: ArrayLike | None = None, bins: int = BINS) -> float:
    """Return the expected calibration error Σ_b w_b/w · |mean probability − share of positives| over equal-width bins.

    Naeini et al. 2015; Guo et al. 2017 (arXiv:1706.04599), equation 3.

    Args:
        probabilities: (N,) in [0, 1]; bin b is [b/bins, (b+1)/bins), and the last one includes 1.
        positive: (N,) bool.
        weights: (N,); 1 each if None.
    """
    values, truth = _scores(probabilities, positive)
    counts = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    bin_of = np.minimum((values * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(bin_of, weights=counts * (values - truth), minlength=bins)
    return float(np.abs(gaps).sum() / counts.sum())


def brier(probabilities: ArrayLike, positive: ArrayLike, *, weights: ArrayLike | None = None) -> float:
    """Return the Brier score (1950), the weighted mean of (probability − truth)². Arguments as in `ece`."""
    values, truth = _scores(probabilities, positive)
    return float(np.average((values - truth) ** 2, weights=None if weights is None else np.asarray(weights)))


def spearman(x: ArrayLike, y: ArrayLike) -> EstimateWithInterval:
    """Return Spearman's rank correlation ρ of x and y (n,), with ties at their mean rank.

    The interval is tanh(artanh ρ ± z·√((1 + ρ²/2)/(n − 3))) (Bonett and Wright 2000, Psychometrika 65, equation 3),
    NaN for n < 4. All three numbers are NaN where x or y is constant.

    Raises:
        SurgeryError: x and y have different lengths, or hold NaN.
    """
    from scipy.stats import rankdata

    first, second = np.asarray(x, dtype=np.float64).ravel(), np.asarray(y, dtype=np.float64).ravel()
    if first.size != second.size or np.isnan(first).any() or np.isnan(second).any():
        raise SurgeryError("a rank correlation needs as many numbers on both sides, and no NaN")
    a, b = (ranks - ranks.mean() if ranks.size else ranks for ranks in (rankdata(first), rankdata(second)))
    spread = math.sqrt(float(a @ a) * float(b @ b))
    if not spread:
        return EstimateWithInterval(math.nan, math.nan, math.nan)
    rho = max(-1.0, min(1.0, float(a @ b) / spread))
    if first.size < 4:
        return EstimateWithInterval(rho, math.nan, math.nan)
    if abs(rho) == 1:  # artanh is infinite there
        return EstimateWithInterval(rho, rho, rho)
    centre, half = math.atanh(rho), Z * math.sqrt((1 + rho * rho / 2) / (first.size - 3))
    return EstimateWithInterval(rho, math.tanh(centre - half), math.tanh(centre + half))


def align_ends(traces: Sequence[ArrayLike]) -> tuple[Floats, NDArray[np.bool_]]:
    """Right-align traces of different lengths: return values (N, T), padded with 0, and a mask (N, T) of what is real.

    Raises:
        SurgeryError: there is no trace.
    """
    if not traces:
        raise SurgeryError("there is no trace to be averaged")
    rows = [np.asarray(trace, dtype=np.float64).ravel() for trace in traces]
    longest = max(len(row) for row in rows)
    values, mask = np.zeros((len(rows), longest)), np.zeros((len(rows), longest), dtype=np.bool_)
    for at, row in enumerate(rows):
        values[at, longest - len(row) :] = row
        mask[at, longest - len(row) :] = True
    return values, mask


def bootstrap_mean(
    values_NT: ArrayLike,
    mask_NT: ArrayLike | None = None,
    *,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Band:
    """Return the mean of traces at each position and its 95 % percentile interval over resampled groups.

    The interval is NaN where fewer than two groups have a value, for one group has no spread. A resample that has no
    value at a position is left out there.

    Args:
        values_NT: (N, T), a column for each position, as from `align_ends`.
        mask_NT: (N, T) bool, where a trace has a value; everywhere if None. Masked values are ignored, NaN too.
        groups: (N,); each trace is a group of its own if None.

    Raises:
        SurgeryError: there is no trace; shapes differ; a value under the mask is NaN.
    """
    values = np.atleast_2d(np.asarray(values_NT, dtype=np.float64))
    mask = np.ones(values.shape, np.bool_) if mask_NT is None else np.atleast_2d(np.asarray(mask_NT, dtype=np.bool_))
    if not values.size or mask.shape != values.shape or (groups is not None and len(groups) != len(values)):
        raise SurgeryError(
            f"cannot average traces of shape {list(values.shape)} under a mask of shape {list(mask.shape)}"
            + ("" if groups is None else f" in {len(groups)} groups")
        )
    if np.isnan(values[mask]).any():
        raise SurgeryError("a trace holds NaN", hint="The model's states overflowed: compute in float32 or bfloat16.")
    members = np.arange(len(values)) if groups is None else _group_indices(groups)
    count = int(members.max()) + 1
    # Sum by group once: then each resample is a product of two small matrices.
    sums, ns = np.zeros((count, values.shape[1])), np.zeros((count, values.shape[1]))
    np.add.at(sums, members, np.where(mask, values, 0.0))
    np.add.at(ns, members, mask.astype(np.float64))
    n = mask.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 where nothing has a value: NaN, as documented
        mean = sums.sum(axis=0) / n
    low, high = np.full(len(n), math.nan), np.full(len(n), math.nan)
    # All positions share the draws, or neighbouring points of a curve would jitter against each other.
    draws = np.concatenate(list(_draws(count, resamples, seed, width=count)))
    n_columns = max(1, MOST_NUMBERS // max(1, resamples))
    for start in range(0, len(n), n_columns):
        part = slice(start, start + n_columns)
        with np.errstate(invalid="ignore"):
            means = (draws @ sums[:, part]) / (draws @ ns[:, part])
        spread = (ns[:, part] > 0).sum(axis=0) > 1
        if spread.any():
            ends = np.nanquantile(means[:, spread], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
            low[part][spread], high[part][spread] = ends
    return Band(mean, low, high, n.astype(np.int64))


def _scores(scores: ArrayLike, positive: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    values, truth = np.asarray(scores, dtype=np.float64).ravel(), np.asarray(positive, dtype=np.bool_).ravel()
    if values.size != truth.size or not values.size:
        raise SurgeryError(f"got {values.size} scores for {truth.size} verdicts")
    if np.isnan(values).any():
        raise SurgeryError("a score is NaN", hint="The model's states overflowed: compute in float32 or bfloat16.")
    return values, truth


def _areas(values: Floats, truth: NDArray[np.bool_], counts_BN: Floats) -> Floats:
    """Return the AUROC (B,) under each row of example counts (B, N); NaN where a class has no weight.

    scikit-learn's `roc_auc_score` takes one weighting at a time, which is 1000 sorts in a bootstrap; here all
    resamples share one sort.
    """
    order = np.argsort(values, kind="stable")
    ranked, positive = values[order], truth[order]
    # Equal scores are summed up first, so that ties can count half.
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    counts = counts_BN[:, order]
    above = np.add.reduceat(np.where(positive, counts, 0.0), starts, axis=1)
    below = np.add.reduceat(np.where(positive, 0.0, counts), starts, axis=1)
    wins: Floats = (above * (np.cumsum(below, axis=1) - below / 2)).sum(axis=1)
    pairs = above.sum(axis=1) * below.sum(axis=1)
    areas: Floats = np.divide(wins, pairs, out=np.full(len(pairs), math.nan), where=pairs > 0)
    return areas


def _group_indices(groups: Sequence[str]) -> NDArray[np.int64]:
    """Return the index of each example's group, (N,); groups are numbered in sorted order."""
    numbers = {group: at for at, group in enumerate(sorted(set(groups)))}
    return np.array([numbers[group] for group in groups], dtype=np.int64)


def _draws(count: int, resamples: int, seed: int, *, width: int) -> Iterator[Floats]:
    """Yield how often each of `count` groups is drawn in each resample, in blocks of (≤ resamples, count).

    A block is small enough to be expanded to `width` columns.
    """
    generator = np.random.default_rng(seed)
    block = max(1, MOST_NUMBERS // max(1, width))
    shares = np.full(count, 1 / count)
    for start in range(0, resamples, block):
        yield generator.multinomial(count, shares, size=min(block, resamples - start)).astype(np.float64)
