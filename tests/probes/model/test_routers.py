"""Promises of model.routers: every family's routing is found by what happens, and watching it changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.models import hook_count, make_live, open_folder
from support.moe import Lives, experts_modules, logits_of, planter, texts
from support.moe_families import EXPERTS, FAMILIES, TOP_K
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from probes.model.routers import Router, find_routers, intercept_routing
from surgery.errors import WRONG_USAGE, SurgeryError

IDS = torch.tensor([sequence.ids[:18] for sequence in texts(3)])


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Lives:
    return planter(tmp_path_factory.mktemp("routers"))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layers_with_experts_are_found_and_nothing_is_left_behind(name: str, lives: Lives) -> None:
    live = lives(name)
    before = hook_count(live)
    found = find_routers(live)
    assert {router.layer: router.experts for router in found} == experts_modules(live)
    assert [router.layer for router in found] == sorted(router.layer for router in found)
    assert {(router.n_experts, router.top_k) for router in found} == {(EXPERTS, TOP_K)}
    assert hook_count(live) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_watching_and_handing_on_the_same_leaves_the_logits(name: str, lives: Lives) -> None:
    live = lives(name)
    routers, plain = find_routers(live), logits_of(live, IDS)
    seen: list[tuple[int, tuple[int, ...]]] = []

    def watch(layer: int, index: Tensor, weights: Tensor) -> None:
        seen.append((layer, tuple(index.shape)))
        assert weights.shape == index.shape and weights.is_floating_point()

    with intercept_routing(routers, watch):
        assert torch.equal(logits_of(live, IDS), plain)
    assert seen == [(router.layer, (IDS.numel(), TOP_K)) for router in routers]
    with intercept_routing(routers, lambda layer, index, weights: (index.clone(), weights.clone())):
        assert torch.equal(logits_of(live, IDS), plain)


def test_what_is_rewritten_is_what_the_experts_get(lives: Lives) -> None:
    live = lives("qwen3_moe")
    plain = logits_of(live, IDS)
    before = hook_count(live)
    with intercept_routing(find_routers(live), lambda layer, index, weights: (index, torch.zeros_like(weights))):
        silent = logits_of(live, IDS)
    assert not torch.equal(silent, plain)
    for module in experts_modules(live).values():
        module.gate_up_proj, kept = nn.Parameter(torch.zeros_like(module.gate_up_proj)), module.gate_up_proj
        module.kept = kept
    assert torch.equal(logits_of(live, IDS), silent)
    for module in experts_modules(live).values():
        module.gate_up_proj = module.kept
        del module.kept
    assert torch.equal(logits_of(live, IDS), plain) and hook_count(live) == before


def test_an_error_inside_leaves_no_hook(lives: Lives) -> None:
    live = lives("mixtral")
    before = hook_count(live)

    def fail(layer: int, index: Tensor, weights: Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), intercept_routing(find_routers(live), fail):
        logits_of(live, IDS)
    assert hook_count(live) == before


class Named(nn.Module):
    """Experts that are handed their routing by name."""

    num_experts = 3

    def forward(self, hidden: Tensor, *, weights: Tensor, chosen: Tensor) -> Tensor:
        return hidden * weights.sum(1, keepdim=True) + chosen.sum()


def test_routing_that_is_handed_over_by_name_is_rewritten_by_name() -> None:
    experts = Named()
    router = Router(4, experts, 3, 1, "chosen", "weights")
    states, chosen, weights = torch.ones(2, 5), torch.tensor([[1], [2]]), torch.tensor([[0.5], [0.25]])
    seen: list[Any] = []

    def double(layer: int, index: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((layer, index, given))
        return index * 0, given * 2

    with intercept_routing([router], double):
        out = experts(states, chosen=chosen, weights=weights)
    assert seen == [(4, chosen, weights)]
    assert out[:, 0].tolist() == [1.0, 0.5]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_dense_model_is_told_to_be_one(name: str, tmp_path: Path) -> None:
    live = make_live(name, tmp_path / name)
    before = hook_count(live)
    with pytest.raises(SurgeryError, match=f"{name}: no layer routes tokens to experts") as caught:
        find_routers(live)
    assert caught.value.exit_code == WRONG_USAGE and hook_count(live) == before


def test_routing_that_no_module_shows_is_an_error_not_a_guess(tmp_path: Path) -> None:
    # Llama 4 multiplies the experts' inputs by weights that are spread over all experts.
    config = transformers.Llama4TextConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        intermediate_size_mlp=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=1,
        pad_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama4")
    with pytest.raises(SurgeryError, match="in a way that can be watched"):
        find_routers(open_folder(tmp_path / "llama4"))
