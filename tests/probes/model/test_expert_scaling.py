"""Promises of probes.model.expert_scaling: exactly the formula, exactly what baking does, and nothing left behind."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.models import hook_count, open_folder
from support.moe import MARKER, PLANTED, Lives, experts_modules, logits_of, plant, planter, texts, watch_experts
from support.moe_families import EXPERTS, FAMILIES, TOP_K
from torch import Tensor, nn

from probes.data.choices import Phase, ScalingMethod
from probes.model.expert_scaling import ExpertScaling, scaled_routing
from probes.model.routers import find_routers
from surgery.checkpoint.selectors import Expert
from surgery.edits.experts import scale_experts
from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.models.loaded_model import LoadedModel

IDS = torch.tensor([sequence.ids[:18] for sequence in texts(6)])
# Of layer 1, which all families have experts in. Every token meets two experts of eight.
SCALES = {PLANTED: 64.0, Expert(1, 0): 4.0, Expert(1, 1): 0.5, Expert(1, 2): 0.0}
NOT_RENORMALISED = ("qwen2_moe", "olmoe", "deepseek_v2", "dots1", "flex_olmo", "longcat_flash")
RENORMALISED = tuple(name for name in FAMILIES if name not in NOT_RENORMALISED)


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Lives:
    return planter(tmp_path_factory.mktemp("reinforcing"))


def enter(live: LoadedModel, scales: dict[Expert, float], way: ScalingMethod = "weight", phase: Phase = "all"):
    return scaled_routing(live, find_routers(live), ExpertScaling(scales, way, phase))


def change(
    live: LoadedModel, scales: dict[Expert, float], way: ScalingMethod
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What layer 1's experts are handed without and with a reinforcement: states, numbers, weights in fp64."""
    before = watch_experts(live, IDS)[1]
    with enter(live, scales, way) as applied:
        after = watch_experts(live, IDS)[1]
    assert applied.passes == 1
    assert torch.equal(before[0], after[0])  # what comes before the layer is not touched
    return (before[0], before[1], before[2].double()), (after[0], after[1], after[2].double())


# The formulas, one decision at a time


@pytest.mark.parametrize("name", FAMILIES)
def test_weight_multiplies_the_final_weight_of_chosen_experts_and_nothing_else(name: str, lives: Lives) -> None:
    (_, index, weights), (_, new_index, new_weights) = change(lives(name), SCALES, "weight")
    assert torch.equal(index, new_index)
    touched = 0
    for token in range(IDS.numel()):
        for place in range(TOP_K):
            beta = SCALES.get(Expert(1, int(index[token, place])), 1.0)
            touched += beta != 1
            assert float(new_weights[token, place]) == float(weights[token, place]) * beta
    assert touched


@pytest.mark.parametrize("name", RENORMALISED)
def test_renormalised_brings_the_weights_back_to_their_sum(name: str, lives: Lives) -> None:
    scales = {PLANTED: 3.0, Expert(1, 0): 4.0, Expert(1, 2): 0.25}
    (_, index, weights), (_, new_index, new_weights) = change(lives(name), scales, "renormalised")
    assert torch.equal(index, new_index)
    for token in range(IDS.numel()):
        betas = [scales.get(Expert(1, int(expert)), 1.0) for expert in index[token]]
        raised = [float(weight) * beta for weight, beta in zip(weights[token], betas, strict=True)]
        expected = [value / sum(raised) * float(weights[token].sum()) for value in raised]
        assert new_weights[token].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NOT_RENORMALISED)
def test_renormalised_is_refused_where_weights_are_not(name: str, lives: Lives) -> None:
    before = hook_count(lives(name))
    with pytest.raises(SurgeryError, match="does not renormalise its routing weights") as caught:
        change(lives(name), SCALES, "renormalised")
    assert caught.value.exit_code == WRONG_USAGE and hook_count(lives(name)) == before


def test_renormalised_leaves_zeros_where_all_experts_of_a_token_are_removed(lives: Lives) -> None:
    everyone = {Expert(1, number): 0.0 for number in range(EXPERTS)}
    _, (_, _, weights) = change(lives("mixtral"), everyone, "renormalised")
    assert not weights.any()


def test_logit_adds_the_logarithm_before_selection(lives: Lives) -> None:
    scales = {PLANTED: 1e-4, Expert(1, 0): 20.0, Expert(1, 3): 0.1}
    for name in ("mixtral", "qwen3_moe", "gpt_oss"):
        live = lives(name)
        (states, index, _), (_, new_index, new_weights) = change(live, scales, "logit")
        router = next(
            module
            for module in live.layers[1].modules()
            if any(tuple(p.shape) == (EXPERTS, live.width) for p in module.parameters(recurse=False))
        )
        logits = states.double() @ router.weight.double().T
        if getattr(router, "bias", None) is not None:
            logits = logits + router.bias.double()
        for expert, beta in scales.items():
            logits[:, expert.index] += math.log(beta)
        # Of softmax over all, brought back to a sum of 1, or of softmax over the chosen: the same.
        top, chosen = logits.topk(TOP_K, dim=1)
        assert torch.equal(chosen, new_index)
        assert not torch.equal(index, new_index)
        torch.testing.assert_close(new_weights, top.softmax(1), rtol=1e-4, atol=1e-7)


