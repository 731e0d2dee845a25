"""Tensors with other rows, and tensors of another file in the dtype of the model, computed when they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from surgery.checkpoint.stored_tensor import Derivation, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.checkpoint.reader import TensorReader


@dataclass(frozen=True, eq=False)
class ReplacedRows(Derivation):
    """A matrix some rows of which are another's.

    weight: the matrix, 2-D.
    rows: (n, width): row i takes the place of row `indices[i]`; of several for one row the last counts.
    """

    weight: StoredTensor
    rows: StoredTensor
    indices: np.ndarray

    def values(self, tensor: StoredTensor, begin: int, end: int, reader: TensorReader, slot: object) -> Tensor:
        """Return elements [begin, end) in fp32, or in fp64 if one of the matrices is F64."""
        compute = reader.compute_dtype((*(part.dtype for part in self.weight.parts), self.rows.dtype))
        width = tensor.shape[1]
        first, last = begin // width, -(-end // width)
        # A copy: the values may lie in the reader's buffer.
        values = reader.tensor(self.weight, first * width, last * width, slot).view(-1, width).to(compute, copy=True)
        here = np.flatnonzero((self.indices >= first) & (self.indices < last))
        if len(here):
            rows = reader.whole_tensor(self.rows, (slot, "rows"))
            for i in here:
                values[int(self.indices[i]) - first] = rows[int(i)]
        return values.reshape(-1)[begin - first * width : end - first * width]


@dataclass(frozen=True)
class Retyped(Derivation):
    """A tensor under another dtype, to which whoever writes it rounds its values once."""

    source: StoredTensor

    def values(self, tensor: StoredTensor, begin: int, end: int, reader: TensorReader, slot: object) -> Tensor:
        """Return elements [begin, end) in the wider of the two dtypes."""
        compute = reader.compute_dtype((self.source.dtype, tensor.dtype))
        return reader.tensor(self.source, begin, end, slot).to(compute)
