"""Promises of growth.training.loss: torch's cross-entropy and its gradient, as exact, in fewer passes over memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from surgery.growth.training import loss as module
from surgery.growth.training.loss import cross_entropy


def example(n: int, size: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(n + size)
    logits = (scale * torch.randn(n, size, generator=draw)).to(dtype)
    return logits.requires_grad_(), torch.randint(0, size, (n,), generator=draw)


def reference(logits: Tensor, targets: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    exact = logits.detach().double().requires_grad_()
    value = functional.cross_entropy(exact, targets)
    (value * factor).backward()
    assert exact.grad is not None
    return value.detach(), exact.grad


@pytest.mark.parametrize(("n", "size"), [(1, 1), (7, 5), (12, 96), (50, 1000)])
@pytest.mark.parametrize("at_a_time", [1, 2000, 2**18])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_value_and_gradient_are_those_of_fp64(
    n: int, size: int, at_a_time: int, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CPU_CHUNK", at_a_time)
    logits, targets = example(n, size)
    value, gradient = reference(logits, targets, factor)
    found = cross_entropy(logits, targets)
    (found * factor).backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.detach().double(), value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=1e-5, atol=1e-8)


def test_logits_in_bf16_are_summed_in_fp32_and_their_gradient_rounded_once() -> None:
    logits, targets = example(20, 300, torch.bfloat16)
    value, gradient = reference(logits, targets)
    found = cross_entropy(logits, targets)
    found.backward()
    assert found.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(found.detach().double(), value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=2**-8, atol=1e-10)


def test_huge_logits_neither_overflow_nor_lose_the_right_token() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], requires_grad=True)
    found = cross_entropy(logits, torch.tensor([2, 1]))
    found.backward()
    assert found.item() == pytest.approx((2e4 + 1.0986123) / 2)
    assert logits.grad.tolist()[0] == [0.5, 0, -0.5]


def test_without_gradients_none_is_made() -> None:
    logits, targets = example(7, 5)
    with torch.no_grad():
        found = cross_entropy(logits, targets)
    assert not found.requires_grad
    torch.testing.assert_close(found, functional.cross_entropy(logits.detach(), targets))


def test_the_gradient_is_given_once() -> None:
    logits, targets = example(7, 5)
    found = 0.5 * cross_entropy(logits, targets)
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()
