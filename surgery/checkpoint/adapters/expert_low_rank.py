"""LoRA on the weights of all experts of a layer in one tensor (PEFT's target_parameters), computed when it is read.

PEFT stores the factors of n experts side by side: A (r·n, in) expert by expert, and B (out, r·n) with the experts
within each rank. Expert e then gets s · B_e·A_e with A_e (r, in) and B_e (out, r).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.checkpoint.stored_tensor import Derivation, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.checkpoint.reader import TensorReader


@dataclass(frozen=True)
class ExpertLowRank(Derivation):
    """W + ΔW of experts.

    weight: W: (n, out, in), or (n, in, out) if transposed; or one expert's matrix, (out, in).
    a, b: the factors of all n experts.
    n_experts: n.
    expert: the expert that a 2-D weight is of.
    outputs: the first of the outputs (rows of B) that `weight` has, where it is a part of what A and B are for: a file
        may have the gate and the up projection as two matrices that the model has as one.
    """

    weight: StoredTensor
    a: StoredTensor
    b: StoredTensor
    scale: float
    n_experts: int
    transposed: bool = False
    expert: int = 0
    outputs: int = 0

    def values(self, tensor: StoredTensor, begin: int, end: int, reader: TensorReader, slot: object) -> Tensor:
        """Return elements [begin, end) of W + ΔW in fp32, or in fp64 if W, A or B is F64."""
        import torch

        compute = reader.compute_dtype((self.weight.dtype, self.a.dtype, self.b.dtype))
        width = tensor.shape[-1]
        rows = tensor.shape[-2]
        a = reader.whole_tensor(self.a, (slot, "a")).to(compute).view(self.n_experts, -1, self.a.shape[1])
        b = reader.whole_tensor(self.b, (slot, "b")).to(compute).view(self.b.shape[0], -1, self.n_experts)
        first, last = begin // width, -(-end // width)
        deltas = [
            self._delta(a[expert], b[:, :, expert], low, high)
            for expert, low, high in _pieces(first, last, rows, self.expert)
        ]
        delta = torch.cat(deltas).reshape(-1) if deltas else torch.zeros(0, dtype=compute)
        delta = delta[begin - first * width : end - first * width]
        return reader.tensor(self.weight, begin, end, slot).to(compute) + self.scale * delta

    def _delta(self, a: Tensor, b: Tensor, low: int, high: int) -> Tensor:
        """Return rows [low, high) of one expert's B·A as W is stored."""
        if self.transposed:
            return a[:, low:high].T @ b.T
        return b[self.outputs + low : self.outputs + high] @ a


def _pieces(first: int, last: int, rows: int, expert: int) -> list[tuple[int, int, int]]:
    """Cut rows [first, last) of all experts into (expert, first row, last row)."""
    pieces = []
    while first < last:
        high = min((first // rows + 1) * rows, last)
        pieces.append((expert + first // rows, first % rows, (high - 1) % rows + 1))
        first = high
    return pieces
