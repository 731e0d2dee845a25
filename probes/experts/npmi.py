"""Cognitive experts by normalised pointwise mutual information (arXiv 2505.14681, equation 2), and what it hides.

In come counts of routing decisions, out comes a score for every expert:

    nPMI(x, E) = [log₂(k/M) + log₂(T/K)] / log₂(T/k)

k: positions of marker x at which E fires, M: positions of x, K: positions at which E fires, T: all positions. The total
is Σ_x c_x · nPMI(x, E), with the markers' weights c_x. An expert that hardly ever fires scores high by chance. So a
rank is given only to experts with enough evidence (`Support`) whose association is shown (`score_experts`); beside the
published score stand a smoothed one with its bootstrap interval, the risk difference and the rank's interval.

Deviations from the paper: an expert that never fires scores 0 instead of 0/0; the ranking is by the smoothed total.

Legend: B resamples, G blocks of documents, M markers, X experts of all layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probes.model.routing import PARTS, Marker, RoutingCounts
from surgery.checkpoint.selectors import Expert
from surgery.errors import SurgeryError, listing, usage_error
from surgery.evaluation.statistics import LEVEL, MOST_NUMBERS, RESAMPLES, EstimateWithInterval, Floats, spearman

Ints = NDArray[np.int64]

SMOOTHING = 0.5
# Totals that lie closer together differ by float64's rounding alone. Blocks may agree that closely.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Support:
    """What an expert needs to be ranked.

    fires: positions at which it fires. at_marker: of those, at the main marker, which is that of the largest weight.
    blocks: blocks of documents in which it fires at the main marker. rate: the largest share of false discoveries
    among those that are ranked.
    """

    fires: int = 50
    at_marker: int = 10
    blocks: int = 3
    rate: float = 0.05


DEFAULT_SUPPORT = Support()


@dataclass(frozen=True)
class ExpertScores:
    """One expert's scores.

    npmi: the published total, and by_marker: its terms, unweighted, in the order of the markers.
    smoothed: the total with smoothing. low, high: its 95 % interval over resampled blocks; NaN where only one has
    positions.
    difference: Σ_x c_x · (k/M − (K − k)/(T − M)), the weighted risk difference.
    fires, at_marker: K, and k at the main marker. rate: K/T.
    q: the smallest false-discovery rate at which its association counts as shown.
    rank: from 1, by the smoothed total among those ranked, with a 95 % interval; None if `why` says what it lacks.
    published_rank: 1 + how many experts of all have a larger `npmi`.
    """

    layer: int
    expert: int
    npmi: float
    by_marker: tuple[float, ...]
    smoothed: float
    low: float
    high: float
    difference: float
    fires: int
    at_marker: int
    rate: float
    q: float
    rank: int | None
    rank_low: int | None
    rank_high: int | None
    published_rank: int
    why: str | None

    @property
    def name(self) -> Expert:
        return Expert(self.layer, self.expert)


@dataclass(frozen=True)
class RankingOverlap:
    """How far two data sets agree. shared: experts among the first `top` ranked of both, in the first's order.
    jaccard: shared ÷ all that are among them in either; 0 where there is none. spearman: of the smoothed totals of all
    experts; its interval takes experts as independent, which those of one layer are not quite.
    """

    top: int
    shared: tuple[Expert, ...]
    jaccard: float
    spearman: EstimateWithInterval


@dataclass(frozen=True, eq=False)
class _Table:
    """Counts of the chosen parts by block, or summed; float64, in which they are exact.

    together: (…, M, X) k. marker: (…, M). fires: (…, X). total: (…,).
    """

    together: Floats
    marker: Floats
    fires: Floats
    total: Floats

    def weighted(self, weights_BG: Floats) -> _Table:
        """Sums over blocks under each row of weights."""
        together = np.einsum("bg,gmx->bmx", weights_BG, self.together, optimize=True)
        return _Table(together, weights_BG @ self.marker, weights_BG @ self.fires, weights_BG @ self.total)

    def experts(self, part: slice) -> _Table:
        return replace(self, together=self.together[..., part], fires=self.fires[..., part])

    def smoothed(self, weights_M: Floats, smoothing: float) -> Floats:
        """Σ_x c_x · nPMI with each marker `smoothing` positions longer, at which the expert fires as often as it does
        anywhere: (…, X).

        So it is drawn towards independence. The usual half in each cell of the 2 × 2 table would draw k/M towards ½,
        which lifts rare experts: one that fires at 50 of 277,000 positions, at none of 20 markers, would score +0.37.
        """
        total = self.total[..., None, None]
        base = self.fires[..., None, :] / total
        scores = npmi(
            self.together + smoothing * base,
            self.marker[..., None] + smoothing,
            self.fires[..., None, :] + smoothing * base,
            total + smoothing,
        )
        summed: Floats = np.einsum("m,...mx->...x", weights_M, scores)
        return summed


def npmi(together: ArrayLike, marker: ArrayLike, fires: ArrayLike, total: ArrayLike) -> Floats:
    """[log₂(k/M) + log₂(T/K)] / log₂(T/k) in float64, for k, M, K and T whose shapes broadcast; 0 ≤ k ≤ M, K ≤ T.

    Never together (k = 0): −1, the limit. All positions (k = T): 0. Nothing is known where M or K is 0: 0.

    Source: arXiv 2505.14681, equation 2.
    """
    k, m, f, t = (np.asarray(counts, dtype=np.float64) for counts in (together, marker, fires, total))
    with np.errstate(divide="ignore", invalid="ignore"):
        # A logarithm for each of the four, which is less work than of quotients as large as the whole.
        log_k, log_m, log_f, log_t = np.log2(k), np.log2(m), np.log2(f), np.log2(t)
        score = (log_k - log_m + (log_t - log_f)) / (log_t - log_k)
    score = np.where(k == 0, -1.0, score)
    found: Floats = np.where((k == t) | (m == 0) | (f == 0), 0.0, score)
    return found


def score_experts(
    counts: RoutingCounts,
    markers: Sequence[Marker],
    *,
    support: Support = DEFAULT_SUPPORT,
    smoothing: float = SMOOTHING,
    parts: Sequence[str] = PARTS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[ExpertScores]:
    """Every expert of all layers: first those ranked, best first, then the others by the published score.

    An association is shown where both of these hold, so the larger of their p-values counts (an intersection-union
    test), and the false-discovery rate is Benjamini and Hochberg's (1995) over all experts:

    - The smoothed total is above 0: t test with G − 1 degrees of freedom and the standard error of the
      delete-one-block jackknife (Efron and Tibshirani 1993, chapter 11). It sees that positions of a document are not
      independent, and unlike the bootstrap's it depends neither on a seed nor on a number of resamples. Alone it is
      far too bold where experts fire rarely.
    - The expert fires more often at the main marker than elsewhere: Fisher's exact test (hypergeometric), valid however
      rarely the expert fires.

    Args:
        counts: of `markers`, in their order, as from `probes.model.routing.count_routing`.
        support: what an expert needs to be ranked.
        smoothing: in positions, as in `_Table.smoothed`; 0 for none.
        parts: of `probes.model.routing.PARTS`, those whose positions count.
        resamples: of the blocks, for the intervals.

    Raises:
        SurgeryError: an argument is out of its range; no marker has a weight above 0; a marker never occurs in `parts`.
    """
    _check(counts, markers, support, smoothing, parts, resamples)
    blocks, names = _pooled(counts, parts)
    weights = np.array([marker.weight for marker in markers], dtype=np.float64)
    main = int(np.argmax(weights))
    whole = _Table(*(array.sum(0) for array in (blocks.together, blocks.marker, blocks.fires, blocks.total)))
    absent = [marker.text for marker, positions in zip(markers, whole.marker, strict=True) if not positions]
    if absent:
        raise usage_error(f"{absent[0]!r} never occurs in {listing(parts)}", where="--token")
    by_marker = npmi(whole.together, whole.marker[:, None], whole.fires, whole.total)
    published, smoothed = weights @ by_marker, whole.smoothed(weights, smoothing)
    p = np.maximum(_jackknife_p(blocks, smoothed, weights, smoothing), _fisher_p(whole, main))
    q = false_discovery_rates(p)
    present = (blocks.together[:, main] > 0).sum(0)
    why = [
        _lack(support, markers[main].text, int(fires), int(k), int(n), float(rate))
        for fires, k, n, rate in zip(whole.fires, whole.together[main], present, q, strict=True)
    ]
    order = sorted(range(len(names)), key=lambda at: (-smoothed[at], -published[at], names[at]))
    ranked = [at for at in order if why[at] is None]
    place = {at: number for number, at in enumerate(ranked)}
    low, high, ranks = _intervals(blocks, weights, smoothing, ranked, resamples, seed)
    difference = weights @ _risk_differences(whole)
    higher = len(names) - np.searchsorted(np.sort(published), published, side="right")

    def scored(at: int) -> ExpertScores:
        known = at in place
        ends = ranks[place[at]] if known and ranks else (None, None)
        return ExpertScores(
            *names[at],
            npmi=float(published[at]),
            by_marker=tuple(by_marker[:, at].tolist()),
            smoothed=float(smoothed[at]),
            low=float(low[at]),
            high=float(high[at]),
            difference=float(difference[at]),
            fires=int(whole.fires[at]),
            at_marker=int(whole.together[main, at]),
            rate=float(whole.fires[at] / whole.total),
            q=float(q[at]),
            rank=place[at] + 1 if known else None,
            rank_low=ends[0],
            rank_high=ends[1],
            published_rank=int(higher[at]) + 1,
            why=why[at],
        )

    others = sorted((at for at in range(len(names)) if at not in place), key=lambda at: (-published[at], names[at]))
    return [scored(at) for at in (*ranked, *others)]


def ranking_overlap(a: Sequence[ExpertScores], b: Sequence[ExpertScores], top: int) -> RankingOverlap:
    """How far the rankings of one model on two data sets agree.

    Raises:
        SurgeryError: `top` is below 1, or they are not of the same experts.
    """
    if top < 1:
        raise usage_error(f"got {top}, expected a number of experts from 1 on", where="--top")
    first, second = ({row.name: row.smoothed for row in rows} for rows in (a, b))
    if first.keys() != second.keys():
        raise SurgeryError(f"scores of {len(first)} and {len(second)} experts that are not the same cannot be compared")
    best, other = ([row.name for row in rows if row.rank is not None and row.rank <= top] for rows in (a, b))
    shared = [name for name in best if name in other]
    either = len(best) + len(other) - len(shared)
    return RankingOverlap(
        top,
        tuple(shared),
        len(shared) / either if either else 0.0,
        spearman(list(first.values()), [second[name] for name in first]),
    )


def false_discovery_rates(p: ArrayLike) -> Floats:
    """q of each of the p-values (n,): min over p_j ≥ p_i of n · p_j / (how many are ≤ p_j), 1 at most.

    Source: Benjamini and Hochberg 1995, J. R. Statist. Soc. B 57.
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    raised = values[order] * len(values) / np.arange(1, len(values) + 1)
    q = np.empty_like(values)
    q[order] = np.minimum(np.minimum.accumulate(raised[::-1])[::-1], 1.0)
    return q


