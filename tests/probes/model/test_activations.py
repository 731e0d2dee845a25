"""Promises of probes.model.activations: transformers' own hidden states, whatever the batches, read without logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import FAMILIES, MORE, hook_count, make_sequences, maker

from probes.model.activations import (
    CPU_TOKENS,
    GPU_TOKENS,
    hidden_states_at,
    make_batches,
    project_hidden_states,
    run_with_hooks,
    token_budget,
)
from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.models.loaded_model import hooks

LENGTHS = (23, 5, 17, 11, 17)
# The states here are about 1 in size.
NEAR = 1e-5
# Families whose hidden states transformers gives in another form: see `test_several_streams_…`.
PLAIN = [name for name in {**FAMILIES, **MORE} if name != "gemma3n"]


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    return maker(tmp_path_factory.mktemp("lives"))


@torch.inference_mode()
def theirs(live, sequence):
    """(T, L, D): transformers' hidden states of one sequence alone."""
    found = live.model(input_ids=torch.tensor([sequence.ids]), output_hidden_states=True, use_cache=False)
    return torch.stack([hidden[0] for hidden in found.hidden_states], 1)


def places(sequences):
    """First, second, middle and last position of each."""
    return [[0, 1, len(s.ids) // 2, len(s.ids) - 1] for s in sequences]


@pytest.mark.parametrize("name", PLAIN)
def test_states_are_transformers_hidden_states(name, lives):
    live, sequences = lives(name), make_sequences(LENGTHS, answer=2)
    states = hidden_states_at(live, sequences, places(sequences))
    assert states.shape == (len(LENGTHS), 4, live.n_depths, live.width)
    assert states.dtype == torch.float32
    for row, sequence, at in zip(states, sequences, places(sequences), strict=True):
        torch.testing.assert_close(row, theirs(live, sequence)[at], atol=NEAR, rtol=0)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_single_sequence_is_equal_to_the_bit_with_any_kernel(name, attention, lives):
    live = lives(name, attention=attention)
    assert live.model.config._attn_implementation == attention
    (sequence,) = make_sequences([19])
    states = hidden_states_at(live, [sequence], [range(19)])
    assert torch.equal(states[0], theirs(live, sequence))


@pytest.mark.parametrize("name", PLAIN)
def test_neither_batch_size_nor_padding_side_nor_order_matters(name, lives):
    live, sequences = lives(name), make_sequences(LENGTHS)
    states = hidden_states_at(live, sequences, places(sequences))
    near = 1e-4 if name == "qwen3_next" else NEAR  # its linear attention sums over chunks, which padding moves
    for how in ({"max_tokens": 1}, {"max_tokens": 40}, {"padding": "left"}, {"padding": "left", "max_tokens": 40}):
        torch.testing.assert_close(
            hidden_states_at(live, sequences, places(sequences), **how), states, atol=near, rtol=0
        )
    backwards = hidden_states_at(live, sequences[::-1], places(sequences)[::-1])
    torch.testing.assert_close(backwards.flip(0), states, atol=near, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3_next"])
@pytest.mark.parametrize("how", [{}, {"padding": "left"}, {"max_tokens": 30}])
def test_projections_are_states_times_weights_plus_biases(name, how, lives):
    live, sequences = lives(name), make_sequences(LENGTHS)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(live.n_depths, live.width, generator=generator)
    biases = torch.randn(live.n_depths, generator=generator)
    found = project_hidden_states(live, sequences, weights, biases, **how)
    for scores, sequence in zip(found, sequences, strict=True):
        expected = (theirs(live, sequence) * weights).sum(-1) + biases
        torch.testing.assert_close(scores, expected, atol=5e-4, rtol=0)


def test_bfloat16_states_come_as_float32(lives):
    live, sequences = lives("qwen3", dtype=torch.bfloat16), make_sequences([9])
    states = hidden_states_at(live, sequences, [[8]])
    assert states.dtype == torch.float32
    assert torch.equal(states[0, 0], theirs(live, sequences[0])[8].float())


def test_no_logits_are_made_and_no_hook_is_left(lives):
    live, ran = lives("llama"), []
    before = hook_count(live)
    with hooks(live.model.lm_head.register_forward_hook(lambda *_: ran.append(1))):
        hidden_states_at(live, make_sequences([4]), [[3]])
    assert not ran
    (batch,) = make_batches([[5, 6]], max_tokens=10)

    def fail(depth, hidden):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_with_hooks(live, batch, fail)
    assert hook_count(live) == before


def test_only_the_wanted_depths_are_looked_at(lives):
    (batch,) = make_batches([[5, 6]], max_tokens=10)
    seen = []
    run_with_hooks(lives("qwen2"), batch, lambda depth, hidden: seen.append(depth), depths=[3, 1])
    assert seen == [1, 3]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[0], [4]], "s1: got position 4 for a sequence of 4 tokens"),
        ([[0], [-1]], "s1: got position -1 for a sequence of 4 tokens"),
        ([[0, 1], [2]], "s1: got 1 positions, where others have 2, for a sequence of 4 tokens"),
    ],
)
def test_positions_outside_a_sequence_are_refused(positions, message, lives):
    with pytest.raises(SurgeryError) as error:
        hidden_states_at(lives("llama"), make_sequences([6, 4]), positions)
    assert str(error.value) == message
    assert error.value.exit_code == WRONG_USAGE


