"""Mean cross-entropy of logits, with its gradient computed in the same pass.

Torch's own writes and reads three more tensors as large as the logits; here a few rows at a time stay in the CPU's
cache, and one tensor is written: the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits that are processed at a time: what fits a CPU's L2 cache; on a GPU a kernel launch costs more than memory.
CPU_CHUNK = 2**18
GPU_CHUNK = 2**26


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return 1/N · Σₙ (log Σᵥ exp zₙᵥ − zₙₜ₍ₙ₎), in nats.   logits z: (N, V), targets t: (N,) int64 → a scalar in fp32

    Sums are in fp32 whatever the dtype of the logits, and so is the gradient before it is rounded to that.
    """
    loss: Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        n, size = logits.shape
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        losses = torch.empty(n, device=logits.device)
        rows = max(1, (CPU_CHUNK if logits.is_cpu else GPU_CHUNK) // size)
        for begin in range(0, n, rows):
            chunk, target = slice(begin, begin + rows), targets[begin : begin + rows, None]
            log_probs = torch.log_softmax(logits[chunk].float(), -1)
            losses[chunk] = log_probs.gather(1, target)[:, 0].neg_()
            if gradient is not None:
                # ∂/∂z = (softmax z − 1 at t) / N
                probs = log_probs.exp_()
                probs.scatter_(1, target, probs.gather(1, target) - 1)
                gradient[chunk] = probs.mul_(1 / n)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses.mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        if scale.is_cpu and float(scale) == 1:
            return gradient, None
        # In place is safe: autograd refuses a second backward pass over saved tensors.
        return gradient.mul_(scale), None
