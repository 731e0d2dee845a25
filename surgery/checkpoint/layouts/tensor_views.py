"""Tensors made of other tensors without arithmetic: cut out, transposed, interleaved, put together.

What is read of the sources is bounded by the slice that is asked for, so that tensors of any size are streamed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgery.checkpoint.dtypes import n_bytes
from surgery.checkpoint.reader import SEGMENT, TORCH_DTYPES
from surgery.checkpoint.stored_tensor import Derivation, StoredTensor

if TYPE_CHECKING:
    from surgery.checkpoint.reader import TensorReader

# A block is read in one go where at least one in so many of its elements is wanted: one long read is faster than
# many short ones, of which each is a call of the kernel or computes a derived source anew.
SPARSEST = 4
LARGEST_BLOCK = SPARSEST * SEGMENT  # elements read in one go: four times what an ordinary segment takes

# Values that mean the same wherever they lie: those of others are codes that belong to a scale beside their tensor.
PLAIN_FLOATS = frozenset(("F16", "BF16", "F32", "F64"))

Dimension = tuple[int, int]  # size, and the stride in elements of the source


@dataclass(frozen=True)
class StridedView(Derivation):
    """Element (i₀, …, iₖ) is that of `source` at offset + Σ iⱼ·strides[j]; counted in elements, last index fastest.

    sizes: of the view's axes; the tensor's own shape may group them otherwise.
    """

    source: StoredTensor
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def values(self, tensor: StoredTensor, begin: int, end: int, reader: TensorReader, slot: object) -> Tensor:
        """Return elements [begin, end) in the dtype that the source is read in."""
        axes = _joined_axes(self.sizes, self.strides)
        if begin == end or (len(axes) == 1 and axes[0][1] == 1):
            return reader.tensor(self.source, self.offset + begin, self.offset + end, slot)
        # Whole rows: the parts of two rows at the ends would otherwise be read element by element.
        width = axes[-1][0]
        first, last = begin // width, -(-end // width)
        out: Tensor | None = None
        position = 0
        for box in _boxes([size for size, _ in axes[:-1]], first, last):
            values = self._box([*box, (0, width)], axes, reader, (slot, "source"))
            if out is None:
                out = _buffer(reader, slot, (last - first) * width, values.dtype)
            out[position : position + values.numel()].view(values.shape).copy_(values)
            position += values.numel()
        assert out is not None, "an empty range was answered above"
        return out[begin - first * width : end - first * width]

    def _box(
        self, box: Sequence[tuple[int, int]], axes: Sequence[Dimension], reader: TensorReader, slot: object
    ) -> Tensor:
        """Read the elements whose index on each axis is in [begin, end) of `box`."""
        start = self.offset + sum(begin * stride for (begin, _), (_, stride) in zip(box, axes, strict=True))
        dims = [(end - begin, stride) for (begin, end), (_, stride) in zip(box, axes, strict=True)]
        # In the order of the source's bytes, and then turned back.
        order = sorted(range(len(dims)), key=lambda axis: -dims[axis][1])
        values = self._gather(start, [dims[axis] for axis in order], reader, slot)
        return values.permute([order.index(axis) for axis in range(len(dims))])

    def _gather(self, start: int, dims: Sequence[Dimension], reader: TensorReader, slot: object) -> Tensor:
        """Read a block from `start` of the source, axes by falling stride; valid until the next call."""
        sizes = [size for size, _ in dims]
        extent = 1 + sum((size - 1) * stride for size, stride in dims)
        if len(dims) == 1 or extent <= min(SPARSEST * math.prod(sizes), LARGEST_BLOCK):
            block = reader.tensor(self.source, start, start + extent, slot)
            return block.as_strided(sizes, [stride for _, stride in dims])
        out: Tensor | None = None
        for index in range(sizes[0]):
            part = self._gather(start + index * dims[0][1], dims[1:], reader, (slot, "part"))
            if out is None:
                out = _buffer(reader, slot, math.prod(sizes), part.dtype).view(sizes)
            out[index].copy_(part)
        assert out is not None, "no axis is empty"
        return out


@dataclass(frozen=True)
class Concatenation(Derivation):
    """The elements of `pieces` one after the other: pieces of equal width joined along their first axis, or stacked."""

    pieces: tuple[StoredTensor, ...]

    def values(self, tensor: StoredTensor, begin: int, end: int, reader: TensorReader, slot: object) -> Tensor:
        """Return elements [begin, end), in the widest dtype of the pieces that they are in."""
        out: Tensor | None = None
        first = 0
        for piece in self.pieces:
            last = first + piece.n_elements
            here, there = max(begin, first), min(end, last)
            if here < there:
                values = reader.tensor(piece, here - first, there - first, (slot, "piece"))
                if there - here == end - begin:
                    return values
                if out is None:
                    out = _buffer(reader, slot, end - begin, values.dtype)
                elif values.dtype != out.dtype:
                    out = out.to(torch.promote_types(out.dtype, values.dtype))
                out[here - begin : there - begin] = values
            first = last
        return torch.zeros(0, dtype=TORCH_DTYPES[tensor.dtype]) if out is None else out


@dataclass(frozen=True)
class Zeros(Derivation):
    """Zeros, for what a vector does not store because it did not move."""

    def values(self, tensor: StoredTensor, begin: int, end: int, reader: TensorReader, slot: object) -> Tensor:
        """Return zeros in the tensor's dtype."""
        return torch.zeros(end - begin, dtype=TORCH_DTYPES[tensor.dtype])


