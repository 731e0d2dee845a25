"""Promises of model.ablation: every fast sweep gives what a plain forward pass per head gives, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import FAMILIES, MORE, WINDOW, hook_count, make_live, make_sequences, maker, probe_for
from torch import Tensor

from probes.model.ablation import Ablation, ablate_each_head, ablated_heads, all_heads
from probes.refusal.heads.attribution import head_inputs
from surgery.checkpoint.selectors import Head
from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.models.loaded_model import hidden_out, hooks

LENGTHS = (19, 12)
LAST = 3
PREFIX, RESUMED, PLAIN = "cached prefix", "resumed layers", "one forward per head"
# What serves the last positions where not all layers keep keys and values of their own in transformers' cache.
OTHERWISE = {
    "qwen3_next": RESUMED,
    "falcon_h1": RESUMED,
    "lfm2": RESUMED,
    "minimax": RESUMED,
    "gemma3n": PLAIN,
    "gemma4": PLAIN,
}
NO_RESUMING = ("gemma3n", "gemma4")


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    return maker(tmp_path_factory.mktemp("lives"))


def swept(live, sequences=None, heads=None, **how):
    weight, bias = probe_for(live)
    return ablate_each_head(
        live, sequences or make_sequences(LENGTHS, answer=2), heads or all_heads(live), weight, bias, **how
    )


def values_for(live, positions, *, seed=5) -> dict[int, Tensor]:
    """Layer → (N, positions, W) at random, of the size of z."""
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: 0.5 * torch.randn(len(LENGTHS), positions, p.n_heads * p.head_dim, generator=generator)
        for layer, p in live.projections.items()
    }


@torch.inference_mode()
def brute(live, sequence, number, head, ablation, last) -> float:
    """The probe's logit from a run of the whole model, alone and without padding, with one head changed."""
    weight, bias = probe_for(live)
    projection, seen = live.projections[head.layer], []

    def change(module, inputs):
        z = inputs[0].clone()
        block = slice(head.index * projection.head_dim, (head.index + 1) * projection.head_dim)
        first = 0 if last is None else z.shape[1] - last
        if ablation.values is None:
            z[:, first:, block] = ablation.scale * z[:, first:, block]
        else:
            z[:, first:, block] = ablation.values[head.layer][number][:, block]
        return (z,)

    handles = [
        projection.module.register_forward_pre_hook(change),
        live.final_norm.register_forward_hook(lambda m, i, output: seen.append(hidden_out(output)[0, -1].double())),
    ]
    with hooks(*handles):
        live.model(input_ids=torch.tensor([sequence.before_answer]))
    return float(seen[0] @ weight.double() + bias)


def ways(live, *, all_of_them):
    """Ablations at the last positions and at all: removed, scaled, replaced by means and by another's values."""
    found = [
        (Ablation(0.0), LAST),
        (Ablation(values=values_for(live, LAST)), LAST),
        (Ablation(0.3), None),
        (Ablation(values=values_for(live, 1)), None),
    ]
    more = [(Ablation(-0.5), LAST), (Ablation(values=values_for(live, 1)), LAST), (Ablation(0.0), None)]
    return [*found, *more] if all_of_them else found


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_the_fastest_sweep_is_brute_force(name, lives):
    live, sequences = lives(name), make_sequences(LENGTHS, answer=2)
    for ablation, last in ways(live, all_of_them=name in FAMILIES):
        found = swept(live, ablation=ablation, last=last)
        expected = torch.tensor(
            [
                [brute(live, sequence, number, head, ablation, last) for head in found.heads]
                for number, sequence in enumerate(sequences)
            ]
        )
        size = float((expected - found.base[:, None]).abs().max())
        assert size > 0.1  # there is an effect to be wrong about
        assert float((found.ablated - expected).abs().max()) <= 1e-5 * size, (ablation, last)
        resumed = PLAIN if name in NO_RESUMING else RESUMED
        assert found.method == (resumed if last is None else OTHERWISE.get(name, PREFIX))
        assert torch.equal(found.effects, found.ablated - found.base[:, None])


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt_oss", "deepseek_v3", "gpt2"])
def test_all_methods_agree(name, lives):
    live = lives(name)
    plain = swept(live, last=LAST, method=PLAIN)
    size = float(plain.effects.abs().max())
    for method in (PREFIX, RESUMED):
        found = swept(live, last=LAST, method=method)
        assert found.method == method
        assert float((found.ablated - plain.ablated).abs().max()) <= 1e-5 * size
        torch.testing.assert_close(found.base, plain.base, atol=1e-5 * size, rtol=0)