def test_logit_is_refused_where_the_logits_cannot_be_reached(lives: Lives, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="the router of layer 1 is not one matrix over its experts"):
        change(lives("longcat_flash"), SCALES | {Expert(1, 2): 1.0}, "logit")
    live = plant("mixtral", tmp_path / "m")
    gate = next(module for module in live.layers[1].modules() if type(module).__name__.endswith("Router"))
    plain = gate.forward

    def by_hand(states: Tensor) -> tuple[Tensor, ...]:
        logits = states.reshape(-1, live.width) @ gate.weight.T
        top, index = logits.softmax(1).topk(TOP_K)
        return logits, top / top.sum(1, keepdim=True), index

    gate.forward = by_hand
    before = hook_count(live)
    with pytest.raises(SurgeryError, match="makes its logits in a way that cannot be watched"):
        change(live, {PLANTED: 2.0}, "logit")
    assert hook_count(live) == before
    gate.forward = plain


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "phimoe"])
def test_forced_experts_take_the_places_of_the_weakest_others(name: str, lives: Lives) -> None:
    scales = {Expert(1, 4): 8.0, Expert(1, 2): 0.5}
    (_, index, weights), (_, new_index, new_weights) = change(lives(name), scales, "forced")
    taken = 0
    for token in range(IDS.numel()):
        held = dict(zip(index[token].tolist(), weights[token].tolist(), strict=True))
        for expert in sorted(expert.index for expert in scales):
            if expert not in held:
                free = [other for other in held if Expert(1, other) not in scales]
                gone = min(free, key=lambda other: held[other])
                held[expert] = held.pop(gone)
                taken += 1
        expected = {expert: weight * scales.get(Expert(1, expert), 1.0) for expert, weight in held.items()}
        assert dict(zip(new_index[token].tolist(), new_weights[token].tolist(), strict=True)) == expected
    assert taken > IDS.numel() // 2


def test_no_more_experts_are_forced_than_a_token_has(lives: Lives) -> None:
    three = {Expert(1, number): 2.0 for number in range(3)}
    with pytest.raises(SurgeryError, match="3 experts of layer 1 are to be forced, where a token has 2") as caught:
        change(lives("mixtral"), three, "forced")
    assert caught.value.exit_code == WRONG_USAGE


# Baked and hooked


@pytest.mark.parametrize("name", FAMILIES)
def test_hooked_is_baked_to_the_bit_for_powers_of_two(name: str, lives: Lives, tmp_path: Path) -> None:
    folder = Path(str(lives(name).checkpoint.ref))
    scale_experts(str(folder), tmp_path / "out", scales=SCALES)
    for dtype in (torch.float32, torch.bfloat16):
        live, baked = open_folder(folder, dtype=dtype), open_folder(tmp_path / "out", dtype=dtype)
        plain = logits_of(live, IDS)
        with enter(live, SCALES):
            hooked = logits_of(live, IDS)
        assert torch.equal(hooked, logits_of(baked, IDS))
        assert not torch.equal(hooked, plain) and torch.equal(logits_of(live, IDS), plain)


def test_hooked_is_baked_up_to_rounding_for_other_factors(lives: Lives, tmp_path: Path) -> None:
    folder, scales = Path(str(lives("gpt_oss").checkpoint.ref)), {PLANTED: 3.0, Expert(1, 0): 0.7}
    scale_experts(str(folder), tmp_path / "out", scales=scales)
    with enter(lives("gpt_oss"), scales):
        hooked = logits_of(lives("gpt_oss"), IDS)
    torch.testing.assert_close(hooked, logits_of(open_folder(tmp_path / "out"), IDS), rtol=1e-4, atol=1e-6)


# The phase


def generated(live: LoadedModel, ids: Tensor) -> Tensor:
    """The logits behind each of 5 tokens that are generated from `ids`, (5, N, vocabulary)."""
    made = live.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(made.logits)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_generated_leaves_the_prompt_and_changes_what_follows(name: str, lives: Lives) -> None:
    live = lives(name)
    everyone = {Expert(1, number): 64.0 for number in range(EXPERTS)}
    plain = generated(live, IDS)
    with enter(live, everyone, phase="generated") as applied:
        found = generated(live, IDS)
        assert applied.passes == 4  # of five, the first reads the prompt
        assert torch.equal(logits_of(live, IDS), logits_of(live, IDS)) and applied.passes == 4
    assert torch.equal(found[0], plain[0]) and not torch.equal(found[1], plain[1])
    with enter(live, everyone):
        whole = generated(live, IDS)
    assert not torch.equal(whole[0], plain[0])
    assert torch.equal(generated(live, IDS), plain)


