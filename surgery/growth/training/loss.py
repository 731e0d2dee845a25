"""The mean cross-entropy of logits, with its gradient in the same pass.

In come logits and the tokens that were right, out comes a scalar. Torch's own writes and reads three more tensors as
large as the logits; here a few rows at a time stay in the processor's cache, and one tensor is written: the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits that are looked at together: what fits a CPU's second-level cache; on a GPU a launch costs more than memory.
AT_A_TIME = {"cpu": 2**18}
ELSEWHERE = 2**26


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """1/N · Σₙ (log Σᵥ exp zₙᵥ − zₙₜ₍ₙ₎), in nats.   logits z: (N, V), targets t: (N,) int64 → a scalar in fp32

    Sums are in fp32 whatever the dtype of the logits, and so is the gradient before it is rounded to that.
    """
    loss: Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        n, size = logits.shape
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if wanted else None
        losses = torch.empty(n, device=logits.device)
        rows = max(1, AT_A_TIME.get(logits.device.type, ELSEWHERE) // size)
        for begin in range(0, n, rows):
            part, right = slice(begin, begin + rows), targets[begin : begin + rows, None]
            logs = torch.log_softmax(logits[part].float(), -1)
            losses[part] = logs.gather(1, right)[:, 0].neg_()
            if gradient is not None:
                # ∂/∂z = (softmax z − 1 at t) / N
                shares = logs.exp_()
                shares.scatter_(1, right, shares.gather(1, right) - 1)
                gradient[part] = shares.mul_(1 / n)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses.mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        if scale.is_cpu and float(scale) == 1:
            return gradient, None
        # In place: autograd itself refuses to come by again.
        return gradient.mul_(scale), None