def test_sliding_windows_here_are_shorter_than_the_prompts(lives):
    for name in ("gemma2", "gpt_oss", "mistral", "gemma3", "cohere2"):
        assert lives(name).model.config.sliding_window == WINDOW < min(LENGTHS)


@pytest.mark.parametrize("last", [None, LAST])
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "qwen3_next"])
def test_neither_chunks_nor_the_order_of_heads_and_sequences_matter(name, last, lives):
    live, sequences = lives(name), make_sequences(LENGTHS, answer=2)
    whole = swept(live, last=last)
    size = float(whole.effects.abs().max())
    chunked = swept(live, last=last, max_tokens=2 * LENGTHS[0])  # two heads at a time
    single = swept(live, last=last, max_tokens=1)
    turned = swept(live, sequences[::-1], whole.heads[::-1], last=last)
    assert turned.heads == whole.heads[::-1]
    for found in (chunked.ablated, single.ablated, turned.ablated.flip(0, 1)):
        assert float((found - whole.ablated).abs().max()) <= 1e-5 * size


def test_a_head_may_be_asked_for_alone_or_twice(lives):
    live = lives("llama")
    whole, some = swept(live, last=LAST), swept(live, heads=[Head(1, 2), Head(0, 0), Head(1, 2)], last=LAST)
    columns = [whole.heads.index(head) for head in some.heads]
    torch.testing.assert_close(some.ablated, whole.ablated[:, columns], atol=1e-4, rtol=0)


