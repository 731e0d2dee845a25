"""Divergence, perplexity and answers are those of one prompt at a time, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from support.models import make_live, make_sequences, maker
from torch import Tensor
from transformers import GenerationConfig

from probes.data.examples import Example
from probes.data.generation import end_token_ids
from probes.model.ablation import ablated_heads
from probes.side_effects.effects import ComparedModel, Rate, greedy_answers, measure_divergence, refusal_rates
from surgery.checkpoint.selectors import Head
from surgery.errors import SurgeryError
from surgery.models.loaded_model import hooks

LENGTHS = (19, 6, 12)
ANSWER = 5
SCALES = {Head(0, 1): 0.0, Head(1, 2): 0.5}
NAMES = ["qwen3", "gpt2", "gemma2", "mixtral"]


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    return maker(tmp_path_factory.mktemp("lives"))


def sequences_of(answers=(ANSWER, 2, 4)):
    """Three sequences with answers of unequal lengths."""
    return [
        make_sequences([length], seed=number, answer=count)[0]
        for number, (length, count) in enumerate(zip(LENGTHS, answers, strict=True))
    ]


@torch.inference_mode()
def log_probabilities(live, sequence, tokens) -> Tensor:
    """(M, V) float64: what the model says before each of the answer's first tokens, without padding."""
    start = sequence.ends[2]
    logits = live.model(input_ids=torch.tensor([sequence.ids])).logits[0].double()
    return logits[start - 1 : min(start + tokens, len(sequence.ids)) - 1].log_softmax(-1)


def brute(live, sequence, scales, tokens):
    """KL, negative log-likelihoods under both, and the number of tokens."""
    before = log_probabilities(live, sequence, tokens)
    with ablated_heads(live, scales):
        after = log_probabilities(live, sequence, tokens)
    targets = torch.tensor(sequence.ids[sequence.ends[2] :][:tokens])
    kl = (before.exp() * (before - after)).sum(-1).mean()
    nll = [-float(logs[torch.arange(len(targets)), targets].sum()) for logs in (before, after)]
    return float(kl), *nll, len(targets)