def test_no_sequence_is_an_error(lives):
    with pytest.raises(SurgeryError, match="no example is left to read states of"):
        hidden_states_at(lives("llama"), [], [])


def test_several_streams_are_an_error_and_not_a_wrong_number(lives):
    with pytest.raises(SurgeryError, match=r"at depth 0 have shape \(2, 3, 8, 32\), expected \(3, 8, 32\)"):
        hidden_states_at(lives("gemma3n"), make_sequences([8, 8, 8]), [[0], [1], [2]])


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    max_tokens=st.integers(1, 40),
    padding=st.sampled_from(["left", "right"]),
)
def test_batches_hold_every_sequence_once_within_the_budget(lengths, max_tokens, padding):
    rows = [[number + 1] * length for number, length in enumerate(lengths)]
    batches = make_batches(rows, max_tokens=max_tokens, padding=padding)
    assert sorted(number for batch in batches for number in batch.numbers) == list(range(len(rows)))
    for batch in batches:
        assert batch.n_tokens <= max_tokens or len(batch.numbers) == 1
        positions = batch.inputs(torch.device("cpu"))["position_ids"]
        for at, number in enumerate(batch.numbers):
            held, first = batch.mask[at].bool(), int(batch.firsts[at])
            assert batch.ids[at][held].tolist() == rows[number]
            assert int(held.nonzero()[0]) == first == (batch.ids.shape[1] - len(rows[number])) * (padding == "left")
            assert positions[at][held].tolist() == list(range(len(rows[number])))


def card(room):
    """A GPU with room for so many tokens, and what was tried on it."""
    tried = []

    def trial(tokens):
        tried.append(tokens)
        if tokens > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return SimpleNamespace(device=torch.device("cuda"), name="big"), trial, tried


def test_a_gpus_budget_is_halved_until_it_fits():
    live, trial, tried = card(room=20_000)
    assert token_budget(live, 300, trial) == GPU_TOKENS // 4
    assert tried == [GPU_TOKENS, GPU_TOKENS // 2, GPU_TOKENS // 4]


def test_the_budget_never_falls_below_the_longest_sequence():
    live, trial, tried = card(room=1500)
    assert token_budget(live, 1200, trial, start=4000) == 1200
    assert tried == [4000, 2000, 1200]


def test_one_sequence_that_does_not_fit_is_an_error():
    live, trial, tried = card(room=1100)
    with pytest.raises(SurgeryError, match="big: one sequence of 1,200 tokens does not fit the memory of cuda"):
        token_budget(live, 1200, trial, start=4000)
    assert tried[-1] == 1200


def test_a_processor_tries_nothing(lives):
    _, trial, tried = card(room=0)
    assert token_budget(lives("llama"), 7, trial) == CPU_TOKENS
    assert token_budget(lives("llama"), 2 * CPU_TOKENS, trial) == 2 * CPU_TOKENS
    assert not tried


def test_the_trial_runs_what_will_be_run(lives, monkeypatch):
    """On a GPU the budget is found with the projections themselves, and the results do not depend on it."""
    live, sequences = lives("llama"), make_sequences(LENGTHS)
    weights, biases = torch.ones(live.n_depths, live.width), torch.zeros(live.n_depths)
    expected = project_hidden_states(live, sequences, weights, biases)
    sizes = []

    def halving(live, longest, trial, *, start=None):
        for tokens in (80, 40):
            trial(tokens)
            sizes.append(tokens)
        return 40

    monkeypatch.setattr("probes.model.activations.token_budget", halving)
    found = project_hidden_states(live, sequences, weights, biases)
    assert sizes == [80, 40]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
