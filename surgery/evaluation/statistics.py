"""How sure a number is: in come scores, verdicts and traces; out come AUROC, calibration, rank correlation and means,
with 95 % intervals. All of it in float64.

Examples that share a group (the same prompt, the same harmful word) are not independent: bootstraps draw whole groups
(the cluster bootstrap; Efron and Tibshirani, An Introduction to the Bootstrap, 1993, sections 8.6 and 13.3), by a
generator of their own seed, from the groups in sorted order, so that no result depends on the order of the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from surgery.errors import SurgeryError
from surgery.evaluation.scoring import Z

Floats = NDArray[np.float64]

LEVEL = 0.95
# Resamples of a bootstrap: the ends of a 95 % interval then lie within about a tenth of its width.
RESAMPLES = 1000
BINS = 10
# Numbers in memory at a time while bootstrapping: 128 MiB in float64.
MOST_NUMBERS = 2**24


@dataclass(frozen=True)
class EstimateWithInterval:
    """A measured value and the ends of its 95 % interval; they are NaN where the data allow none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Band:
    """A mean at each position, its 95 % band, and over how many traces: four arrays (T,); NaN where `n` is 0."""

    mean: Floats
    low: Floats
    high: Floats
    n: NDArray[np.int64]

    def at(self, position: int) -> EstimateWithInterval:
        """Return the mean at one position with its interval."""
        return EstimateWithInterval(float(self.mean[position]), float(self.low[position]), float(self.high[position]))


