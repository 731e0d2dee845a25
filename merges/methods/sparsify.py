"""Which elements of a task vector δ are kept: by magnitude, between outliers, by chance, by chance and magnitude.

Every sparsifier works in two steps. Streaming passes find what must be known of the whole tensor: cuts in the order of
magnitudes, and Σ|δ| before and after where what is kept is rescaled by it. Then `sparsified` does any piece on its own.

Chance is dealt in steps of 1/`LEVELS`, and never less than one step: a probability is met to half a step, and what is
divided by it is divided by the probability that was dealt.
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
from merges.methods.topk import CUTS, as_floats, topk_passes
from surgery.checkpoint.dtypes import n_elements
from surgery.engine.kernel import Pass, TensorSlice
from surgery.io.hashing import hash_text

Sparsifier = Literal["none", "magnitude", "outliers", "random", "ranked"]
SCALES = "scales"  # in `TensorSlice.pass_results`: per model, what its kept elements are multiplied by
_NEGLIGIBLE = 1e-7  # an L1 norm below this is not divided by, as in mergekit
_LOW_HALF, _HIGH_HALF = (0, 1) if np.little_endian else (1, 0)


def passes(kind: Sparsifier, density: Sequence[float], *, rescale: bool, paper: bool) -> tuple[Pass, ...]:
    """The passes that `sparsified` needs for these densities; none where nothing is dropped."""
    if kind == "none" or not any(0 < d < 1 for d in density):
        return ()
    if kind in ("random", "ranked"):
        return (Pass(_gather_norms, _settle_norms),) if rescale and not paper else ()
    ordered = topk_passes(_magnitudes, _wanted)
    return (*ordered, Pass(_gather_norms, _settle_norms)) if rescale else ordered


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
    """The piece of δᵢ at `place` with what is dropped set to zero and, with `rescale`, the rest made larger.

    What chance kept is divided by its probability where `paper` says so; else all of it is multiplied by Σ|δ| before
    over Σ|δ| after. Overwrites `delta`.
    """
    if kind == "none" or density[i] >= 1:
        return delta
    if density[i] <= 0:
        return delta.zero_()
    by_chance = kind in ("random", "ranked")
    inverse = by_chance and rescale and paper
    kept = delta.mul_(_chosen(delta, i, place, kind=kind, density=density, inverse=inverse, **params))
    return kept.mul_(place.pass_results[SCALES][i]) if rescale and not inverse else kept


def counter(kind: Sparsifier, needed: Sequence[Pass]) -> Count | None:
    """`Measures.count` for a sparsifier; where passes are needed these have counted already."""
    return partial(_count_kept, kind=kind) if kind != "none" and not needed else None


def _chosen(
    delta: Tensor,
    i: int,
    place: TensorSlice,
    *,
    kind: Sparsifier,
    density: Sequence[float],
    inverse: bool = False,
    **params: Any,
) -> Tensor:
    """1 for what is kept, or with `inverse` one over the probability that chance gave it; 0 for the rest."""
    if kind == "ranked":
        return _ranked(delta, i, place, density=density, inverse=inverse, **params).to(delta.device)
    if kind == "random":
        limit = _limit(density[i])
        mask = _dealt(delta, i, place, **params) < limit
        factor = LEVELS / limit if inverse else 1
    else:
        scores, cuts, factor = as_floats(delta.abs()), place.pass_results[CUTS][i], 1
        mask = cuts[0].largest(scores, place.begin)
        if kind == "outliers":
            mask ^= cuts[1].largest(scores, place.begin)  # what is dropped again lies among the largest
    chosen = torch.from_numpy(mask.view(np.uint8)).to(delta.device).view(delta.shape)
    return chosen.to(delta.dtype).mul_(factor) if inverse else chosen


def _limit(probability: float) -> int:
    """How many of the LEVELS numbers that are dealt mean "kept"."""
    return max(round(probability * LEVELS), 1)


def _limits(width: int, density: float, epsilon: float) -> npt.NDArray[np.uint32]:
    """`_limit` by rank in the row, from the smallest: d − ε + 2ε·rank/(width − 1).   (width,)"""
    share = np.arange(width) / (width - 1) if width > 1 else np.full(1, 0.5)
    # In 32 bits, because LEVELS itself, which means "always", has no place in 16.
    return np.maximum(np.rint((density - epsilon + 2 * epsilon * share) * LEVELS), 1).astype(np.uint32)


def _dealt(delta: Tensor, i: int, place: TensorSlice, *, seed: int, **_: Any) -> npt.NDArray[np.uint16]:
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
    """DELLA's choice for whole rows: 1 for what is kept, or with `inverse` one over its probability; 0 for the rest.

    (rows, width) → the same, on the CPU
    """
    rows, width = delta.shape
    # The bits of a non-negative float order as it does; the column below them makes equals differ, and comes back.
    keys = np.empty((rows, width), np.uint64)
    halves = keys.view(np.uint32)
    halves[:, _HIGH_HALF::2] = as_floats(delta.abs()).view(np.uint32).reshape(rows, width)
    halves[:, _LOW_HALF::2] = np.arange(width, dtype=np.uint32)
    keys.sort(axis=1)
    columns = torch.from_numpy(halves[:, _LOW_HALF::2].astype(np.int64))
    limits = _limits(width, density[i], epsilon[i])
    # Uniform numbers are independent, so that it is all one whether they are dealt by column or by rank.
    kept = torch.from_numpy((_dealt(delta, i, place, **params).reshape(rows, width) < limits).view(np.uint8))
    factors = kept * torch.from_numpy(LEVELS / limits).to(delta.dtype) if inverse else kept
    return torch.empty_like(factors).scatter_(1, columns, factors)


def _count_kept(
    delta: Tensor, i: int, place: TensorSlice, *, kind: Sparsifier, density: Sequence[float], **params: Any
) -> int:
    """How many of the elements from `place.begin` on are kept: all, none, or what chance deals, whatever δ is."""
    if not 0 < density[i] < 1:
        return delta.numel() if density[i] >= 1 else 0
    assert kind in ("random", "ranked"), "cuts have passes, and those count"
    dealt = _dealt(delta, i, place, **params)
    if kind == "random":
        return int(np.count_nonzero(dealt < _limit(density[i])))
    width = place.width
    limits = np.roll(_limits(width, density[i], params["epsilon"][i]), -(place.begin % width))
    return int(np.count_nonzero(dealt < np.resize(limits, len(dealt))))


def _magnitudes(
    tensors: Sequence[Tensor], place: TensorSlice, *, density: Sequence[float], **_: Any
) -> list[Tensor | None]:
    base, *models = tensors
    return [(model - base).abs_() if 0 < d < 1 else None for model, d in zip(models, density, strict=True)]


def _wanted(
    place: TensorSlice, positive: Sequence[int], *, kind: Sparsifier, density: Sequence[float], **params: Any
) -> list[tuple[int, ...]]:
    """How many of the largest |δ| are kept; for "outliers", how many of those are dropped again."""
    n = n_elements(place.shape)
    if kind == "magnitude":
        return [(max(1, int(d * n)) if 0 < d < 1 else n * (d >= 1),) for d in density]
    wanted: list[tuple[int, ...]] = []
    for d, gamma in zip(density, params["gamma"], strict=True):
        kept = n if d >= 1 else max(0, int(d * n))
        # Where γ and d leave no room for both, fewer outliers are dropped: the density is what was asked for.
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
    """Per model of the piece: Σ|δ| before and after, where either is needed, and how many elements are kept."""
    base, *models = tensors
    found = []
    for i, model in enumerate(models):
        if not 0 < density[i] < 1:
            found.append((0.0, 0.0, base.numel() if density[i] >= 1 else 0))
            continue
        magnitude = (model - base).abs_()
        before = magnitude.sum().item()
        chosen = _chosen(magnitude, i, place, density=density, **params)
        kept = int(np.count_nonzero(chosen.cpu().numpy()))
        found.append((before, magnitude.mul_(chosen).sum().item(), kept))
    return found


def _settle_norms(
    gathered: Sequence[list[tuple[float, float, int]]], place: TensorSlice, **_: Any
) -> Mapping[str, Any]:
    scales, counts = [], []
    for pieces in zip(*gathered, strict=True):
        before, after, kept = map(sum, zip(*pieces, strict=True))
        scales.append(before / after if before >= _NEGLIGIBLE and after >= _NEGLIGIBLE else 1.0)
        counts.append(kept)
    return {SCALES: scales, KEPT: counts}


LEVELS = 1 << 16  # a uniform number is one of so many: a probability is met to 1 / 131,072
_PER_WORD = 4  # 16-bit numbers in what the generator makes at once


def uniforms(seed: int, tensor: str, model: int, begin: int, end: int) -> npt.NDArray[np.uint16]:
    """Independent uniform numbers from {0, …, LEVELS − 1} for the elements [begin, end) of a tensor: (end − begin,)."""
    generator = np.random.PCG64(int(hash_text(f"{seed}/{model}/{tensor}"), 16))
    first = begin // _PER_WORD
    generator.advance(first)
    words = generator.random_raw(-(-end // _PER_WORD) - first)
    # Little-endian on every machine, or the same seed would mean another mask.
    return words.astype("<u8", copy=False).view("<u2")[begin - first * _PER_WORD : end - first * _PER_WORD]
