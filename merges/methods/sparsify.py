"""Sparsify task vectors δ: keep elements by magnitude, without outliers, at random, or at random by magnitude.

Every sparsifier has two steps. Streaming passes find what must be known of the whole tensor: thresholds in the order
of magnitudes, and Σ|δ| before and after where the result is rescaled by them. Then `sparsified` treats any piece by
itself.

Probabilities are multiples of 1/`LEVELS`, and at least one such step: they are exact to half a step, and elements are
divided by the probability as rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merges.methods.measures import KEPT, Count
from merges.methods.topk import THRESHOLDS, as_floats, topk_passes
from surgery.checkpoint.dtypes import n_elements
from surgery.engine.kernel import Pass, TensorSlice
from surgery.io.hashing import hash_text

Sparsifier = Literal["none", "magnitude", "outliers", "random", "ranked"]
SCALES = "scales"  # in `TensorSlice.pass_results`: per model, what its kept elements are multiplied by
_NEGLIGIBLE = 1e-7  # an L1 norm below this is not divided by, as in mergekit
_LOW_HALF, _HIGH_HALF = (0, 1) if np.little_endian else (1, 0)


def passes(kind: Sparsifier, density: Sequence[float], *, rescale: bool, paper: bool) -> tuple[Pass, ...]:
    """Return the passes that `sparsified` needs for these densities; none where nothing is dropped."""
    if kind == "none" or not any(0 < d < 1 for d in density):
        return ()
    if kind in ("random", "ranked"):
        # At random nothing needs to be known beforehand, unless the norms are to be restored by their measured ratio.
        return (Pass(_gather_norms, _reduce_norms),) if rescale and not paper else ()
    ordered = topk_passes(_magnitudes, _wanted)
    return (*ordered, Pass(_gather_norms, _reduce_norms)) if rescale else ordered


def sparsified(
    delta: Tensor,
    i: int,
    place: TensorSlice,
    *,
    kind: Sparsifier,
    density: Sequence[float],
    rescale: bool,
    paper: bool,
    **params: Any,
) -> Tensor:
    """Return the piece of δᵢ at `place` with dropped elements set to zero and, with `rescale`, the rest scaled up.

    With `paper`, elements that were kept at random are divided by their probability; else all are multiplied by Σ|δ|
    before over Σ|δ| after. Overwrites `delta`.   (…) → (…)
    """
    if kind == "none" or density[i] >= 1:
        return delta
    if density[i] <= 0:
        return delta.zero_()
    is_random = kind in ("random", "ranked")
    # The papers divide by the probability; mergekit measures the norms instead, as for the other kinds.
    inverse = is_random and rescale and paper
    sparse = delta.mul_(_factors(delta, i, place, kind=kind, density=density, inverse=inverse, **params))
    return sparse.mul_(place.pass_results[SCALES][i]) if rescale and not inverse else sparse


def counter(kind: Sparsifier, needed: Sequence[Pass]) -> Count | None:
    """Return `Measures.count` for a sparsifier; None where its passes have counted already."""
    return partial(_count_kept, kind=kind) if kind != "none" and not needed else None


def _factors(
    delta: Tensor,
    i: int,
    place: TensorSlice,
    *,
    kind: Sparsifier,
    density: Sequence[float],
    inverse: bool = False,
    **params: Any,
) -> Tensor:
    """Return 1 for elements that are kept, or with `inverse` one over their probability; 0 for the rest."""
    if kind == "ranked":
        return _ranked(delta, i, place, density=density, inverse=inverse, **params).to(delta.device)
    if kind == "random":
        limit = _limit(density[i])
        mask = _piece_uniforms(delta, i, place, **params) < limit
        factor = LEVELS / limit if inverse else 1
    else:
        scores, thresholds, factor = as_floats(delta.abs()), place.pass_results[THRESHOLDS][i], 1
        mask = thresholds[0].largest(scores, place.begin)
        if kind == "outliers":
            mask ^= thresholds[1].largest(scores, place.begin)  # the outliers are among the largest
    chosen = torch.from_numpy(mask.view(np.uint8)).to(delta.device).view(delta.shape)
    return chosen.to(delta.dtype).mul_(factor) if inverse else chosen


def _limit(probability: float) -> int:
    """Return the threshold, from 1 to LEVELS, below which an element's uniform number keeps it."""
    # At least one step, since kept elements are divided by the probability as it was rounded.
    return max(round(probability * LEVELS), 1)


def _limits(width: int, density: float, epsilon: float) -> npt.NDArray[np.uint32]:
    """Return `_limit` by rank in the row, from the smallest: d − ε + 2ε·rank/(width − 1).   (width,)"""
    # A row of one element has no ranks: it is kept with probability d.
    share = np.arange(width) / (width - 1) if width > 1 else np.full(1, 0.5)
    # In 32 bits, because LEVELS itself, which means "always", has no place in 16.
    return np.maximum(np.rint((density - epsilon + 2 * epsilon * share) * LEVELS), 1).astype(np.uint32)


def _piece_uniforms(delta: Tensor, i: int, place: TensorSlice, *, seed: int, **_: Any) -> npt.NDArray[np.uint16]:
    return uniforms(seed, place.tensor, i, place.begin, place.begin + delta.numel())


