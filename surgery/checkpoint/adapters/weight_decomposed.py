"""The weight of a DoRA adapter (arXiv 2402.09353), m · V / ‖V‖ with V = W + ΔW, computed when the tensor is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.checkpoint.stored_tensor import Derivation, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.checkpoint.reader import TensorReader

_BLOCK = 1 << 22  # elements of V that norms of columns are summed over at once: 16 MiB of fp32


@dataclass(frozen=True)
class WeightDecomposed(Derivation):
    """m · V / ‖V‖: V has a norm, and m a value, for each output.

    updated: V, 2-D; derived.
    magnitude: m, one value per output.
    by_column: the outputs are V's columns, not its rows: of GPT-2's Conv1D, and of embeddings, whose norms PEFT takes
        over all tokens.
    """

    updated: StoredTensor
    magnitude: StoredTensor
    by_column: bool = False

    def values(self, tensor: StoredTensor, begin: int, end: int, reader: TensorReader, slot: object) -> Tensor:
        """Return elements [begin, end) in fp32, or in fp64 if one of the tensors is F64."""
        import torch

        compute = reader.compute_dtype(part.dtype for part in (*self.updated.parts, self.magnitude))
        width = tensor.shape[1]
        magnitude = reader.whole_tensor(self.magnitude, (slot, "m")).to(compute).flatten()
        # Whole rows: what a slice cuts off counts in the norm of its row as well.
        first, last = begin // width, -(-end // width)
        if self.by_column:
            factors = magnitude / reader.kept(self, lambda: self._column_norms(reader, slot)).to(compute)
            values = reader.tensor(self.updated, first * width, last * width, slot).view(-1, width).to(compute)
            scaled = values * factors
        else:
            values = reader.tensor(self.updated, first * width, last * width, slot).view(-1, width).to(compute)
            scaled = values * (magnitude[first:last] / torch.linalg.norm(values, dim=1))[:, None]
        return scaled.reshape(-1)[begin - first * width : end - first * width]

    def _column_norms(self, reader: TensorReader, slot: object) -> Tensor:
        """Return the norm of each column of V, in fp64: (columns,)."""
        import torch

        rows, width = self.updated.shape
        squares = torch.zeros(width, dtype=torch.float64)
        step = max(_BLOCK // width, 1)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            block = reader.tensor(self.updated, first * width, last * width, slot).view(-1, width)
            squares += block.double().square().sum(dim=0)
        return squares.sqrt()