def check_markers(markers: Sequence[Marker]) -> None:
    """That experts can be scored by these markers; needs no counts, so it can be asked first.

    Raises:
        SurgeryError: no marker has a weight above 0, or a weight is not finite.
    """
    if not any(marker.weight > 0 for marker in markers) or not all(math.isfinite(m.weight) for m in markers):
        raise usage_error(
            f"got {listing(f'{m.weight:g}*{m.text}' for m in markers) or 'no marker'}, expected finite weights, one of "
            "them above 0",
            where="--token",
            hint="Name a marker at which the experts that you look for fire more often.",
        )


def _check(
    counts: RoutingCounts,
    markers: Sequence[Marker],
    support: Support,
    smoothing: float,
    parts: Sequence[str],
    resamples: int,
) -> None:
    check_markers(markers)
    if counts.positions.shape[2] != 1 + len(markers):
        raise SurgeryError(f"got {len(markers)} markers for counts of {counts.positions.shape[2] - 1}")
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts or len(set(parts)) < len(parts):
        raise usage_error(f"got {listing(parts) or 'none'}, expected each once, of {listing(PARTS)}", where="parts")
    if not (smoothing >= 0 and math.isfinite(smoothing)):
        raise usage_error(f"got {smoothing:g}, expected a finite number from 0 on", where="smoothing")
    if resamples < 1:
        raise usage_error(f"got {resamples}, expected a number from 1 on", where="resamples")
    if not 0 < support.rate <= 1 or min(support.fires, support.at_marker, support.blocks) < 0:
        raise usage_error(f"got {support}, expected numbers from 0 on and a rate in (0, 1]", where="support")