def test_generated_is_a_prompt_read_plainly_and_tokens_read_reinforced(lives: Lives) -> None:
    live, scales = lives("mixtral"), {Expert(1, number): 64.0 for number in range(0, EXPERTS, 2)}
    with enter(live, scales, phase="generated"):
        found = generated(live, IDS)
    with torch.inference_mode():
        first = live.model(IDS, use_cache=True)
        token = first.logits[:, -1:].argmax(2)
        with enter(live, scales):
            second = live.model(token, past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(found[1], second.logits[:, -1].float())


def test_what_is_scored_in_one_pass_is_not_reached_by_generated_and_says_so(lives: Lives) -> None:
    live = lives("mixtral")
    with enter(live, {PLANTED: 64.0}, phase="generated") as applied:
        logits_of(live, IDS)
    with pytest.raises(SurgeryError, match="t: no token was generated one by one") as caught:
        applied.check("t")
    assert caught.value.exit_code == WRONG_USAGE


def test_logits_can_be_raised_for_generated_tokens_only(lives: Lives) -> None:
    live = lives("qwen3_moe")
    plain = generated(live, IDS)
    with enter(live, {Expert(1, 2): 1e4}, "logit", "generated"):
        found = generated(live, IDS)
    assert torch.equal(found[0], plain[0]) and not torch.equal(found[1], plain[1])


# Nothing is left behind


@pytest.mark.parametrize("way", ["weight", "renormalised", "logit", "forced"])
@pytest.mark.parametrize("phase", ["all", "generated"])
def test_on_exit_the_model_is_what_it_was_whatever_happened_inside(
    way: ScalingMethod, phase: Phase, lives: Lives
) -> None:
    live = lives("mixtral")
    before, plain = hook_count(live), logits_of(live, IDS)
    scales = {PLANTED: 4.0, Expert(0, 1): 2.0}
    with enter(live, scales, way, phase):
        assert hook_count(live) > before
        logits_of(live, IDS)
    assert hook_count(live) == before and torch.equal(logits_of(live, IDS), plain)

    def fail(module: nn.Module, arguments: object, output: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), enter(live, scales, way, phase):
        handle = experts_modules(live)[1].register_forward_hook(fail)
        try:
            logits_of(live, IDS)
        finally:
            handle.remove()
    assert hook_count(live) == before and torch.equal(logits_of(live, IDS), plain)


def test_an_error_in_the_router_is_told_as_it_is_and_leaves_nothing(lives: Lives) -> None:
    live = lives("mixtral")
    gate = next(module for module in live.layers[1].modules() if type(module).__name__.endswith("Router"))
    before, plain, kept = hook_count(live), logits_of(live, IDS), gate.forward

    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), enter(live, {PLANTED: 4.0}, "logit"):
        gate.forward = fail
        logits_of(live, IDS)
    del gate.forward
    assert gate.forward == kept
    assert hook_count(live) == before and torch.equal(logits_of(live, IDS), plain)


# Bad input


@pytest.mark.parametrize("beta", [-1.0, math.nan, math.inf, -math.inf])
def test_a_factor_out_of_range_is_refused(beta: float) -> None:
    with pytest.raises(SurgeryError, match=r"L1E5: got β = .* expected a finite number from 0 on") as caught:
        ExpertScaling({PLANTED: beta})
    assert caught.value.exit_code == WRONG_USAGE


@pytest.mark.parametrize("beta", [0.0, -2.0, math.nan])
def test_logit_needs_a_factor_above_0(beta: float) -> None:
    with pytest.raises(SurgeryError, match=r"L1E5: got β = .* expected a finite number above 0"):
        ExpertScaling({PLANTED: beta}, "logit")


def test_ways_and_phases_go_by_their_names() -> None:
    with pytest.raises(SurgeryError, match="--way: got 'loud', expected weight or renormalised or logit or forced"):
        ExpertScaling({PLANTED: 2.0}, "loud")  # type: ignore[arg-type]
    with pytest.raises(SurgeryError, match="--phase: got 'never', expected all or generated"):
        ExpertScaling({PLANTED: 2.0}, phase="never")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scales", "text"),
    [
        ({Expert(1, EXPERTS): 2.0}, "m: L1E8: layer 1 has the experts 0 to 7"),
        ({Expert(9, 0): 2.0}, "m: layer 9 has no experts; those that have: 1"),
        ({Expert(0, 0): 2.0}, "m: layer 0 has no experts; those that have: 1"),
        ({}, "no expert was given"),
    ],
)
def test_experts_that_are_not_there_are_told(scales: dict[Expert, float], text: str, tmp_path: Path) -> None:
    live = plant("glm4_moe", tmp_path / "m")  # its first layer is dense
    with pytest.raises(SurgeryError, match=text) as caught, enter(live, scales):
        pass
    assert caught.value.exit_code == WRONG_USAGE


def test_a_factor_that_the_weights_cannot_hold_is_refused(lives: Lives) -> None:
    with (
        pytest.raises(SurgeryError, match=r"β = 1e\+39 does not fit the routing weights' dtype, torch.float32"),
        enter(lives("mixtral"), {PLANTED: 1e39}),
    ):
        logits_of(lives("mixtral"), IDS)


def test_the_marker_is_in_what_is_tested() -> None:
    assert (IDS == MARKER).any()