def strided(
    source: StoredTensor, offset: int, sizes: Sequence[int], strides: Sequence[int], shape: Sequence[int] | None = None
) -> StoredTensor:
    """Return a view on `source`, of `shape` where that is another than `sizes`. It still has the source's name."""
    derivation = StridedView(source, offset, tuple(sizes), tuple(strides))
    return _derived(source, source.dtype, tuple(shape or sizes), derivation)


def concatenated(pieces: Sequence[StoredTensor], shape: Sequence[int]) -> StoredTensor | None:
    """Return `pieces` one after the other as a tensor of `shape`; None where they are no plain floats.

    Floats of 16, 32 and 64 bits join in the widest.
    """
    dtypes = dict.fromkeys(piece.dtype for piece in pieces)
    if not dtypes.keys() <= PLAIN_FLOATS:
        return None
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"
    return _derived(pieces[0], dtype, tuple(shape), Concatenation(tuple(pieces)))


def zeros_like(tensor: StoredTensor, shape: Sequence[int]) -> StoredTensor:
    """Return zeros of `shape` in the dtype of `tensor`, which is not read."""
    return _derived(tensor, tensor.dtype, tuple(shape), Zeros())


def _derived(source: StoredTensor, dtype: str, shape: tuple[int, ...], derivation: Derivation) -> StoredTensor:
    return replace(source, dtype=dtype, shape=shape, n_bytes=n_bytes(dtype, shape), derivation=derivation)


def _buffer(reader: TensorReader, slot: object, count: int, dtype: torch.dtype) -> Tensor:
    return reader.buffer((slot, "out"), count * dtype.itemsize).view(dtype)


def _joined_axes(sizes: Sequence[int], strides: Sequence[int]) -> list[Dimension]:
    """Return the axes, neighbours joined where they lie one after the other in the source."""
    axes: list[Dimension] = []
    for size, stride in zip(sizes, strides, strict=True):
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    return axes


def _boxes(sizes: Sequence[int], begin: int, end: int) -> Iterator[list[tuple[int, int]]]:
    """Cut [begin, end) of the indices of an array of `sizes`, last axis fastest, into boxes of ranges on each axis."""
    if not sizes:
        yield []
        return
    inner = math.prod(sizes[1:])
    while begin < end:
        row, left = divmod(begin, inner)
        if left or end - begin < inner:
            stop = min(end, (row + 1) * inner)
            for box in _boxes(sizes[1:], left, left + stop - begin):
                yield [(row, row + 1), *box]
        else:
            rows = (end - begin) // inner
            stop = begin + rows * inner
            yield [(row, row + rows), *((0, size) for size in sizes[1:])]
        begin = stop
