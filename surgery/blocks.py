"""The kernels of edits to heads, each under its formula: a head is a block of its output projection's columns.

In come stored output projections, (out, n·d), or (n·d, out) where transposed (GPT-2's Conv1D), and their biases; head
h of n owns the columns [h·d, (h+1)·d), or those rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.arithmetic import MEASURES
from surgery.plan import Kernel, Place, Sums


def spread(per_head: Tensor, place: Place, count: int, *, transposed: bool) -> Tensor:
    """One value per head → one per element, for `count` elements of the flattened projection from `place.begin` on.

    per_head: (n,) → (count,), same dtype and device.
    """
    n, width, begin = len(per_head), place.width, place.begin
    if not transposed:
        row = per_head.repeat_interleave(width // n)
        skip = begin % width
        return row.repeat(-(-(skip + count) // width))[skip : skip + count]
    first, last = begin // width, -(-(begin + count) // width)
    rows = per_head.repeat_interleave(place.shape[0] // n)[first:last]
    skip = begin - first * width
    return rows.repeat_interleave(width)[skip : skip + count]


def flags_of(heads: Sequence[int], n_heads: int) -> Tensor:
    """Which of `n_heads` heads are among `heads`: bool (n_heads,)."""
    flags = torch.zeros(n_heads, dtype=torch.bool)
    flags[list(heads)] = True
    return flags


def scale_blocks(tensors: Sequence[Tensor], place: Place, *, scales: tuple[float, ...], transposed: bool) -> Tensor:
    """W_h ← γ_h · W_h, with exact zeros where γ_h = 0.   W: a 1-D piece → the same"""
    (weight,) = tensors
    factors = _factors(scales, weight, place, transposed)
    # Zero times a stored infinity would be NaN, and zero times a negative value −0.
    return (weight * factors).masked_fill_(factors == 0, 0.0)


def measure_scaled(
    tensors: Sequence[Tensor], stored: Tensor, place: Place, *, scales: tuple[float, ...], transposed: bool
) -> Sums:
    """`MEASURES` of an edit whose update is (γ_h − 1) · W_h."""
    (weight,) = tensors
    update = weight * (_factors(scales, weight, place, transposed) - 1)
    return _measure(weight, update, stored)


def add_means(tensors: Sequence[Tensor], *, heads: tuple[int, ...], transposed: bool) -> Tensor:
    """b + Σ_h W_h · μ_h over `heads`, summed in fp64.   b: (out,), W: (out, n·d) or transposed, μ: (n, d) → (out,)"""
    bias, *_ = tensors
    return bias.double() + _moved(tensors, heads, transposed)


def measure_means(tensors: Sequence[Tensor], stored: Tensor, *, heads: tuple[int, ...], transposed: bool) -> Sums:
    """`MEASURES` of an edit whose update of the bias is Σ_h W_h · μ_h."""
    return _measure(tensors[0], _moved(tensors, heads, transposed).to(tensors[0].dtype), stored)


def restore_blocks(
    tensors: Sequence[Tensor], place: Place, *, heads: tuple[int, ...], n_heads: int, transposed: bool
) -> Tensor:
    """W_h ← the kept W_h for `heads`, W elsewhere.   W, kept: 1-D pieces → the same"""
    weight, kept = tensors
    return torch.where(_inside(weight, place, heads, n_heads, transposed), kept, weight)


def measure_restored(
    tensors: Sequence[Tensor], stored: Tensor, place: Place, *, heads: tuple[int, ...], n_heads: int, transposed: bool
) -> Sums:
    """`MEASURES` of an edit whose update is the kept W_h − W_h."""
    weight, kept = tensors
    inside = _inside(weight, place, heads, n_heads, transposed)
    return _measure(weight, (kept - weight).masked_fill_(~inside, 0.0), stored)


def _factors(scales: tuple[float, ...], weight: Tensor, place: Place, transposed: bool) -> Tensor:
    per_head = torch.tensor(scales, dtype=weight.dtype, device=weight.device)
    return spread(per_head, place, weight.numel(), transposed=transposed)


def _inside(weight: Tensor, place: Place, heads: tuple[int, ...], n_heads: int, transposed: bool) -> Tensor:
    return spread(flags_of(heads, n_heads).to(weight.device), place, weight.numel(), transposed=transposed)


def _moved(tensors: Sequence[Tensor], heads: tuple[int, ...], transposed: bool) -> Tensor:
    _, weight, means = tensors
    n, d = means.shape
    wanted = list(heads)
    mu = means[wanted].double()
    # Not a matrix product: its order of summation would depend on the number of threads.
    if transposed:
        return (weight.view(n, d, -1)[wanted].double() * mu[:, :, None]).sum(dim=(0, 1))
    return (weight.view(-1, n, d)[:, wanted].double() * mu).sum(dim=(1, 2))


def _measure(weight: Tensor, update: Tensor, stored: Tensor) -> Sums:
    updates = update.bool()
    delivered = (stored - weight).bool().logical_and_(updates)
    return updates.sum(), delivered.sum(), torch.dot(update, update), torch.dot(weight, weight)


SCALE_BLOCKS = Kernel("scale_blocks", scale_blocks, measures=MEASURES, measure=measure_scaled, placed=True)
ADD_MEANS = Kernel("add_means", add_means, kind="whole", measures=MEASURES, measure=measure_means)
RESTORE_BLOCKS = Kernel("restore_blocks", restore_blocks, measures=MEASURES, measure=measure_restored, placed=True)
