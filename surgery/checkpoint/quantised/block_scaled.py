"""Weights of quantised tensors, code · scale, computed when the tensor is read.

As transformers computes them: codes and scales in fp32, their product rounded to bf16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from surgery.checkpoint.stored_tensor import Derivation, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.checkpoint.reader import TensorReader

# The values of FP4 (e2m1), by their code: the first bit is the sign.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# byte → its two values; the first one is in the lower bits.
_PAIRS = torch.tensor([[_E2M1[byte & 15], _E2M1[byte >> 4]] for byte in range(256)])
MX_GROUP = 32  # values of MXFP4 that share an exponent, in 16 bytes
_PANEL_BYTES = 1 << 22  # of packed rows that are read at once, however large the matrix is


@dataclass(frozen=True)
class BlockScaled(Derivation):
    """w[i, j] = q[i, j] · s[i // b₀, j // b₁], over any number of axes, in bf16.

    codes: q; where `packed`, two FP4 values in each byte along the last axis.
    scale: s, with ⌈size / b⌉ entries along each axis; None for a scale of 1.
    block: b for each axis of the values; blocks at the edge may be smaller.
    """

    codes: StoredTensor
    scale: StoredTensor | None
    block: tuple[int, ...]
    packed: bool = False

    def values(self, tensor: StoredTensor, begin: int, end: int, reader: TensorReader, slot: object) -> Tensor:
        """Return elements [begin, end) of the weights in bf16."""
        # A vector is a column here, whose rows are as short as can be.
        shape = tensor.shape if len(tensor.shape) > 1 else (tensor.n_elements, 1)
        width = shape[-1]
        if begin == end:
            return torch.empty(0, dtype=torch.bfloat16)
        first, last = begin // width, -(-end // width)
        if last - first == 1:
            return self._part(shape, (first, last), (begin - first * width, end - first * width), reader, slot)
        # Rows wider than what is asked for are read apart, so that none is read as a whole.
        if width > end - begin:
            middle = (first + 1) * width
            return torch.cat([self.values(tensor, *part, reader, slot) for part in ((begin, middle), (middle, end))])
        rows = self._part(shape, (first, last), (0, width), reader, slot)
        return rows[begin - first * width : end - first * width]

    def _part(
        self,
        shape: tuple[int, ...],
        rows: tuple[int, int],
        columns: tuple[int, int],
        reader: TensorReader,
        slot: object,
    ) -> Tensor:
        """Return columns [a, b) of rows [first, last), 1-D; of several rows all columns."""
        left, right = columns
        if self.packed:  # from whole bytes
            left, right = left // 2 * 2, -(-right // 2) * 2
        begin, end = rows[0] * shape[-1] + left, (rows[1] - 1) * shape[-1] + right
        if self.packed:
            codes = _PAIRS[reader.raw(self.codes, begin // 2, end // 2, (slot, "codes")).int()]
        else:
            codes = reader.tensor(self.codes, begin, end, (slot, "codes")).float()
        codes = codes.view(rows[1] - rows[0], right - left)
        if self.scale is not None:
            codes = codes * self._scales(shape, rows, (left, right), reader, slot)
        return codes[:, columns[0] - left : columns[1] - left].to(torch.bfloat16).reshape(-1)

    def _scales(
        self,
        shape: tuple[int, ...],
        rows: tuple[int, int],
        columns: tuple[int, int],
        reader: TensorReader,
        slot: object,
    ) -> Tensor:
        """Return the scales of a part, fp32: (rows, columns), or (rows, 1) where a row has one."""
        assert self.scale is not None
        block = self.block if len(self.block) == len(shape) else (*self.block, 1)
        grid = [-(-size // b) for size, b in zip(shape, block, strict=True)]
        # The row of the scales for each row of the values, axis by axis from the last.
        rest, at, stride = torch.arange(*rows), torch.zeros(rows[1] - rows[0], dtype=torch.int64), 1
        for size, b, count in list(zip(shape, block, grid, strict=True))[-2::-1]:
            at += rest % size // b * stride
            rest = rest // size
            stride *= count
        low, high = int(at.min()), int(at.max()) + 1
        left, right = columns[0] // block[-1], -(-columns[1] // block[-1])
        begin, end = low * grid[-1] + left, (high - 1) * grid[-1] + right
        if high - low > 1:
            begin, end, left = low * grid[-1], high * grid[-1], 0
        stored = _exponents_or_floats(self.scale, begin, end, reader, (slot, "scale"))
        scales = stored.view(high - low, -1)[at - low]
        if scales.shape[1] == 1:
            return scales
        offset = columns[0] - left * block[-1]
        return scales.repeat_interleave(block[-1], dim=1)[:, offset : offset + columns[1] - columns[0]]


@dataclass(frozen=True)
class TransposedMxfp4(Derivation):
    """w[e, j, i] = q[e, i, j] · 2^(s[e, i, j // 32] − 127) in bf16, with e2m1 codes q: as gpt-oss has its experts.

    blocks: (experts, rows, groups, 16), two codes in each byte. scales: (experts, rows, groups). The values are
    (experts, 32 · groups, rows).
    """

    blocks: StoredTensor
    scales: StoredTensor

    def values(self, tensor: StoredTensor, begin: int, end: int, reader: TensorReader, slot: object) -> Tensor:
        """Return elements [begin, end) of the weights in bf16."""
        columns, rows = tensor.shape[-2:]
        size = columns * rows
        out = torch.empty(end - begin, dtype=torch.bfloat16)
        at = begin
        while at < end:
            expert, start = divmod(at, size)
            stop = min(end - expert * size, size)
            first, last = start // rows, -(-stop // rows)
            panel = self._columns(expert, first, last, (columns, rows), reader, slot)
            part = panel.reshape(-1)[start - first * rows : stop - first * rows]
            out[at - begin : at - begin + len(part)] = part
            at += len(part)
        return out

    def _columns(
        self, expert: int, first: int, last: int, size: tuple[int, int], reader: TensorReader, slot: object
    ) -> Tensor:
        """Return columns [first, last) of an expert's stored matrix, (columns, rows)."""
        groups, rows = size[0] // MX_GROUP, size[1]
        low, high = first // MX_GROUP, -(-last // MX_GROUP)
        panel = torch.empty(((high - low) * MX_GROUP, rows), dtype=torch.bfloat16)
        half = MX_GROUP // 2
        # Rows are read whole, since columns alone would be a read for each of them: some at a time, for the memory.
        step = max(1, _PANEL_BYTES // (groups * half))
        for top in range(0, rows, step):
            bottom = min(top + step, rows)
            begin, end = ((expert * rows + row) * groups for row in (top, bottom))
            data = reader.raw(self.blocks, begin * half, end * half, (slot, "blocks"))
            codes = _PAIRS[data.view(-1, groups, half)[:, low:high].int()]
            exponents = _exponents_or_floats(self.scales, begin, end, reader, (slot, "scales"))
            factors = exponents.view(-1, groups)[:, low:high, None, None]
            panel[:, top:bottom] = (codes * factors).view(bottom - top, -1).T
        return panel[first - low * MX_GROUP : last - low * MX_GROUP]


def _exponents_or_floats(scale: StoredTensor, begin: int, end: int, reader: TensorReader, slot: object) -> Tensor:
    """Return scales [begin, end) in fp32; bytes e stand for 2^(e − 127)."""
    if scale.dtype not in ("U8", "F8_E8M0"):
        return reader.tensor(scale, begin, end, slot).float()
    data = reader.raw(scale, begin, end, slot)
    factors = torch.exp2(data.float() - 127.0)
    # The dtype has NaN where plain bytes have 2¹²⁸, which is infinite: both are seen as such in the result.
    return factors.masked_fill(data == 255, math.nan) if scale.dtype == "F8_E8M0" else factors
