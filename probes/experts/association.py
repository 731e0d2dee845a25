"""Normalised pointwise mutual information of experts and markers (arXiv 2505.14681, equation 2), from counts.

    nPMI(x, E) = [log₂(k/M) + log₂(T/K)] / log₂(T/k)

k: positions of marker x at which E fires, M: positions of x, K: positions at which E fires, T: all positions. The total
is Σ_x c_x · nPMI(x, E), with the markers' weights c_x.

Deviation from the paper: an expert that never fires scores 0 instead of 0/0.

Legend: B resamples, G blocks of documents, M markers, X experts of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from probes.model.routing import PARTS, RoutingCounts
from surgery.evaluation.statistics import Floats


def npmi(together: ArrayLike, marker: ArrayLike, fires: ArrayLike, total: ArrayLike) -> Floats:
    """Return [log₂(k/M) + log₂(T/K)] / log₂(T/k) in float64, for k, M, K, T that broadcast; 0 ≤ k ≤ M, K ≤ T.

    Edge values: k = 0 (never together) gives −1, the limit; k = T (all positions) gives 0; M = 0 or K = 0, where
    nothing is known, gives 0.

    Source: arXiv 2505.14681, equation 2.
    """
    k, m, f, t = (np.asarray(counts, dtype=np.float64) for counts in (together, marker, fires, total))
    # log₂ 0 and 0/0 are expected: the edge values replace them below.
    with np.errstate(divide="ignore", invalid="ignore"):
        # A logarithm of each count rather than of the quotients: those have the shape that all four broadcast to.
        log_k, log_m, log_f, log_t = np.log2(k), np.log2(m), np.log2(f), np.log2(t)
        score = (log_k - log_m + (log_t - log_f)) / (log_t - log_k)
    score = np.where(k == 0, -1.0, score)
    defined: Floats = np.where((k == t) | (m == 0) | (f == 0), 0.0, score)
    return defined


@dataclass(frozen=True, eq=False)
class CountTable:
    """Counts by block, or summed over blocks, for all experts; float64, in which they are exact.

    together: (…, M, X) k. marker: (…, M). fires: (…, X) K. total: (…,) T.
    """

    together: Floats
    marker: Floats
    fires: Floats
    total: Floats

    def pooled(self) -> CountTable:
        """Return the sums over blocks."""
        return CountTable(self.together.sum(0), self.marker.sum(0), self.fires.sum(0), self.total.sum(0))

    def weighted(self, weights_BG: Floats) -> CountTable:
        """Return the sums over blocks under each row of weights: (G, …) → (B, …)."""
        # `optimize` makes it a matrix product, which is far faster than einsum's own loops.
        together = np.einsum("bg,gmx->bmx", weights_BG, self.together, optimize=True)
        return CountTable(together, weights_BG @ self.marker, weights_BG @ self.fires, weights_BG @ self.total)

    def experts(self, part: slice) -> CountTable:
        """Return the counts of some experts."""
        return replace(self, together=self.together[..., part], fires=self.fires[..., part])

    def npmi(self) -> Floats:
        """Return the published score for each marker and expert: (…, M, X)."""
        return npmi(self.together, self.marker[..., None], self.fires[..., None, :], self.total[..., None, None])

    def smoothed(self, weights_M: Floats, smoothing: float) -> Floats:
        """Return Σ_x c_x · nPMI, smoothed: (…, X).

        Each marker is given `smoothing` positions more, at which the expert fires as often as it does anywhere, so the
        score is drawn towards independence. The usual half in each cell of the 2 × 2 table would draw k/M towards ½,
        which lifts rare experts: one that fires at 50 of 277,000 positions, at none of 20 markers, would score +0.37.
        """
        total = self.total[..., None, None]
        base_rate = self.fires[..., None, :] / total
        scores = npmi(
            self.together + smoothing * base_rate,
            self.marker[..., None] + smoothing,
            self.fires[..., None, :] + smoothing * base_rate,
            total + smoothing,
        )
        summed: Floats = np.einsum("m,...mx->...x", weights_M, scores)
        return summed

    def risk_differences(self) -> Floats:
        """Return k/M − (K − k)/(T − M), (M, X), of counts summed over blocks.

        0 where every position is the marker's: there are no others to compare with.
        """
        others = (self.total - self.marker)[:, None]
        elsewhere = np.divide(self.fires - self.together, others, out=np.zeros_like(self.together), where=others > 0)
        differences: Floats = np.where(others > 0, self.together / self.marker[:, None] - elsewhere, 0.0)
        return differences


def count_table(counts: RoutingCounts, parts: Sequence[str]) -> tuple[CountTable, list[tuple[int, int]]]:
    """Return the counts of `parts` by block, and (layer, expert) of each of the X experts.

    Blocks without positions in these parts are left out: a block without data must not count as one that agrees.
    """
    chosen = [PARTS.index(part) for part in parts]
    positions = counts.positions[:, chosen].sum(1).numpy()
    occupied = np.flatnonzero(positions[:, 0])
    hits = counts.hits[:, :, :, chosen].sum(3).numpy()[occupied]
    names = [(layer, e) for layer, n in zip(counts.layers, counts.experts, strict=True) for e in range(n)]
    # Layers may have fewer experts than the widest: the padding of their rows is cut off.
    by_expert = np.concatenate([hits[:, row, :n] for row, n in enumerate(counts.experts)], axis=1).astype(np.float64)
    positions = positions[occupied].astype(np.float64)
    # Column 0 counts all positions, the others those of the markers.
    table = CountTable(by_expert[..., 1:].transpose(0, 2, 1), positions[:, 1:], by_expert[..., 0], positions[:, 0])
    return table, names