def test_scale_one_changes_nothing(lives):
    found = swept(lives("qwen3"), ablation=Ablation(1.0), last=LAST)
    torch.testing.assert_close(found.effects, torch.zeros_like(found.effects), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_a_sequences_own_values_change_nothing(name, lives):
    live, sequences = lives(name), make_sequences(LENGTHS, answer=2)
    found = swept(live, ablation=Ablation(values=head_inputs(live, sequences, LAST)), last=LAST)
    torch.testing.assert_close(found.effects, torch.zeros_like(found.effects), atol=1e-4, rtol=0)


def test_bfloat16_sweeps_agree_up_to_rounding(lives):
    live = lives("qwen3", dtype=torch.bfloat16)
    fast, plain = swept(live, last=LAST), swept(live, last=LAST, method=PLAIN)
    assert fast.method == PREFIX
    assert float((fast.ablated - plain.ablated).abs().max()) <= 0.05 * float(plain.effects.abs().max())


def test_a_prompt_of_exactly_the_last_positions_has_no_prefix(lives):
    live = lives("qwen3")
    found = swept(live, make_sequences([LAST, 9]), last=LAST)
    assert found.method == RESUMED
    torch.testing.assert_close(
        found.ablated, swept(live, make_sequences([LAST, 9]), last=LAST, method=PLAIN).ablated, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("name", "last", "method", "why"),
    [
        ("qwen3", None, PREFIX, "a cached prefix only serves ablation at the last positions"),
        ("qwen3", LENGTHS[1], PREFIX, "nothing stands before the last 12 tokens of the shortest example"),
        ("qwen3_next", LAST, PREFIX, "layer 0 has no attention heads that are understood"),
        ("falcon_h1", LAST, PREFIX, "layer 0 keeps other state than keys and values (LinearAttentionAndFull"),
        ("gemma4", LAST, PREFIX, "layer 2 keeps other state than keys and values (DummyLayer)"),
        ("minimax", LAST, PREFIX, "MiniMax uses cache of its own"),
        ("gemma4", None, RESUMED, "layer 1 or a later one needs what those below compute (KeyError"),
        ("gemma3n", None, RESUMED, "it keeps another residual stream than one vector per token"),
    ],
)
def test_a_method_is_refused_where_it_is_wrong(name, last, method, why, lives):
    with pytest.raises(SurgeryError) as error:
        swept(lives(name), last=last, method=method)
    assert f"{name}: '{method}' would be wrong: {why}" in str(error.value)
    assert error.value.exit_code == WRONG_USAGE


def test_state_that_no_cache_keeps_is_noticed(tmp_path):
    """A layer that mixes tokens outside attention gives another state behind a cached prefix."""
    live = make_live("qwen3", tmp_path)

    def mix(module, arguments, output):
        return output + output.cumsum(1) / 10

    with hooks(live.layers[0].mlp.register_forward_hook(mix)):
        with pytest.raises(SurgeryError, match="'cached prefix' would be wrong: it gives another hidden state"):
            swept(live, last=LAST, method=PREFIX)
        fast, plain = swept(live, last=LAST), swept(live, last=LAST, method=PLAIN)
    assert fast.method == RESUMED
    torch.testing.assert_close(fast.ablated, plain.ablated, atol=1e-4, rtol=0)


def test_the_longest_prompt_decides(tmp_path):
    """What lies outside a sliding window only shows where the prompt is longer than it."""
    live = make_live("qwen3", tmp_path)

    def mix_if_long(module, arguments, output):
        return output + 1 if output.shape[1] > LENGTHS[1] else output

    with hooks(live.layers[0].mlp.register_forward_hook(mix_if_long)):
        for order in (1, -1):
            assert swept(live, make_sequences(LENGTHS)[::order], last=LAST).method == RESUMED
        assert swept(live, make_sequences(LENGTHS[1:]), last=LAST).method == PREFIX


def test_a_layer_that_takes_in_what_an_earlier_one_made_is_noticed(tmp_path):
    live, held = make_live("qwen2", tmp_path), []

    def keep(module, arguments, output):
        held[:] = [output]

    def add(module, arguments, output):
        return output + held[0]

    handles = [live.layers[0].register_forward_hook(keep), live.layers[2].register_forward_hook(add)]
    with hooks(*handles):
        with pytest.raises(SurgeryError, match="'resumed layers' would be wrong: its layers take in more than the"):
            swept(live, method=RESUMED)
        assert swept(live).method == swept(live, last=LAST).method == PLAIN


@pytest.mark.parametrize("method", [PREFIX, RESUMED, PLAIN])
def test_nothing_is_left_behind_by_a_sweep_nor_by_one_that_fails(method, lives):
    live = lives("llama")
    before = hook_count(live)
    expected = swept(live, last=LAST, method=method)
    assert hook_count(live) == before
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt

    with hooks(live.layers[1].register_forward_hook(fail)), pytest.raises(KeyboardInterrupt):
        swept(live, last=LAST, method=method)
    assert hook_count(live) == before
    assert torch.equal(swept(live, last=LAST, method=method).ablated, expected.ablated)


def test_a_forward_that_was_replaced_before_stands_again_after(tmp_path):
    """accelerate keeps hooks of its own as the layers' `forward` where a model is spread over devices."""
    live, ran = make_live("qwen2", tmp_path), []
    expected = swept(live)
    forward = live.layers[0].forward

    def counting(*arguments, **keywords):
        ran.append(1)
        return forward(*arguments, **keywords)

    live.layers[0].forward = counting
    found = swept(live)
    assert live.layers[0].forward is counting
    assert ran
    assert "forward" not in vars(live.layers[1])
    assert torch.equal(found.ablated, expected.ablated)


@pytest.mark.parametrize("last", [None, LAST])
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2"])
def test_a_sweep_inside_an_edit_starts_from_the_edit(name, last, lives):
    live = lives(name)
    with ablated_heads(live, {Head(0, 1): 0.0, Head(1, 3): 0.5}):
        fast, plain = swept(live, last=last), swept(live, last=last, method=PLAIN)
    size = float(plain.effects.abs().max())
    assert float((fast.ablated - plain.ablated).abs().max()) <= 1e-5 * size
    assert float(fast.effects[:, fast.heads.index(Head(0, 1))].abs().max()) <= 1e-4  # it is off already
    assert float((fast.base - swept(live, last=last).base).abs().max()) > 0.1


@torch.inference_mode()
def logits_of(live) -> Tensor:
    found: Tensor = live.model(input_ids=torch.tensor([[7, 19, 4, 60, 33, 90]])).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_edited_heads_are_the_same_edit_in_the_weights(name, dtype, tmp_path):
    live = make_live(name, tmp_path, dtype=dtype)
    plain = logits_of(live)
    scales = {Head(0, 1): 0.0, Head(1, 0): 0.5, Head(1, 3): -1.0}  # powers of two: exact in any format
    with ablated_heads(live, scales):
        edited = logits_of(live)
    assert torch.equal(logits_of(live), plain)
    with torch.no_grad():
        for head, scale in scales.items():
            projection = live.projections[head.layer]
            weight = projection.module.weight.T if projection.transposed else projection.module.weight
            weight[:, projection.block(head.index)] *= scale
    assert torch.equal(logits_of(live), edited)
    assert not torch.equal(edited, plain)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "deepseek_v3"])
