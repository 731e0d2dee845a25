"""Score a model's experts by nPMI with markers (`probes.experts.association`), and rank those with enough evidence.

An expert that hardly ever fires scores high by chance. A rank is therefore given only to experts with enough support
(`Support`) whose association is significant (`score_experts`); the published score is accompanied by a smoothed one
with its bootstrap interval, the risk difference, and the interval of the rank.

Deviation from the paper (arXiv 2505.14681): the ranking is by the smoothed total.

Legend: G blocks of documents, M markers, X experts of all layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probes.experts.association import CountTable, count_table
from probes.experts.significance import (
    ScoreIntervals,
    bootstrap_intervals,
    false_discovery_rates,
    fisher_p_values,
    jackknife_p_values,
)
from probes.model.routing import PARTS, Marker, RoutingCounts
from surgery.checkpoint.selectors import Expert
from surgery.errors import SurgeryError, listing, usage_error
from surgery.evaluation.statistics import RESAMPLES, EstimateWithInterval, Floats, spearman

SMOOTHING = 0.5  # positions; see `CountTable.smoothed`


@dataclass(frozen=True)
class Support:
    """The evidence that an expert needs to be ranked.

    fires: positions at which it fires.
    at_marker: of those, at the main marker, which is that of the largest weight.
    blocks: blocks of documents in which it fires at the main marker.
    rate: the largest share of false discoveries among those that are ranked.
    """

    # With less, high scores are common by chance: an expert that fires once, at one of 30 markers, scores 0.7.
    fires: int = 50
    at_marker: int = 10
    blocks: int = 3
    rate: float = 0.05

    def lacking(self, marker: str, fires: int, at_marker: int, blocks: int, q: float) -> str | None:
        """Return what keeps an expert from being ranked; None if nothing does."""
        if fires < self.fires:
            return f"fires at {fires:,} positions, fewer than {self.fires:,}"
        if at_marker < self.at_marker:
            return f"fires at {at_marker:,} positions of {marker!r}, fewer than {self.at_marker:,}"
        if blocks < self.blocks:
            return f"fires at {marker!r} in {blocks} blocks of texts, fewer than {self.blocks}"
        return f"its false-discovery rate is {q:.2g}, above {self.rate:g}" if q > self.rate else None


DEFAULT_SUPPORT = Support()


@dataclass(frozen=True)
class ExpertScores:
    """The scores of one expert.

    npmi: the published total. by_marker: its terms, unweighted, in the order of the markers.
    smoothed: the total with smoothing. low, high: its 95 % interval over resampled blocks; NaN if only one block has
    positions.
    difference: Σ_x c_x · (k/M − (K − k)/(T − M)), the weighted risk difference.
    fires, at_marker: K, and k at the main marker. rate: K/T.
    q: the smallest false-discovery rate at which its association is significant.
    rank: from 1, by the smoothed total among those ranked, with a 95 % interval; None if it lacks support.
    published_rank: 1 + the number of experts with a larger `npmi`.
    why: what it lacks to be ranked.
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
    """Agreement of the rankings on two data sets.

    shared: experts among the first `top` ranked of both, in the first's order.
    jaccard: shared ÷ all that are among the first `top` of either; 0 if there are none.
    spearman: of the smoothed totals of all experts; its interval takes experts as independent, which those of one
    layer are not quite.
    """

    top: int
    shared: tuple[Expert, ...]
    jaccard: float
    spearman: EstimateWithInterval


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
    """Score every expert of all layers: first those ranked, best first, then the others by the published score.

    An association is significant if both of these tests reject, so the larger of their p-values counts (an
    intersection-union test), and the false-discovery rate is Benjamini and Hochberg's (1995) over all experts:

    - The smoothed total is above 0 (`jackknife_p_values`). This test takes into account that positions of a document
      are not independent, and unlike the bootstrap's it depends neither on a seed nor on a number of resamples. Alone
      it is far too bold where experts fire rarely.
    - The expert fires more often at the main marker than elsewhere (`fisher_p_values`), valid however rarely the expert
      fires.

    Args:
        counts: of `markers`, in their order, as from `probes.model.routing.count_routing`.
        support: the evidence that an expert needs to be ranked.
        smoothing: in positions, as in `CountTable.smoothed`; 0 for none.
        parts: of `probes.model.routing.PARTS`, those whose positions count.
        resamples: of the blocks, for the intervals.

    Raises:
        SurgeryError: an argument is out of its range; no marker has a weight above 0; a marker never occurs in `parts`.
    """
    _check(counts, markers, support, smoothing, parts, resamples)
    blocks, names = count_table(counts, parts)
    pooled = blocks.pooled()
    _check_present(markers, pooled, parts)
    weights = np.array([marker.weight for marker in markers], dtype=np.float64)
    main = int(np.argmax(weights))
    by_marker, smoothed = pooled.npmi(), pooled.smoothed(weights, smoothing)
    published = weights @ by_marker
    p = np.maximum(jackknife_p_values(blocks, smoothed, weights, smoothing), fisher_p_values(pooled, main))
    q = false_discovery_rates(p)
    why = _lacking(support, markers[main].text, main, blocks, pooled, q)
    # Ties are broken by the published score and then by the expert's number: the order must not depend on sorting.
    experts = range(len(names))
    ranked = sorted((x for x in experts if why[x] is None), key=lambda x: (-smoothed[x], -published[x], names[x]))
    others = sorted((x for x in experts if why[x] is not None), key=lambda x: (-published[x], names[x]))
    scores = _Scores(
        names=names,
        counts=pooled,
        main=main,
        by_marker=by_marker,
        published=published,
        smoothed=smoothed,
        difference=weights @ pooled.risk_differences(),
        q=q,
        why=why,
        intervals=bootstrap_intervals(blocks, weights, smoothing, ranked, resamples=resamples, seed=seed),
        n_better=len(names) - np.searchsorted(np.sort(published), published, side="right"),
    )
    return [scores.of(x, number) for number, x in enumerate(ranked)] + [scores.of(x, None) for x in others]