def _pooled(counts: RoutingCounts, parts: Sequence[str]) -> tuple[_Table, list[tuple[int, int]]]:
    """The counts of `parts` by block, without blocks that are empty there; and (layer, expert) of each of X."""
    chosen = [PARTS.index(part) for part in parts]
    positions = counts.positions[:, chosen].sum(1).numpy()
    kept = np.flatnonzero(positions[:, 0])
    hits = counts.hits[:, :, :, chosen].sum(3).numpy()[kept]
    names = [(layer, e) for layer, n in zip(counts.layers, counts.experts, strict=True) for e in range(n)]
    every = np.concatenate([hits[:, at, :n] for at, n in enumerate(counts.experts)], axis=1).astype(np.float64)
    here = positions[kept].astype(np.float64)
    return _Table(every[..., 1:].transpose(0, 2, 1), here[:, 1:], every[..., 0], here[:, 0]), names


def _jackknife_p(blocks: _Table, smoothed: Floats, weights: Floats, smoothing: float) -> Floats:
    """One-sided p that the total is at most 0, (X,); 1 where one block alone cannot tell."""
    from scipy.special import stdtr

    n = len(blocks.total)
    if n < 2:
        return np.ones_like(smoothed)
    without = np.stack([blocks.weighted(row[None]).smoothed(weights, smoothing)[0] for row in 1.0 - np.eye(n)])
    error = np.sqrt((n - 1) * without.var(axis=0))
    error[error < ROUNDING] = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        p: Floats = np.where(smoothed > ROUNDING, stdtr(n - 1, -smoothed / error), 1.0)
    return p