def _ranked(
    delta: Tensor,
    i: int,
    place: TensorSlice,
    *,
    density: Sequence[float],
    epsilon: Sequence[float],
    inverse: bool,
    **params: Any,
) -> Tensor:
    """Return DELLA's factors for whole rows: as `_factors`, with probabilities that grow with the rank in the row.

    (rows, width) → the same, on the CPU
    """
    # Ranks are of the row, so the kernel is given whole rows; see `rows` in `task_arithmetic`.
    rows, width = delta.shape
    # One sort of 64-bit keys in place of an argsort: the bits of a non-negative float are ordered as it is, and the
    # column number below them orders equal values, and is read back as the permutation.
    keys = np.empty((rows, width), np.uint64)
    halves = keys.view(np.uint32)
    halves[:, _HIGH_HALF::2] = as_floats(delta.abs()).view(np.uint32).reshape(rows, width)
    halves[:, _LOW_HALF::2] = np.arange(width, dtype=np.uint32)
    keys.sort(axis=1)
    columns = torch.from_numpy(halves[:, _LOW_HALF::2].astype(np.int64))
    limits = _limits(width, density[i], epsilon[i])
    # Uniform numbers are independent, so they may be assigned by rank instead of by column.
    kept = torch.from_numpy((_piece_uniforms(delta, i, place, **params).reshape(rows, width) < limits).view(np.uint8))
    factors = kept * torch.from_numpy(LEVELS / limits).to(delta.dtype) if inverse else kept
    return torch.empty_like(factors).scatter_(1, columns, factors)


def _count_kept(
    delta: Tensor, i: int, place: TensorSlice, *, kind: Sparsifier, density: Sequence[float], **params: Any
) -> int:
    """Count the elements from `place.begin` on that are kept, which does not depend on the values of δ."""
    if not 0 < density[i] < 1:
        return delta.numel() if density[i] >= 1 else 0
    assert kind in ("random", "ranked"), "the others have passes, which count"
    drawn = _piece_uniforms(delta, i, place, **params)
    if kind == "random":
        return int(np.count_nonzero(drawn < _limit(density[i])))
    width = place.width
    # Measures get pieces cut anywhere, so the first limit is that of the column in which this piece begins.
    limits = np.roll(_limits(width, density[i], params["epsilon"][i]), -(place.begin % width))
    return int(np.count_nonzero(drawn < np.resize(limits, len(drawn))))


def _magnitudes(
    tensors: Sequence[Tensor], place: TensorSlice, *, density: Sequence[float], **_: Any
) -> list[Tensor | None]:
    base, *models = tensors
    return [(model - base).abs_() if 0 < d < 1 else None for model, d in zip(models, density, strict=True)]


def _wanted(
    place: TensorSlice, positive: Sequence[int], *, kind: Sparsifier, density: Sequence[float], **params: Any
) -> list[tuple[int, ...]]:
    """Return how many of the largest |δ| are kept; for "outliers", also how many of those are dropped again."""
    n = n_elements(place.shape)
    if kind == "magnitude":
        # int() rounds down, as in mergekit; at least one element is kept, so that a small tensor is not erased.
        return [(max(1, int(d * n)) if 0 < d < 1 else n * (d >= 1),) for d in density]
    wanted: list[tuple[int, ...]] = []
    for d, gamma in zip(density, params["gamma"], strict=True):
        kept = n if d >= 1 else max(0, int(d * n))
        # Where γ + d > 1, fewer outliers are dropped: the density comes first.
        smallest = max(0, n - kept - int(gamma * n))
        wanted.append((n - smallest, n - smallest - kept))
    return wanted


def _gather_norms(
    tensors: Sequence[Tensor],
    place: TensorSlice,
    *,
    density: Sequence[float],
    rescale: bool,
    paper: bool,
    **params: Any,
) -> list[tuple[float, float, int]]:
    """Return per model, of the piece: Σ|δ| before and after, where needed, and the number of kept elements."""
    base, *models = tensors
    norms = []
    for i, model in enumerate(models):
        if not 0 < density[i] < 1:
            norms.append((0.0, 0.0, base.numel() if density[i] >= 1 else 0))
            continue
        magnitude = (model - base).abs_()
        # Sums over pieces are Python floats in the pieces' order: the same on any number of threads.
        before = magnitude.sum().item()
        factors = _factors(magnitude, i, place, density=density, **params)
        kept = int(np.count_nonzero(factors.cpu().numpy()))
        norms.append((before, magnitude.mul_(factors).sum().item(), kept))
    return norms


def _reduce_norms(
    gathered: Sequence[list[tuple[float, float, int]]], place: TensorSlice, **_: Any
) -> Mapping[str, Any]:
    scales, counts = [], []
    for pieces in zip(*gathered, strict=True):
        before, after, kept = map(sum, zip(*pieces, strict=True))
        # Where everything was dropped there is nothing to scale, and a ratio would be infinite.
        scales.append(before / after if before >= _NEGLIGIBLE and after >= _NEGLIGIBLE else 1.0)
        counts.append(kept)
    return {SCALES: scales, KEPT: counts}


LEVELS = 1 << 16  # a uniform number is one of so many: a probability is met to 1 / 131,072
_PER_WORD = 4  # 16-bit numbers in one 64-bit word of the generator


def uniforms(seed: int, tensor: str, model: int, begin: int, end: int) -> npt.NDArray[np.uint16]:
    """Return uniform random numbers from {0, …, LEVELS − 1} for a tensor's elements [begin, end): (end − begin,)."""
    generator = np.random.PCG64(int(hash_text(f"{seed}/{model}/{tensor}"), 16))
    first = begin // _PER_WORD
    # A piece thus has the same numbers wherever, and on whichever thread, it is computed.
    generator.advance(first)
    words = generator.random_raw(-(-end // _PER_WORD) - first)
    # Little-endian on every machine, or the same seed would give another mask.
    return words.astype("<u8", copy=False).view("<u2")[begin - first * _PER_WORD : end - first * _PER_WORD]