@dataclass(frozen=True, eq=False)
class _Scores:
    """The scores of all experts, (X,) each, and (M, X) `by_marker`; `n_better`: how many have a larger `published`."""

    names: Sequence[tuple[int, int]]
    counts: CountTable
    main: int
    by_marker: Floats
    published: Floats
    smoothed: Floats
    difference: Floats
    q: Floats
    why: Sequence[str | None]
    intervals: ScoreIntervals
    n_better: NDArray[np.signedinteger[Any]]

    def of(self, x: int, number: int | None) -> ExpertScores:
        """Return the scores of expert `x`, the ranked one with this number from 0, or None."""
        ranks = None if number is None or not self.intervals.ranks else self.intervals.ranks[number]
        layer, expert = self.names[x]
        return ExpertScores(
            layer=layer,
            expert=expert,
            npmi=float(self.published[x]),
            by_marker=tuple(self.by_marker[:, x].tolist()),
            smoothed=float(self.smoothed[x]),
            low=float(self.intervals.low[x]),
            high=float(self.intervals.high[x]),
            difference=float(self.difference[x]),
            fires=int(self.counts.fires[x]),
            at_marker=int(self.counts.together[self.main, x]),
            rate=float(self.counts.fires[x] / self.counts.total),
            q=float(self.q[x]),
            rank=None if number is None else number + 1,
            rank_low=None if ranks is None else ranks[0],
            rank_high=None if ranks is None else ranks[1],
            published_rank=int(self.n_better[x]) + 1,
            why=self.why[x],
        )


def ranking_overlap(a: Sequence[ExpertScores], b: Sequence[ExpertScores], top: int) -> RankingOverlap:
    """Return how far the rankings of one model on two data sets agree.

    Raises:
        SurgeryError: `top` is below 1, or they are not of the same experts.
    """
    if top < 1:
        raise usage_error(f"got {top}, expected a number of experts from 1 on", where="--top")
    first, second = ({row.name: row.smoothed for row in rows} for rows in (a, b))
    # Rankings of different models have different experts, and a rank correlation over some of them means nothing.
    if first.keys() != second.keys():
        raise SurgeryError(f"scores of {len(first)} and {len(second)} experts that are not the same cannot be compared")
    best, other = ([row.name for row in rows if row.rank is not None and row.rank <= top] for rows in (a, b))
    shared = [name for name in best if name in other]
    # By inclusion and exclusion: fewer than `top` experts may be ranked in either.
    either = len(best) + len(other) - len(shared)
    return RankingOverlap(
        top,
        tuple(shared),
        len(shared) / either if either else 0.0,
        spearman(list(first.values()), [second[name] for name in first]),
    )


def check_markers(markers: Sequence[Marker]) -> None:
    """Raise SurgeryError if no marker has a weight above 0, or a weight is not finite.

    Needs no counts, so it can be called before anything is counted.
    """
    if not any(marker.weight > 0 for marker in markers) or not all(math.isfinite(m.weight) for m in markers):
        raise usage_error(
            f"got {listing(f'{m.weight:g}*{m.text}' for m in markers) or 'no marker'}, expected finite weights, one of "
            "them above 0",
            where="--token",
            hint="Name a marker at which the experts that you look for fire more often.",
        )


def _check_present(markers: Sequence[Marker], pooled: CountTable, parts: Sequence[str]) -> None:
    absent = [marker.text for marker, positions in zip(markers, pooled.marker, strict=True) if not positions]
    if absent:
        raise usage_error(f"{absent[0]!r} never occurs in {listing(parts)}", where="--token")


def _lacking(
    support: Support, marker: str, main: int, blocks: CountTable, pooled: CountTable, q: Floats
) -> list[str | None]:
    """Return what each expert lacks to be ranked: (X,), None for those with support."""
    blocks_at_marker = (blocks.together[:, main] > 0).sum(0)
    return [
        support.lacking(marker, int(fires), int(k), int(n), float(rate))
        for fires, k, n, rate in zip(pooled.fires, pooled.together[main], blocks_at_marker, q, strict=True)
    ]


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
