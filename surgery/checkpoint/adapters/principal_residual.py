"""The base that PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) train on: W without the adapter's first B₀·A₀.

Their adapters begin with the main part of W, which is taken out of it. PEFT does the same whenever it loads one, so the
part is computed again, from W alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from surgery.checkpoint.stored_tensor import Derivation, StoredTensor
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.checkpoint.reader import TensorReader


@dataclass(frozen=True)
class PrincipalResidual(Derivation):
    """W − P, rounded to W's dtype as in training.

    PiSSA: P = U_r S_r V_rᵀ, the part of the r largest singular values. OLoRA: P = scale · Q_r R_r of W = Q R.

    weight: W, 2-D.
    transposed: W is stored as (in, out); the decomposition is of (out, in).
    """

    weight: StoredTensor
    kind: Literal["pissa", "olora"]
    rank: int
    scale: float
    transposed: bool = False

    def values(self, tensor: StoredTensor, begin: int, end: int, reader: TensorReader, slot: object) -> Tensor:
        """Return elements [begin, end) in W's dtype."""
        left, right = reader.kept(self, lambda: self._factors(reader, slot))
        width = tensor.shape[1]
        first, last = begin // width, -(-end // width)
        weight = reader.tensor(self.weight, begin, end, slot)
        part = (left[first:last] @ right).reshape(-1)[begin - first * width : end - first * width]
        return (weight.to(part.dtype) - part).to(weight.dtype)

    def _factors(self, reader: TensorReader, slot: object) -> tuple[Tensor, Tensor]:
        """Return the factors of P as W is stored: (rows, rank) and (rank, columns)."""
        import torch

        compute = reader.compute_dtype((self.weight.dtype,))
        weight = reader.whole_tensor(self.weight, (slot, "whole")).to(compute)
        if self.kind == "olora":
            q, r = torch.linalg.qr(weight)
            return self.scale * q[:, : self.rank], r[: self.rank].clone()
        try:
            u, s, vh = torch.linalg.svd(weight.T if self.transposed else weight, full_matrices=False)
        except RuntimeError as error:  # NaN and infinite values have no decomposition
            raise SurgeryError(
                f'"{self.weight.name}" has no singular values, which PiSSA\'s base follows from', where=self.weight.file
            ) from error
        # Copies: views would keep the whole decomposition in memory.
        left, right = u[:, : self.rank] * s[: self.rank], vh[: self.rank].clone()
        return (right.T, left.T) if self.transposed else (left, right)
