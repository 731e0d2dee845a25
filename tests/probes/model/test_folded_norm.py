"""Promises of probes.model.folded_norm: every norm is a linear map, up to one scale for each row."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from probes.model.folded_norm import fold_norm


@pytest.mark.parametrize("width", [1 + 2**k for k in range(2, 6)] + [4, 32])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm, nn.RMSNorm, CohereLayerNorm, nn.LayerNorm])
def test_a_norm_is_linear_but_for_its_scale(kind, width):
    generator = torch.Generator().manual_seed(width)
    norm = kind(width)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(width, generator=generator))
        fold = fold_norm(norm, width)
        x = torch.randn(3, width, generator=generator)
        y = norm(x)
    centred = kind in (CohereLayerNorm, nn.LayerNorm)
    assert fold.centred == centred
    c = x - x.mean(-1, keepdim=True) if centred else x
    # c is fixed, so that one number per row must make gain ⊙ c + bias out of it.
    torch.testing.assert_close(fold.scale(x, y).unsqueeze(1) * fold.gain * c + fold.bias, y, atol=1e-4, rtol=1e-4)
    assert fold.fits(x, y, 1e-4)
    assert not fold.fits(x, y.tanh(), 1e-4)
    direction = torch.randn(width, generator=generator)
    torch.testing.assert_close(
        fold.scale(x, y) * (x @ fold.pull_back(direction)) + fold.bias @ direction, y @ direction, atol=1e-3, rtol=1e-3
    )
    if isinstance(norm, nn.LayerNorm):
        torch.testing.assert_close(fold.bias, norm.bias, atol=1e-5, rtol=1e-5)
