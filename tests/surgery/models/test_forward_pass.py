"""Promises of models.partial_forward: a part of a stack gives what it gives inside the whole, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from support.models import FAMILIES, MORE, hook_count, maker
from torch import nn

from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.models.forward_pass import (
    final_states,
    partial_forward,
    replace_input,
    resume_obstacle,
    trace_layers,
    tupled_layers,
)
from surgery.models.loaded_model import hidden_out, hooks

# Longer than the sliding windows of `probing`.
IDS = torch.randint(4, 90, (3, 19), generator=torch.Generator().manual_seed(1))
# Those with several residual streams, or with later layers that use the keys and values of earlier ones.
FAULTY = ("gemma3n", "gemma4")
PLAIN = [name for name in (*FAMILIES, *MORE) if name not in FAULTY]


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    return maker(tmp_path_factory.mktemp("lives"))


def plain_run(live):
    return live.body(input_ids=IDS, use_cache=False)


@pytest.mark.parametrize("name", PLAIN)
def test_every_part_of_the_stack_gives_what_the_whole_gives(name, lives):
    live = lives(name)
    tupled, before, n_layers = tupled_layers(live), hook_count(live), len(live.layers)
    with torch.no_grad():
        final, inputs, _ = trace_layers(live, lambda: plain_run(live))
    with hooks(live.final_norm.register_forward_pre_hook(lambda m, inside: inputs.append(inside[0]))), torch.no_grad():
        plain_run(live)
    assert len(inputs) == n_layers + 1
    for stop in range(n_layers + 1):
        assert torch.equal(partial_forward(live, IDS, 0, None, stop, tupled=tupled), inputs[stop])
        for start in range(stop + 1):
            found = partial_forward(live, IDS, start, inputs[start].clone(), stop, tupled=tupled)
            assert torch.equal(found, inputs[stop])
        with replace_input(live, stop, inputs[stop].clone(), tupled), torch.no_grad():
            assert torch.equal(final_states(live, lambda: plain_run(live)), final)
    assert hook_count(live) == before
    assert resume_obstacle(live, IDS[:1]) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma3n", "it keeps another residual stream than one vector per token"),
        ("gemma4", "layer 1 or a later one needs what those below compute"),
    ],
)
def test_families_whose_layers_need_more_than_the_stream_are_recognised(name, reason, lives):
    assert resume_obstacle(lives(name), IDS[:1]).startswith(reason)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "mixtral", "deepseek_v3"])
def test_gradients_above_are_those_of_the_plain_pass(name, lives):
    live = lives(name)
    at, tupled = len(live.layers) - 1, tupled_layers(live)
    above = [*live.layers[at].parameters(), *live.final_norm.parameters()]

    def gradients():
        live.model.zero_grad(set_to_none=True)
        logits = live.model(input_ids=IDS, use_cache=False).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        return [None if p.grad is None else p.grad.clone() for p in above]

    plain = gradients()
    hidden = partial_forward(live, IDS, 0, None, at, tupled=tupled)
    assert not hidden.requires_grad
    with replace_input(live, at, hidden, tupled):
        spliced = gradients()
    for one, other in zip(plain, spliced, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    assert sum(one is not None for one in plain) >= 5
    assert all(p.grad is None for layer in live.layers[:at] for p in layer.parameters())
    live.model.zero_grad(set_to_none=True)


def test_layers_below_and_above_are_not_computed(lives):
    live, ran = lives("qwen2"), []
    tupled = tupled_layers(live)
    inside = [layer.mlp.register_forward_hook(lambda m, *_: ran.append(m)) for layer in live.layers]
    head = live.model.get_output_embeddings().register_forward_hook(lambda m, *_: ran.append(m))
    with hooks(*inside, head):
        hidden = partial_forward(live, IDS, 0, None, 1, tupled=tupled)
        assert ran == [live.layers[0].mlp]
        ran.clear()
        partial_forward(live, IDS, 1, hidden, 2, tupled=tupled)
        assert ran == [live.layers[1].mlp]
        ran.clear()
        with replace_input(live, 2, hidden, tupled), torch.no_grad():
            plain_run(live)
        assert ran == [live.layers[2].mlp]


def test_works_under_autocast_and_inside_another_module(lives):
    live = lives("llama")
    tupled = tupled_layers(live)

    class Around(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    around = Around(live.model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = around(IDS)
        hidden = partial_forward(live, IDS, 0, None, 1, tupled=tupled)
        with replace_input(live, 1, hidden, tupled):
            logits = around(IDS)
        logits.sum().backward()
    assert torch.equal(logits, plain)
    assert live.layers[1].self_attn.q_proj.weight.grad.abs().sum() > 0
    live.model.zero_grad(set_to_none=True)


def test_everything_is_as_before_after_an_exception(lives):
    live = lives("llama")
    before, tupled = hook_count(live), tupled_layers(live)
    with torch.no_grad():
        plain = hidden_out(plain_run(live).last_hidden_state)
    with pytest.raises(KeyboardInterrupt), replace_input(live, 0, torch.zeros(3, 19, 32), tupled):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), replace_input(live, 2, torch.zeros(3, 19, 32), tupled):
        raise KeyboardInterrupt
    assert hook_count(live) == before
    with torch.no_grad():
        assert torch.equal(plain_run(live).last_hidden_state, plain)


def test_layers_that_are_not_there_are_errors(lives):
    live = lives("llama")
    tupled, hidden = tupled_layers(live), torch.zeros(3, 19, 32)
    with pytest.raises(
        SurgeryError, match=r"got layers 0 to 3, expected two numbers from 0 to 2, in that order"
    ) as error:
        partial_forward(live, IDS, 0, None, 3, tupled=tupled)
    assert error.value.exit_code == WRONG_USAGE
    with pytest.raises(SurgeryError, match=r"got layers 2 to 1"):
        partial_forward(live, IDS, 2, hidden, 1, tupled=tupled)
    with pytest.raises(SurgeryError, match=r"layer 1 cannot be started from token ids"):
        partial_forward(live, IDS, 1, None, 2, tupled=tupled)
    with pytest.raises(SurgeryError, match=r"got layers 3 to 3"), replace_input(live, 3, hidden, tupled):
        pass
