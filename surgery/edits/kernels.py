"""Kernels of edits to heads and experts, each under its formula: both are blocks of a stored tensor.

A head is a block of its output projection's columns. Of a projection (out, n·d), or (n·d, out) where transposed
(GPT-2's Conv1D), head h of n has the columns [h·d, (h+1)·d), or those rows. An expert is a block of its layer's down
projections where they are stored as one tensor, (n, …) or (n·d, out): blocks along the first axis, called transposed
here as well. A tensor of a single expert is one block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.checkpoint.dtypes import n_elements
from surgery.engine.edit_report import MEASURES
from surgery.engine.kernel import Kernel, Sums, TensorSlice


def spread(per_head: Tensor, place: TensorSlice, count: int, *, transposed: bool) -> Tensor:
    """Expand one value per block to one per element, for `count` elements of the flat tensor from `place.begin` on.

    per_head: (n,) → (count,), same dtype and device.
    """
    n, width, begin = len(per_head), place.width, place.begin
    if not transposed:
        # Every row has the same pattern; the piece may begin inside of one.
        row = per_head.repeat_interleave(width // n)
        skip = begin % width
        return row.repeat(-(-(skip + count) // width))[skip : skip + count]
    size, first, last = _blocks_of(n, place, count)
    # Blocks follow one another in memory; those at the piece's ends are cut.
    edges = (torch.arange(first, last + 1, device=per_head.device) * size).clamp(begin, begin + count)
    # Without output_size a GPU would have to report the sum of the lengths first.
    return per_head[first:last].repeat_interleave(edges.diff(), output_size=count)


def flags_of(heads: Sequence[int], n_heads: int) -> Tensor:
    """Return which of `n_heads` heads are among `heads`: bool (n_heads,)."""
    flags = torch.zeros(n_heads, dtype=torch.bool)
    flags[list(heads)] = True
    return flags


def scale_blocks(
    tensors: Sequence[Tensor], place: TensorSlice, *, scales: tuple[float, ...], transposed: bool
) -> Tensor:
    """W_h ← γ_h · W_h, with exact zeros where γ_h = 0.   W: a 1-D piece → the same"""
    (weight,) = tensors
    if transposed and _untouched(scales, weight, place):
        return weight
    factors = _factors(scales, weight, place, transposed)
    # Zero times a stored infinity would be NaN, and zero times a negative value −0.
    return (weight * factors).masked_fill_(factors == 0, 0.0)


def shift_exponents(tensors: Sequence[Tensor], place: TensorSlice, *, shifts: tuple[int, ...]) -> Tensor:
    """e_h ← e_h + log₂ β_h, for block scales 2^(e − 127) stored as bytes e.   e: a 1-D piece → the same

    `shifts` are log₂ β_h of n blocks along the first axis; the caller must check that sums stay within a byte.
    """
    (exponents,) = tensors
    # Bytes arrive as fp32, in which these sums are exact.
    return exponents + _factors(tuple(map(float, shifts)), exponents, place, True)


def measure_shifted(tensors: Sequence[Tensor], stored: Tensor, place: TensorSlice, *, shifts: tuple[int, ...]) -> Sums:
    """`MEASURES` of an edit whose update of the block scales is (β_h − 1) · 2^(e_h − 127)."""
    # 127 is the exponents' bias. In fp64: 2^−127 is subnormal in fp32, and its square zero.
    before, after = (torch.exp2(exponents.double() - 127) for exponents in (tensors[0], stored))
    return _measure(before, after - before, after)


def measure_scaled(
    tensors: Sequence[Tensor], stored: Tensor, place: TensorSlice, *, scales: tuple[float, ...], transposed: bool
) -> Sums:
    """`MEASURES` of an edit whose update is (γ_h − 1) · W_h."""
    (weight,) = tensors
    if transposed and _untouched(scales, weight, place):
        return 0.0, 0.0, 0.0, torch.dot(weight, weight)
    update = weight * (_factors(scales, weight, place, transposed) - 1)
    return _measure(weight, update, stored)


def add_means(tensors: Sequence[Tensor], *, heads: tuple[int, ...], transposed: bool) -> Tensor:
    """b + Σ_h W_h · μ_h over `heads`, summed in fp64.   b: (out,), W: (out, n·d) or transposed, μ: (n, d) → (out,)"""
    bias, *_ = tensors
    return bias.double() + _mean_outputs(tensors, heads, transposed)


def measure_means(tensors: Sequence[Tensor], stored: Tensor, *, heads: tuple[int, ...], transposed: bool) -> Sums:
    """`MEASURES` of an edit whose update of the bias is Σ_h W_h · μ_h."""
    return _measure(tensors[0], _mean_outputs(tensors, heads, transposed).to(tensors[0].dtype), stored)


def restore_blocks(
    tensors: Sequence[Tensor], place: TensorSlice, *, heads: tuple[int, ...], n_heads: int, transposed: bool
) -> Tensor:
    """W_h ← the kept W_h for `heads`, W elsewhere.   W, kept: 1-D pieces → the same"""
    weight, kept = tensors
    # Chosen, not computed: (kept − W) + W would be rounded.
    return torch.where(_inside(weight, place, heads, n_heads, transposed), kept, weight)


def measure_restored(
    tensors: Sequence[Tensor],
    stored: Tensor,
    place: TensorSlice,
    *,
    heads: tuple[int, ...],
    n_heads: int,
    transposed: bool,
) -> Sums:
    """`MEASURES` of an edit whose update is the kept W_h − W_h."""
    weight, kept = tensors
    inside = _inside(weight, place, heads, n_heads, transposed)
    return _measure(weight, (kept - weight).masked_fill_(~inside, 0.0), stored)


def _blocks_of(n: int, place: TensorSlice, count: int) -> tuple[int, int, int]:
    """Return the size of n blocks along the first axis, and the blocks [first, last) that a piece overlaps."""
    size = n_elements(place.shape) // n
    return size, place.begin // size, -(-(place.begin + count) // size)


def _untouched(scales: tuple[float, ...], weight: Tensor, place: TensorSlice) -> bool:
    # One expert of a hundred in a tensor is scaled: most pieces can skip the arithmetic.
    _, first, last = _blocks_of(len(scales), place, weight.numel())
    return all(scale == 1 for scale in scales[first:last])


def _factors(scales: tuple[float, ...], weight: Tensor, place: TensorSlice, transposed: bool) -> Tensor:
    per_head = torch.tensor(scales, dtype=weight.dtype, device=weight.device)
    return spread(per_head, place, weight.numel(), transposed=transposed)


def _inside(weight: Tensor, place: TensorSlice, heads: tuple[int, ...], n_heads: int, transposed: bool) -> Tensor:
    return spread(flags_of(heads, n_heads).to(weight.device), place, weight.numel(), transposed=transposed)


def _mean_outputs(tensors: Sequence[Tensor], heads: tuple[int, ...], transposed: bool) -> Tensor:
    _, weight, means = tensors
    n, d = means.shape
    wanted = list(heads)
    mu = means[wanted].double()
    # Not a matrix product: its order of summation would depend on the number of threads.
    if transposed:
        return (weight.view(n, d, -1)[wanted].double() * mu[:, :, None]).sum(dim=(0, 1))
    return (weight.view(-1, n, d)[:, wanted].double() * mu).sum(dim=(1, 2))


def _measure(weight: Tensor, update: Tensor, stored: Tensor) -> Sums:
    # NaN counts as an update, as in the kernels of vectors.
    updates = update.bool()
    # Of the updates alone: with an adapter, rounding W + ΔW to the stored dtype changes other values too.
    delivered = (stored - weight).bool().logical_and_(updates)
    return updates.sum(), delivered.sum(), torch.dot(update, update), torch.dot(weight, weight)


SCALE_BLOCKS = Kernel("scale_blocks", scale_blocks, measures=MEASURES, measure=measure_scaled, takes_slice=True)
ADD_MEANS = Kernel("add_means", add_means, kind="whole", measures=MEASURES, measure=measure_means)
SHIFT_EXPONENTS = Kernel(
    "shift_exponents", shift_exponents, measures=MEASURES, measure=measure_shifted, takes_slice=True
)
RESTORE_BLOCKS = Kernel("restore_blocks", restore_blocks, measures=MEASURES, measure=measure_restored, takes_slice=True)