def percentile_interval(samples: ArrayLike, *, level: float = LEVEL) -> tuple[float, float]:
    """The central `level` of `samples`, by linear interpolation, without the NaN in them; NaN where none is left."""
    known = np.asarray(samples, dtype=np.float64).ravel()
    known = known[~np.isnan(known)]
    if not known.size:
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def auroc(scores: ArrayLike, positive: ArrayLike, *, weights: ArrayLike | None = None) -> float:
    """The chance that a positive example scores above a negative one, ties counting half (area under the ROC curve).

    scores: (N,). positive: (N,) of bool. weights: (N,) ≥ 0, how often each example counts; once if None.

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
    """AUROC and its 95 % percentile interval over resampled groups; resamples that lack a class are left out.

    scores, positive, groups: (N,). Where the classes are told apart without fault the interval is [1, 1]: a bootstrap
    cannot know what it never saw.

    Raises:
        SurgeryError: as `auroc`.
    """
    values, truth = _scores(scores, positive)
    members = _members(groups)
    draws = _draws(int(members.max()) + 1, resamples, seed, width=len(values))
    areas = [_areas(values, truth, counts[:, members]) for counts in draws]
    return EstimateWithInterval(auroc(values, truth), *percentile_interval(np.concatenate(areas)))


def ece(probabilities: ArrayLike, positive: ArrayLike, *, weights: ArrayLike | None = None, bins: int = BINS) -> float:
    """Expected calibration error Σ_b w_b/w · |mean probability − share of positives| over bins of equal width.

    probabilities: (N,) in [0, 1]; bin b holds [b/bins, (b+1)/bins), the last one 1 too. positive: (N,) of bool.
    weights: (N,); 1 each if None. Source: Naeini et al. 2015; Guo et al. 2017 (arXiv:1706.04599), equation 3.
    """
    values, truth = _scores(probabilities, positive)
    counts = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    where = np.minimum((values * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(where, weights=counts * (values - truth), minlength=bins)
    return float(np.abs(gaps).sum() / counts.sum())


def brier(probabilities: ArrayLike, positive: ArrayLike, *, weights: ArrayLike | None = None) -> float:
    """The weighted mean of (probability − truth)² (Brier 1950). Arguments as in `ece`."""
    values, truth = _scores(probabilities, positive)
    return float(np.average((values - truth) ** 2, weights=None if weights is None else np.asarray(weights)))


def spearman(x: ArrayLike, y: ArrayLike) -> EstimateWithInterval:
    """The rank correlation ρ of x and y (n,), ties at their mean rank, with tanh(artanh ρ ± z·√((1 + ρ²/2)/(n − 3))).

    Interval: Bonett and Wright 2000, Psychometrika 65, equation 3. It is NaN for n < 4; everything is NaN where x or
    y is constant.

    Raises:
        SurgeryError: x and y have different lengths, or hold NaN.
    """
    first, second = np.asarray(x, dtype=np.float64).ravel(), np.asarray(y, dtype=np.float64).ravel()
    if first.size != second.size or np.isnan(first).any() or np.isnan(second).any():
        raise SurgeryError("a rank correlation needs as many numbers on both sides, and no NaN")
    a, b = (ranks - ranks.mean() if ranks.size else ranks for ranks in (_ranks(first), _ranks(second)))
    spread = math.sqrt(float(a @ a) * float(b @ b))
    if not spread:
        return EstimateWithInterval(math.nan, math.nan, math.nan)
    rho = max(-1.0, min(1.0, float(a @ b) / spread))
    if first.size < 4:
        return EstimateWithInterval(rho, math.nan, math.nan)
    if abs(rho) == 1:
        return EstimateWithInterval(rho, rho, rho)
    centre, half = math.atanh(rho), Z * math.sqrt((1 + rho * rho / 2) / (first.size - 3))
    return EstimateWithInterval(rho, math.tanh(centre - half), math.tanh(centre + half))


def align_ends(traces: Sequence[ArrayLike]) -> tuple[Floats, NDArray[np.bool_]]:
    """Traces of different lengths as rows that end together: values (N, T), 0 where there is none, and mask (N, T).

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
    """The mean of traces at each position and its 95 % percentile band over resampled groups.

    Args:
        values_NT: (N, T), column by column the same position, as from `align_ends`.
        mask_NT: (N, T) of bool, where a trace has a value; everywhere if None. What it hides is never looked at.
        groups: (N,); each trace its own if None.

    The band is NaN where fewer than two groups have a value: one trace says nothing about the spread of many.
    Resamples without any value at a position are left out there.

    Raises:
        SurgeryError: there is no trace; shapes differ; a value that the mask shows is NaN.
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
    members = np.arange(len(values)) if groups is None else _members(groups)
    count = int(members.max()) + 1
    # Sums by group once, so that a resample is a product of two small matrices.
    sums, ns = np.zeros((count, values.shape[1])), np.zeros((count, values.shape[1]))
    np.add.at(sums, members, np.where(mask, values, 0.0))
    np.add.at(ns, members, mask.astype(np.float64))
    n = mask.sum(axis=0)
    with np.errstate(invalid="ignore"):
        mean = sums.sum(axis=0) / n
    low, high = np.full(len(n), math.nan), np.full(len(n), math.nan)
    wide = max(1, MOST_NUMBERS // max(1, resamples))
    draws = np.concatenate(list(_draws(count, resamples, seed, width=count)))
    for start in range(0, len(n), wide):
        part = slice(start, start + wide)
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
    """AUROC under each row of example counts (B, N) → (B,); NaN where a class counts nothing."""
    order = np.argsort(values, kind="stable")
    ranked, positive = values[order], truth[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    counts = counts_BN[:, order]
    above = np.add.reduceat(np.where(positive, counts, 0.0), starts, axis=1)
    below = np.add.reduceat(np.where(positive, 0.0, counts), starts, axis=1)
    wins: Floats = (above * (np.cumsum(below, axis=1) - below / 2)).sum(axis=1)
    pairs = above.sum(axis=1) * below.sum(axis=1)
    areas: Floats = np.divide(wins, pairs, out=np.full(len(pairs), math.nan), where=pairs > 0)
    return areas


def _members(groups: Sequence[str]) -> NDArray[np.int64]:
    """The number of each example's group, (N,); groups are numbered in sorted order."""
    numbers = {group: at for at, group in enumerate(sorted(set(groups)))}
    return np.array([numbers[group] for group in groups], dtype=np.int64)


def _draws(count: int, resamples: int, seed: int, *, width: int) -> Iterator[Floats]:
    """How often each of `count` groups is drawn in each resample: blocks (≤ resamples, count), small enough to
    be widened to `width`.
    """
    generator = np.random.default_rng(seed)
    block = max(1, MOST_NUMBERS // max(1, width))
    shares = np.full(count, 1 / count)
    for start in range(0, resamples, block):
        yield generator.multinomial(count, shares, size=min(block, resamples - start)).astype(np.float64)


def _ranks(values: Floats) -> Floats:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[where]
    return ranks
