"""Promises of probes.model.expert_norms: the share of single experts is what their own arithmetic gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models import hook_count
from support.moe import PLANTED, plant, texts, watch_experts
from support.moe_families import EXPERTS, TOP_K
from torch import Tensor

from probes.model.expert_norms import norm_ratios
from probes.model.routers import find_routers
from surgery.checkpoint.selectors import Expert
from surgery.models.loaded_model import LoadedModel


def brute(live: LoadedModel, expert: Expert, sequences: list) -> float | None:
    """Mean ‖w · E(x)‖ ÷ ‖x‖ of one expert, token by token in fp64."""
    found = []
    module = next(m for m in live.layers[expert.layer].modules() if type(m).__name__.endswith("Experts"))
    first, last = (held[expert.index].detach().double() for held in (module.gate_up_proj, module.down_proj))
    for sequence in sequences:
        inputs: list[Tensor] = []
        handle = live.layers[expert.layer].register_forward_pre_hook(
            lambda module, given, inputs=inputs: inputs.append(given[0][0].double())
        )
        states, index, weights = watch_experts(live, torch.tensor([sequence.ids]))[expert.layer]
        handle.remove()
        for token in range(len(sequence.ids)):
            for place in range(TOP_K):
                if int(index[token, place]) == expert.index:
                    gate, up = (first @ states[token].double()).chunk(2)
                    out = weights[token, place].double() * (last @ (torch.nn.functional.silu(gate) * up))
                    found.append(float(out.norm() / inputs[0][token].norm()))
    return sum(found) / len(found) if found else None


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_ratios_are_those_of_a_count_by_hand(name: str, tmp_path: Path) -> None:
    live, sequences = plant(name, tmp_path / name), texts(7)
    routers = find_routers(live)
    experts = [Expert(router.layer, number) for router in routers for number in range(EXPERTS)]
    before = hook_count(live)
    found = norm_ratios(live, routers, sequences, experts)
    assert hook_count(live) == before and list(found) == experts
    for expert in experts:
        expected = brute(live, expert, sequences)
        assert found[expert] == (None if expected is None else pytest.approx(expected, rel=1e-4)), expert
    assert found[PLANTED]
    # Batches do not matter.
    for tokens in (1, 60):
        again = norm_ratios(live, routers, sequences, experts[:3], max_tokens=tokens)
        assert again == {expert: pytest.approx(found[expert], rel=1e-5) for expert in experts[:3]}


def test_an_expert_that_never_fires_has_none(tmp_path: Path) -> None:
    live = plant("qwen3_moe", tmp_path / "m")
    found = norm_ratios(live, find_routers(live), texts(3, markers=()), [PLANTED])
    assert found == {PLANTED: None}
