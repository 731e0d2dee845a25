"""Which elements of a task vector δ are kept: by magnitude, between outliers, by chance, by chance and magnitude.

Every sparsifier works in two steps. Streaming passes find what must be known of the whole tensor: cuts in the order of
magnitudes, and Σ|δ| before and after where the kept elements are rescaled. Then `masked` gives any piece its mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merges.methods.draws import LEVELS, uniforms
from merges.methods.measures import KEPT
from merges.methods.ranks import CUTS, order_passes
from surgery.dtypes import n_elements
from surgery.plan import Pass, Place

Sparsifier = Literal["none", "magnitude", "outliers", "random", "ranked"]
SCALES = "scales"  # in `Place.known`: per model, what its kept elements are multiplied by
_NEGLIGIBLE = 1e-7  # an L1 norm below this is not divided by


def passes(kind: Sparsifier, density: Sequence[float], *, rescale: bool) -> tuple[Pass, ...]:
    """The passes that `sparsified` needs for these densities; none where nothing is dropped."""
    if kind == "none" or all(d >= 1 for d in density):
        return ()
    ordered = order_passes(_magnitudes, _wanted) if kind in ("magnitude", "outliers") else ()
    # Of what chance keeps, only counting tells how much it was.
    return (*ordered, Pass(_gather_norms, _settle_norms)) if rescale or not ordered else ordered


def sparsified(
    delta: Tensor, i: int, place: Place, *, kind: Sparsifier, density: Sequence[float], **params: Any
) -> Tensor:
    """The piece of δᵢ at `place` with what is dropped set to zero and the rest rescaled. Overwrites `delta`."""
    if kind == "none" or density[i] >= 1:
        return delta
    if density[i] <= 0:
        return delta.zero_()
    kept = _masked(delta, i, place, kind=kind, density=density, **params)
    if params["paper"] and kind == "random":
        return kept.div_(density[i])
    if params["paper"] and kind == "ranked":
        return kept  # each element was divided by its own probability
    return kept.mul_(place.known[SCALES][i]) if params["rescale"] else kept


def _masked(
    delta: Tensor, i: int, place: Place, *, kind: Sparsifier, density: Sequence[float], **params: Any
) -> Tensor:
    if kind == "random":
        mask = _uniforms(delta, i, place, params["seed"]) < round(density[i] * LEVELS)
    elif kind == "ranked":
        factors = _ranked(delta, i, place, density=density[i], **params)
        return delta.mul_(torch.from_numpy(factors).to(delta.device))
    else:
        scores = magnitudes(delta)
        cuts = place.known[CUTS][i]
        mask = cuts[0].largest(scores, place.begin)
        if kind == "outliers":
            mask &= ~cuts[1].largest(scores, place.begin)
    return delta.mul_(torch.from_numpy(mask.view(np.uint8)).to(delta.device).view(delta.shape))


def _uniforms(delta: Tensor, i: int, place: Place, seed: int) -> Any:
    # In 32 bits, because LEVELS itself, which means "always", has no place in 16.
    return uniforms(seed, place.tensor, i, place.begin, place.begin + delta.numel())


def _ranked(
    delta: Tensor, i: int, place: Place, *, density: float, epsilon: Sequence[float], seed: int, paper: bool, **_: Any
) -> npt.NDArray[np.uint8] | npt.NDArray[np.float32]:
    """DELLA's choice for whole rows: kept with probability d − ε + 2ε·rank/(width − 1), rank 0 the smallest in its row.

    Returns 0 and 1, or in the paper's way 0 and 1/probability: (rows, width).
    """
    rows, width = delta.shape
    # The bits of a non-negative float order as it does; the column below them makes equals differ, and comes back.
    keys = magnitudes(delta).view(np.uint32).astype(np.uint64).reshape(rows, width)
    keys <<= 32
    keys |= np.arange(width, dtype=np.uint64)
    keys.sort(axis=1)
    columns = keys.view(np.uint32)[:, _LOW_HALF::2]
    share = np.arange(width) / (width - 1) if width > 1 else np.full(1, 0.5)
    probability = density - epsilon[i] + 2 * epsilon[i] * share
    # Uniform numbers are independent, so that it is all one whether they are dealt by column or by rank.
    kept = _uniforms(delta, i, place, seed).reshape(rows, width) < np.rint(probability * LEVELS).astype(np.uint16)
    chosen = np.empty((rows, width), np.float32 if paper else np.uint8)
    np.put_along_axis(chosen, columns, kept / probability.astype(np.float32) if paper else kept, axis=1)
    return chosen


_LOW_HALF = 0 if np.little_endian else 1


def magnitudes(delta: Tensor) -> npt.NDArray[np.float32]:
    """|δ| in fp32 on the CPU, 1-D."""
    flat: npt.NDArray[np.float32] = delta.abs().reshape(-1).to("cpu", torch.float32).numpy()
    return flat


def _magnitudes(tensors: Sequence[Tensor], place: Place, *, density: Sequence[float], **_: Any) -> list[Tensor | None]:
    base, *models = tensors
    return [(model - base).abs_() if 0 < d < 1 else None for model, d in zip(models, density, strict=True)]


def _wanted(
    place: Place, positive: Sequence[int], *, kind: Sparsifier, density: Sequence[float], **params: Any
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


def _gather_norms(tensors: Sequence[Tensor], place: Place, **params: Any) -> list[tuple[float, float, int]]:
    base, *models = tensors
    found = []
    for i, model in enumerate(models):
        delta = model - base
        before = delta.abs().sum().item()
        kept = sparsified(delta, i, place, **{**params, "rescale": False, "paper": False})
        found.append((before, kept.abs().sum().item(), int(np.count_nonzero(kept.cpu().numpy()))))
    return found


def _settle_norms(gathered: Sequence[list[tuple[float, float, int]]], place: Place, **_: Any) -> Mapping[str, Any]:
    scales, counts = [], []
    for pieces in zip(*gathered, strict=True):
        before, after, kept = map(sum, zip(*pieces, strict=True))
        scales.append(before / after if before >= _NEGLIGIBLE and after >= _NEGLIGIBLE else 1.0)
        counts.append(kept)
    return {SCALES: scales, KEPT: counts}