@pytest.mark.parametrize("max_tokens", [None, 1])
@pytest.mark.parametrize("tokens", [3, 32])
@pytest.mark.parametrize("name", NAMES)
def test_divergences_are_those_of_each_answer_alone(name, tokens, max_tokens, lives):
    live, sequences = lives(name), sequences_of()
    subject = ComparedModel(live, SCALES)
    found = measure_divergence(ComparedModel(live), {"set": subject}, sequences, tokens=tokens, max_tokens=max_tokens)[
        "set"
    ]
    for row, sequence in enumerate(sequences):
        kl, before, after, count = brute(live, sequence, SCALES, tokens)
        assert kl > 1e-3
        assert found.kl[row] == pytest.approx(kl, rel=1e-4)
        assert found.nll_before[row] == pytest.approx(before, rel=1e-5)
        assert found.nll_after[row] == pytest.approx(after, rel=1e-5)
        assert found.tokens[row] == count
    rows = [brute(live, sequence, SCALES, tokens) for sequence in sequences]
    total = sum(row[3] for row in rows)
    expected = [math.exp(sum(row[at] for row in rows) / total) for at in (1, 2)]
    assert found.perplexities == pytest.approx(expected, rel=1e-5)
    assert found.mean_kl("abc").value == pytest.approx(sum(row[0] for row in rows) / 3, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_exactly_as_it_is(name, lives):
    live = lives(name)
    for subject in (ComparedModel(live), ComparedModel(live, {Head(0, 0): 1.0})):
        found = measure_divergence(ComparedModel(live), {"same": subject}, sequences_of())["same"]
        assert found.kl.tolist() == [0.0, 0.0, 0.0]
        assert found.perplexities[0] == found.perplexities[1]


def test_several_edits_share_the_originals_pass(lives):
    live, passes = lives("qwen3"), []
    afters = {"a": ComparedModel(live, SCALES), "b": ComparedModel(live, {Head(0, 0): 0.0})}
    with hooks(live.model.lm_head.register_forward_hook(lambda *_: passes.append(1))):
        both = measure_divergence(ComparedModel(live), afters, sequences_of())
    assert len(passes) == 3
    for name, after in afters.items():
        alone = measure_divergence(ComparedModel(live), {name: after}, sequences_of())[name]
        assert both[name].kl.tolist() == alone.kl.tolist()


def test_two_models_may_be_compared(tmp_path, lives):
    """What a baked checkpoint is measured with: the edit is in the weights of another model."""
    live, baked = lives("qwen3"), make_live("qwen3", tmp_path)
    with torch.no_grad():
        for head, scale in SCALES.items():
            projection = baked.projections[head.layer]
            projection.module.weight[:, projection.block(head.index)] *= scale
    hooked = measure_divergence(ComparedModel(live), {"edit": ComparedModel(live, SCALES)}, sequences_of())["edit"]
    found = measure_divergence(ComparedModel(live), {"edit": ComparedModel(baked)}, sequences_of())["edit"]
    assert found.kl.tolist() == hooked.kl.tolist()


def test_tokens_that_are_ruled_out_add_nothing(lives):
    live, sequences = lives("qwen3"), sequences_of()

    def rule_out(module, arguments, output):
        output = output.clone()
        output[..., 0] = -math.inf  # a token that no sequence holds
        return output

    with hooks(live.model.lm_head.register_forward_hook(rule_out)):
        found = measure_divergence(ComparedModel(live), {"set": ComparedModel(live, SCALES)}, sequences)["set"]
        before = log_probabilities(live, sequences[0], 32)[:, 1:]
        with ablated_heads(live, SCALES):
            after = log_probabilities(live, sequences[0], 32)[:, 1:]
    expected = float((before.exp() * (before - after)).sum(-1).mean())
    assert found.kl[0] == pytest.approx(expected, rel=1e-4)


def test_logits_that_are_no_numbers_are_an_error(lives):
    live = lives("qwen3")
    overflowing = ComparedModel(live, {Head(0, 1): math.nan})
    with pytest.raises(SurgeryError, match="qwen3: the logits of broken are not numbers"):
        measure_divergence(ComparedModel(live), {"broken": overflowing}, sequences_of())


def test_nothing_to_compare_on_is_an_error(lives):
    subject = ComparedModel(lives("qwen3"))
    with pytest.raises(SurgeryError, match="qwen3: no answer is left to compare on"):
        measure_divergence(subject, {"same": subject}, [])
    with pytest.raises(SurgeryError, match="s0: has no answer to compare on"):
        measure_divergence(subject, {"same": subject}, sequences_of((3, 0, 2)))


@pytest.mark.parametrize("scales", [{}, SCALES], ids=["as it is", "edited"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2"])
def test_answers_are_those_of_single_prompts(name, scales, lives):
    live, sequences = lives(name), sequences_of()
    found = greedy_answers(ComparedModel(live, scales), sequences, tokens=6)
    config = GenerationConfig(
        max_new_tokens=6, do_sample=False, eos_token_id=list(end_token_ids(live.loaded)), pad_token_id=1
    )
    for text, sequence in zip(found, sequences, strict=True):
        ids = torch.tensor([sequence.before_answer])
        with ablated_heads(live, scales), torch.inference_mode():
            made = live.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        new = [token for token in made[0, ids.shape[1] :].tolist() if token not in end_token_ids(live.loaded)]
        assert text == live.tokenizer.decode(new)


def example(number, topic, refused):
    return Example(str(number), ({"role": "user", "content": "?"},), group="g", topic=topic, refused=refused)


def test_rates_count_the_examples_with_a_verdict_by_topic():
    rows = [
        ("harmful", True),
        ("harmful", True),
        ("harmful", False),
        ("harmful", None),
        ("harmless", False),
        (None, True),
    ]
    found = refusal_rates([example(number, *row) for number, row in enumerate(rows)])
    assert list(found) == ["harmful", "harmless"]
    assert (found["harmful"].value, found["harmful"].n) == (pytest.approx(2 / 3), 3)
    # Wilson's interval for 2 of 3, by its formula: Wilson 1927.
    assert (found["harmful"].low, found["harmful"].high) == pytest.approx((0.2077, 0.9385), abs=1e-4)
    assert (found["harmless"].value, found["harmless"].low) == (0.0, pytest.approx(0.0))


def test_a_rate_of_nothing_is_no_number():
    rate = Rate.of([])
    assert rate.n == 0
    assert all(math.isnan(value) for value in (rate.value, rate.low, rate.high))
