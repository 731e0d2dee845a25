"""The vote on signs (TIES, arXiv 2306.01708): where models disagree on a direction, the minority is left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def elected(changes: Sequence[Tensor], factors: Sequence[float], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Of the changes whose sign is that of the sum of all: Σ factorᵢ·changeᵢ, and Σ shareᵢ for who divides by it.

    A sum of 0 counts as positive. A change of 0 has no sign: it agrees with none and adds nothing to the shares.
    Overwrites `changes`.   k × (…) → (…), (…)
    """
    majority = changes[0].clone()
    for change in changes[1:]:
        majority.add_(change)
    majority.ge_(0).mul_(2).sub_(1)
    mixed, taken = torch.zeros_like(majority), torch.zeros_like(majority)
    for change, factor, share in zip(changes, factors, shares, strict=True):
        agreeing = change.mul_(majority).relu_()
        mixed.add_(agreeing, alpha=factor)
        taken.add_(agreeing.sign_(), alpha=share)
    return mixed.mul_(majority), taken
