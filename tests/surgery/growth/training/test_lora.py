"""An update changes nothing at first, trains alone, and merging it changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.architectures import VOCABULARY
from support.models import make_live
from torch import nn

from surgery.errors import SurgeryError
from surgery.growth.plan import Lora
from surgery.growth.training.lora import add_lora
from surgery.models.loaded_model import LoadedModel

IDS = torch.arange(4, 24)[None] % VOCABULARY


def logits(live: LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        return live.model(input_ids=IDS, use_cache=False).logits.clone()


def named(live: LoadedModel) -> dict[str, nn.Module]:
    return {f"layers.{index}": layer for index, layer in enumerate(live.layers)}


def move(live: LoadedModel) -> None:
    """Gives every B a value, as training would."""
    draw = torch.Generator().manual_seed(3)
    for name, parameter in live.model.named_parameters():
        if name.endswith("lora.B"):
            parameter.data.normal_(0, 0.1, generator=draw)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "deepseek_v3", "lfm2"])
def test_merged_layers_put_out_what_they_did_with_the_update_beside_them(family: str, tmp_path: Path) -> None:
    live = make_live(family, tmp_path)
    before, names = logits(live), [name for name, _ in live.model.named_parameters()]
    attached = add_lora(named(live), Lora(rank=2, alpha=4), seed=0)
    assert torch.equal(logits(live), before)
    move(live)
    beside = logits(live)
    assert not torch.allclose(beside, before, atol=1e-3)
    attached.merge()
    assert [name for name, _ in live.model.named_parameters()] == names
    torch.testing.assert_close(logits(live), beside, atol=2e-5, rtol=1e-5)


def test_merging_rounds_the_sum_once(tmp_path: Path) -> None:
    live = make_live("llama", tmp_path)
    attached = add_lora(named(live), Lora(rank=4, alpha=8), seed=0)
    move(live)
    module = live.layers[0].self_attn.q_proj
    exact = module.weight.double() + 2 * module.lora.B.double() @ module.lora.A.double()
    attached.merge()
    assert torch.equal(module.weight, exact.float())


def test_the_start_follows_from_seed_and_name(tmp_path: Path) -> None:
    starts = []
    for seed in (0, 0, 1):
        live = make_live("llama", tmp_path / str(len(starts)))
        add_lora(named(live), Lora(), seed=seed)
        starts.append([live.layers[at].mlp.up_proj.lora.A for at in (0, 1)])
    assert torch.equal(starts[0][0], starts[1][0]) and torch.equal(starts[0][1], starts[1][1])
    assert not torch.equal(starts[0][0], starts[2][0]) and not torch.equal(starts[0][0], starts[0][1])
    assert starts[0][0].abs().max() <= 32**-0.5 and starts[0][0].abs().max() > 0.9 * 32**-0.5


def test_only_updates_get_gradients_and_removal_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    live = make_live("llama", tmp_path)
    before = logits(live)
    live.model.requires_grad_(False)
    attached = add_lora(named(live), Lora(rank=2), seed=0)
    live.model(input_ids=IDS).logits.logsumexp(-1).sum().backward()
    with_gradient = {name for name, parameter in live.model.named_parameters() if parameter.grad is not None}
    # Seven matrices in each of two layers, and A has a gradient too, though it is zero while B is.
    assert len(with_gradient) == 2 * 7 * 2 and all(".lora." in name for name in with_gradient)
    move(live)
    attached.remove()
    attached.remove()
    assert torch.equal(logits(live), before)


def test_autocast_computes_updates_in_its_own_dtype(tmp_path: Path) -> None:
    live = make_live("llama", tmp_path)
    add_lora(named(live), Lora(rank=2), seed=0)
    projection = live.layers[0].self_attn.q_proj
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert projection(torch.ones(1, 2, 32)).dtype == torch.bfloat16


def test_a_rank_that_is_too_large_is_named(tmp_path: Path) -> None:
    live = make_live("llama", tmp_path)
    with pytest.raises(SurgeryError, match=r"lora.rank: got 40, which layers.0.self_attn.q_proj \(32 × 32\) has no"):
        add_lora(named(live), Lora(rank=40), seed=0)
    assert not any("lora" in name for name, _ in live.model.named_parameters())


def test_layers_without_matrices_are_an_error() -> None:
    with pytest.raises(SurgeryError, match="hold no matrix"):
        add_lora({"layers.0": nn.LayerNorm(4)}, Lora(), seed=0)
