"""The update of a LoRA adapter, W + s·B·A (arXiv 2106.09685), computed when the tensor is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.checkpoint.stored_tensor import Derivation, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.checkpoint.reader import TensorReader


@dataclass(frozen=True)
class LowRank(Derivation):
    """W + ΔW with ΔW = scale · B·A, transposed if W is stored as (in, out).

    weight: W, 2-D. a: (r, in), b: (out, r), both 2-D in the adapter's file.
    """

    weight: StoredTensor
    a: StoredTensor
    b: StoredTensor
    scale: float
    transposed: bool = False

    def values(self, tensor: StoredTensor, begin: int, end: int, reader: TensorReader, slot: object) -> Tensor:
        """Return elements [begin, end) of W + ΔW in fp32, or in fp64 if W, A or B is F64."""
        compute = reader.compute_dtype((self.weight.dtype, self.a.dtype, self.b.dtype))
        width = tensor.shape[1]
        # Only the rows that [begin, end) touches: the product for a whole embedding would take gigabytes.
        first, last = begin // width, -(-end // width)
        a = reader.whole_tensor(self.a, (slot, "a")).to(compute)
        if self.transposed:
            b = reader.whole_tensor(self.b, (slot, "b")).to(compute)
            rows = a[:, first:last].T @ b.T
        else:
            rank = self.b.shape[1]
            b = reader.tensor(self.b, first * rank, last * rank, (slot, "b")).to(compute)
            rows = b.view(last - first, rank) @ a
        delta = rows.reshape(-1)[begin - first * width : end - first * width]
        return reader.tensor(self.weight, begin, end, slot).to(compute) + self.scale * delta


@dataclass(frozen=True)
class ScaledSum(Derivation):
    """weight + scale · other, of one shape: a bias that LoRA's B has is scaled as its matrix is."""

    weight: StoredTensor
    other: StoredTensor
    scale: float

    def values(self, tensor: StoredTensor, begin: int, end: int, reader: TensorReader, slot: object) -> Tensor:
        """Return elements [begin, end) in fp32, or in fp64 if one of the two is F64."""
        compute = reader.compute_dtype((self.weight.dtype, self.other.dtype))
        other = reader.tensor(self.other, begin, end, (slot, "other")).to(compute)
        return reader.tensor(self.weight, begin, end, slot).to(compute) + self.scale * other
