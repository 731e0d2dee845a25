"""The kernels of task vectors, each under its formula (arXiv 2509.01363, equations 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from surgery.checkpoint.reader import TORCH_DTYPES
from surgery.engine.edit_report import MEASURES
from surgery.engine.kernel import Kernel, Sums


def difference(tensors: Sequence[Tensor]) -> Tensor:
    """v = θ_tuned − θ_base.   tuned, base: (…) → (…)"""
    tuned, base = tensors
    return tuned - base


def add_vector(tensors: Sequence[Tensor], *, scale: float) -> Tensor:
    """θ_target + α·v.   target, v: (…) → (…)"""
    target, vector = tensors
    # Product and sum are rounded apart, never fused: every device then gives the same bits.
    return (vector * scale).add_(target)


def add_difference(tensors: Sequence[Tensor], *, scale: float) -> Tensor:
    """θ_target + α·(θ_tuned − θ_base), v never stored.   target, tuned, base: (…) → (…)"""
    target, tuned, base = tensors
    return (tuned - base).mul_(scale).add_(target)


def measure_vector(tensors: Sequence[Tensor], stored: Tensor, *, scale: float) -> Sums:
    """Return `MEASURES` of an edit by a stored vector.

    They are: how many updates α·v are not zero, how many of those changed the stored value, Σ(α·v)², Σθ_target².
    """
    target, vector = tensors
    return _measure(target, vector, stored, scale)


def measure_difference(tensors: Sequence[Tensor], stored: Tensor, *, scale: float) -> Sums:
    """Return `MEASURES` of an edit whose vector is θ_tuned − θ_base."""
    target, tuned, base = tensors
    return _measure(target, tuned - base, stored, scale)


def measure_restored(tensors: Sequence[Tensor], stored: Tensor, *, dtype: torch.dtype) -> Sums:
    """Return how many elements of θ_tuned differ from θ_base + v, with v as stored and the sum in `dtype`; Σθ_base²."""
    tuned, base = tensors
    # Rounded to the stored dtype as `add_vector` would round it, then compared in the compute dtype.
    restored = (base + stored).to(dtype).to(base.dtype)
    return _count((restored - tuned).bool()), torch.dot(base, base)


def _measure(target: Tensor, vector: Tensor, stored: Tensor, scale: float) -> Sums:
    # Norms are of α·v; α enters as a factor, since v alone is at hand.
    # `bool()` of a difference is several times as fast as `!=`, and true for NaN as well.
    updates = vector.bool()
    delivered = (stored - target).bool().logical_and_(updates)
    return (
        _count(updates),
        _count(delivered),
        float(torch.dot(vector, vector)) * scale**2,
        torch.dot(target, target),
    )


def _count(flags: Tensor) -> Tensor | int:
    # On a CPU numpy counts several times as fast.
    return int(np.count_nonzero(flags.numpy())) if flags.device.type == "cpu" else flags.sum()


# By the dtype that the tuned model stores a tensor in.
DIFFERENCE = {
    # `measure_restored` needs the dtype: whether base + v restores the tuned value depends on its rounding.
    name: Kernel(
        "difference", difference, measures=("missed", "base_squares"), measure=partial(measure_restored, dtype=dtype)
    )
    for name, dtype in TORCH_DTYPES.items()
}
ADD_VECTOR = Kernel("add_vector", add_vector, measures=MEASURES, measure=measure_vector)
ADD_DIFFERENCE = Kernel("add_difference", add_difference, measures=MEASURES, measure=measure_difference)