def test_heads_set_to_their_means_are_removed_ones_with_a_bias(name, tmp_path):
    live = make_live(name, tmp_path)
    means = {layer: rows[0, 0] for layer, rows in values_for(live, 1).items()}
    chosen = (Head(0, 1), Head(1, 0))
    with ablated_heads(live, dict.fromkeys(chosen, 0.7), means):
        edited = logits_of(live)
    addends = []
    for head in chosen:
        projection = live.projections[head.layer]
        block = projection.block(head.index)
        written = projection.matrix[:, block] @ means[head.layer][block]
        addends.append(projection.module.register_forward_hook(lambda m, i, output, w=written: output + w))
    with hooks(*addends), ablated_heads(live, dict.fromkeys(chosen, 0.0)):
        torch.testing.assert_close(logits_of(live), edited, atol=1e-4, rtol=1e-4)


def test_an_edit_of_no_heads_is_none(lives):
    live = lives("llama")
    plain = logits_of(live)
    with ablated_heads(live, {}):
        assert torch.equal(logits_of(live), plain)


@settings(max_examples=15, deadline=None)
@given(scales=st.dictionaries(st.sampled_from([Head(0, 0), Head(0, 3), Head(1, 2)]), st.sampled_from([0.0, 0.5, 2.0])))
def test_edits_are_gone_afterwards_also_after_an_exception(scales, lives):
    live = lives("llama")
    before = hook_count(live)
    with pytest.raises(KeyboardInterrupt), ablated_heads(live, scales):
        assert hook_count(live) == before + len({head.layer for head in scales})
        raise KeyboardInterrupt
    assert hook_count(live) == before


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"sequences": []}, "llama: no example is left to ablate on"),
        ({"heads": []}, "no head was given."),
        ({"heads": [Head(2, 0)]}, "llama: has no head L2H0"),
        ({"heads": [Head(1, 4)]}, "llama: has no head L1H4"),
        ({"last": 0}, "last: got 0, expected 1 to 12, the tokens of the shortest example"),
        ({"last": 13}, "last: got 13, expected 1 to 12, the tokens of the shortest example"),
        ({"method": "guess"}, "method: got 'guess', expected cached prefix or resumed layers or one forward per head"),
        (
            {"ablation": Ablation(values={0: torch.zeros(2, 1, 32)})},
            "ablation: the values of layer 1 have shape None, expected (2, 1, 32)",
        ),
        (
            {"ablation": Ablation(values={n: torch.zeros(2, 2, 32) for n in (0, 1)}), "last": 3},
            "ablation: the values of layer 0 have shape (2, 2, 32), expected (2, 3, 32)",
        ),
        (
            {"ablation": Ablation(values={n: torch.zeros(3, 1, 32) for n in (0, 1)}), "last": 3},
            "ablation: the values of layer 0 have shape (3, 1, 32), expected (2, 3, 32)",
        ),
        (
            {"ablation": Ablation(values={n: torch.zeros(2, 3, 32) for n in (0, 1)})},
            "ablation: values for the last positions cannot stand for all positions",
        ),
    ],
)
def test_bad_input_gives_a_clear_line(how, message, lives):
    live = lives("llama")
    given = {"sequences": make_sequences(LENGTHS), "heads": all_heads(live), **how}
    weight, bias = probe_for(live)
    with pytest.raises(SurgeryError) as error:
        ablate_each_head(live, given.pop("sequences"), given.pop("heads"), weight, bias, **given)
    assert str(error.value).startswith(message)


def test_layers_that_were_skipped_have_no_heads_to_name(lives):
    with (
        pytest.raises(SurgeryError, match="qwen3_next: has no head L0H0"),
        ablated_heads(lives("qwen3_next"), {Head(0, 0): 0}),
    ):
        pass
    assert {head.layer for head in all_heads(lives("qwen3_next"))} == {3}


@pytest.mark.parametrize("means", [{}, {1: torch.zeros(31)}], ids=["missing", "narrow"])
def test_means_that_do_not_fit_are_refused(means, lives):
    with (
        pytest.raises(SurgeryError, match="means: layer 1 needs means of 32 numbers"),
        ablated_heads(lives("llama"), {Head(1, 0): 0.0}, means),
    ):
        pass