def _fisher_p(whole: _Table, main: int) -> Floats:
    """P(at least k of the main marker's M positions are among the K of T at which the expert fires), (X,)."""
    from scipy.stats import hypergeom

    found = hypergeom.sf(whole.together[main] - 1, whole.total, whole.marker[main], whole.fires)
    p: Floats = np.clip(np.asarray(found, dtype=np.float64), 0.0, 1.0)
    return p


def _lack(support: Support, marker: str, fires: int, at_marker: int, blocks: int, q: float) -> str | None:
    """What keeps an expert from being ranked, if anything."""
    if fires < support.fires:
        return f"fires at {fires:,} positions, fewer than {support.fires:,}"
    if at_marker < support.at_marker:
        return f"fires at {at_marker:,} positions of {marker!r}, fewer than {support.at_marker:,}"
    if blocks < support.blocks:
        return f"fires at {marker!r} in {blocks} blocks of texts, fewer than {support.blocks}"
    return f"its false-discovery rate is {q:.2g}, above {support.rate:g}" if q > support.rate else None


def _risk_differences(whole: _Table) -> Floats:
    """k/M − (K − k)/(T − M), (M, X); 0 where every position is the marker's, and there is nothing to compare with."""
    rest = (whole.total - whole.marker)[:, None]
    elsewhere = np.divide(whole.fires - whole.together, rest, out=np.zeros_like(whole.together), where=rest > 0)
    found: Floats = np.where(rest > 0, whole.together / whole.marker[:, None] - elsewhere, 0.0)
    return found


def _intervals(
    blocks: _Table, weights: Floats, smoothing: float, ranked: Sequence[int], resamples: int, seed: int
) -> tuple[Floats, Floats, list[tuple[int, int]]]:
    """Ends of the totals' intervals (X,) and (X,), and of the ranks' among `ranked`, over resampled blocks."""
    n, n_experts = blocks.fires.shape
    low, high = np.full(n_experts, math.nan), np.full(n_experts, math.nan)
    if n < 2:
        return low, high, []
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    wide = max(1, MOST_NUMBERS // (resamples * len(weights)))
    samples = np.empty((resamples, len(ranked)))
    at_column = np.array(ranked, dtype=np.int64)
    for start in range(0, n_experts, wide):
        part = slice(start, start + wide)
        found = blocks.experts(part).weighted(draws).smoothed(weights, smoothing)
        low[part], high[part] = np.quantile(found, ends, axis=0)
        here = (at_column >= start) & (at_column < start + wide)
        samples[:, here] = found[:, at_column[here] - start]
    if not ranked:
        return low, high, []
    ranks: Ints = np.argsort(np.argsort(-samples, axis=1, kind="stable"), axis=1) + 1
    first, last = np.quantile(ranks, ends, axis=0, method="inverted_cdf").astype(np.int64)
    return low, high, list(zip(first.tolist(), last.tolist(), strict=True))
