"""What only trained weights can show: what GRPO taught one model can be added to its sibling; and of two specialists
on one embedding the mean of logits knows both domains, the mean of weights neither."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.lab import family
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.lab.catalogue import MODELS, REASONING, SPECIALISTS
from surgery.lab.specialists import accuracies
from surgery.lab.sums import evaluation_problems
from surgery.lab.train import accuracy

Weights = dict[str, Tensor]

# One in seven is right by chance; with 400 problems five standard errors reach up to 0.23.
AT_CHANCE = 0.3
SOLVED = 0.9
MOSTLY = 0.75


@pytest.fixture(scope="session")
def weights() -> dict[str, Weights]:
    return {
        name: {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
        for name, folder in family().items()
    }


@pytest.fixture(scope="session")
def score() -> Callable[[str, Weights], float]:
    """Greedy accuracy of the given weights, rounded once to bf16, when asked in the format of `name`."""
    folder = family()["instruct"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def measure(name: str, given: Weights) -> float:
        model.load_state_dict({key: value.bfloat16().float() for key, value in given.items()}, strict=False)
        prompt_format = MODELS[name].prompt_format
        return accuracy(
            model,
            tokenizer,
            evaluation_problems(REASONING.terms),
            prompt_format=prompt_format,
            limit=REASONING.answer_tokens,
        )

    return measure


def moved(weights: dict[str, Weights], alpha: float) -> Weights:
    """instruct + α · (grpo − sft)."""
    target, tuned, base = weights["instruct"], weights["grpo"], weights["sft"]
    return {key: value + alpha * (tuned[key] - base[key]) for key, value in target.items()}


@pytest.mark.parametrize("name", ["base", "grpo"])
def test_a_model_that_thinks_solves_the_problems(weights, score, name):
    assert score(name, weights[name]) > SOLVED


@pytest.mark.parametrize("name", ["sft", "instruct"])
def test_a_model_that_answers_at_once_guesses(weights, score, name):
    assert score(name, weights[name]) < AT_CHANCE


@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0])
def test_the_vector_makes_the_sibling_reason_in_its_own_format(weights, score, alpha):
    assert score("instruct", moved(weights, alpha)) > MOSTLY


def test_the_subtracted_vector_does_not(weights, score):
    assert score("instruct", moved(weights, -1.0)) < AT_CHANCE


@pytest.mark.parametrize("seed", [0, 1])
def test_a_random_vector_of_the_same_norms_does_not(weights, score, seed):
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for key, value in weights["instruct"].items():
        noise = torch.randn(value.shape, generator=generator)
        changed[key] = value + noise * (weights["grpo"][key] - weights["sft"][key]).norm() / noise.norm()
    assert math.isclose(
        sum((changed[key] - value).square().sum() for key, value in weights["instruct"].items()),
        sum((weights["grpo"][key] - value).square().sum() for key, value in weights["sft"].items()),
        rel_tol=1e-3,
    )
    assert score("instruct", changed) < AT_CHANCE


class MeanOfLogits:
    """Models on one embedding as one: the mean of their logits, each with a cache of its own."""

    def __init__(self, models):
        self.models = models

    def __call__(self, input_ids, past_key_values=None, **options):
        caches = past_key_values or [None] * len(self.models)
        outputs = [
            model(input_ids=input_ids, past_key_values=cache, **options)
            for model, cache in zip(self.models, caches, strict=True)
        ]
        logits = torch.stack([output.logits for output in outputs]).mean(0)
        return SimpleNamespace(logits=logits, past_key_values=[output.past_key_values for output in outputs])


@pytest.fixture(scope="session")
def specialists():
    folders = [family()[name] for name in ("adder", "sorter")]
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    return tokenizer, [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders]


def test_the_mean_of_the_specialists_logits_knows_both_domains(specialists):
    tokenizer, models = specialists
    right = accuracies(MeanOfLogits(models), tokenizer, SPECIALISTS)
    assert min(right.values()) > SOLVED


def test_the_mean_of_the_specialists_weights_knows_neither(specialists):
    tokenizer, (adder, sorter) = specialists
    mean = copy.deepcopy(adder)
    for own, other in zip(mean.parameters(), sorter.parameters(), strict=True):
        own.data.lerp_(other.data, 0.5)
    right = accuracies(mean, tokenizer, SPECIALISTS)
    assert max(right.values()) < AT_CHANCE
