"""Norms as linear maps that are scaled once per position, so that a direction can be traced back through them.

Shapes: D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.models.loaded_model import hidden_out


@dataclass(frozen=True)
class FoldedNorm:
    """norm(h) = s(h) · g ⊙ c(h) + bias, where c subtracts the mean if `centred` (LayerNorm) and s is one number.

    gain, bias: (D,) fp32 on the CPU.
    """

    gain: Tensor
    bias: Tensor
    centred: bool

    def pull_back(self, direction: Tensor) -> Tensor:
        """Return the direction u with direction·norm(h) = s(h)·u·h + direction·bias: (…, D) → (…, D)."""
        scaled = direction * self.gain.to(direction.device)
        return scaled - scaled.mean(-1, keepdim=True) if self.centred else scaled

    def scale(self, before: Tensor, after: Tensor) -> Tensor:
        """Return s of each row, by least squares from the norm's input and output: (…, D), (…, D) → (…,)."""
        centred = before - before.mean(-1, keepdim=True) if self.centred else before
        expected = self.gain.to(before.device) * centred
        return ((after - self.bias.to(before.device)) * expected).sum(-1) / expected.square().sum(-1)

    def fits(self, before: Tensor, after: Tensor, tolerance: float) -> bool:
        """Return whether this describes the norm on the given inputs and outputs."""
        centred = before - before.mean(-1, keepdim=True) if self.centred else before
        bias = self.bias.to(before.device)
        predicted = self.scale(before, after).unsqueeze(-1) * self.gain.to(before.device) * centred + bias
        return bool((predicted - after).norm() <= tolerance * after.norm())


@torch.inference_mode()
def fold_norm(norm: nn.Module, width: int) -> FoldedNorm:
    """Return gain, bias and kind of a norm, measured on three inputs: no family's formula is assumed."""
    parameter = next(norm.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    device = torch.device("cpu") if parameter is None else parameter.device
    # ±1 has mean 0 and mean square 1: LayerNorm and RMSNorm both leave it as it is, but for gain and bias.
    signs = torch.ones(width, dtype=dtype, device=device)
    signs[1::2] = -1
    if width % 2:
        signs[-1] = 0  # keeps the mean at 0
    plus, minus = hidden_out(norm(signs)).float(), hidden_out(norm(-signs)).float()
    bias = (plus + minus) / 2
    gain = (plus - minus) / 2 * signs.float()
    if width % 2:
        # The gain at the zero is measured with the signs shifted by one.
        other = signs.roll(1)
        first, second = hidden_out(norm(other)).float(), hidden_out(norm(-other)).float()
        gain[-1] = ((first - second) / 2 * other.float())[-1]
    # A norm that subtracts the mean does not change when 3 is added to its input.
    shifted = hidden_out(norm(signs + 3)).float()
    centred = bool((shifted - plus).norm() <= 1e-2 * plus.norm())
    return FoldedNorm(gain.cpu(), bias.cpu(), centred)
