"""Elementwise methods: weighted means, copies, and swaps of values that are close."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from merges.config.settings import MethodSpec, ParameterSpec
from merges.methods.measures import measured_kernel
from merges.methods.registry import Params, register
from surgery.engine.kernel import Kernel, Parameter, TensorSlice

_NEAREST = 1e-6  # differences below this count as this: t / |w − x| stays finite


def weighted_sum(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return Σᵢ cᵢ xᵢ.   x: k × (…), c: (k,) → (…)"""
    # One accumulator, added to in the models' order: k temporaries would not fit in a CPU's cache.
    total = tensors[0] * coefficients[0]
    for tensor, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
        total.add_(tensor, alpha=coefficient)
    return total


def linear(
    tensors: Sequence[Tensor], place: TensorSlice, *, weight: Sequence[float], normalize: bool, **_: Parameter
) -> Tensor:
    """Return Σᵢ aᵢ xᵢ, over Σᵢ aᵢ with `normalize` (model soups, arXiv 2203.05482).   k × (…) → (…)"""
    total = sum(weight) if normalize else 1.0
    return weighted_sum(tensors, [a / total for a in weight])


def passthrough(tensors: Sequence[Tensor], place: TensorSlice, *, scale: Sequence[float], **_: Parameter) -> Tensor:
    """Return s·x.   (…) → (…)"""
    return tensors[0] * scale[0]


def nearswap(tensors: Sequence[Tensor], place: TensorSlice, *, t: float, **_: Parameter) -> Tensor:
    """Return s·x + (1 − s)·w with s = min(t / max(|w − x|, 1e-6), 1): close values are swapped, distant ones stay.

    w, x: (…) → (…)
    """
    base, model = tensors
    # In place from the first difference on: one temporary, whatever the number of steps.
    share = (base - model).abs_().clamp_(min=_NEAREST).reciprocal_().mul_(t).clamp_(max=1)
    return torch.lerp(base, model, share)  # exact at both ends


def _build(params: Params, models: int, based: bool, *, name: str, fn: Callable[..., Tensor]) -> Kernel:
    return measured_kernel(name, fn, models, based=based)


register(
    MethodSpec(
        "linear",
        (
            ParameterSpec("weight", "number", per_model=True, summary="a: the model's share"),
            ParameterSpec("normalize", "boolean", True, summary="divide by the sum of the weights"),
        ),
        summary="weighted mean of the models",
        paper="arXiv:2203.05482",
    ),
    partial(_build, name="linear", fn=linear),
)
register(
    MethodSpec(
        "passthrough",
        (ParameterSpec("scale", "number", 1.0, per_model=True, summary="what the tensor is multiplied by"),),
        models=(1, 1),
        summary="one model's tensors as they are: layers stacked, repeated or left out",
    ),
    partial(_build, name="passthrough", fn=passthrough),
)
register(
    MethodSpec(
        "nearswap",
        (ParameterSpec("t", "number", low=0, summary="differences up to t are swapped whole"),),
        base="required",
        models=(1, 1),
        summary="the base's values give way where the other model's are close",
        paper="huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    ),
    partial(_build, name="nearswap", fn=nearswap),
)
