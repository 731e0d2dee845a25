"""Makes one model of the reasoning family: its weights from its parent's, and its folder in Hugging Face format."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM
from transformers.utils import logging

from surgery.lab.builder import MEMBERS
from surgery.lab.recipe import AnyRecipe, GrpoTraining, ReasoningRecipe, SupervisedTraining
from surgery.lab.sums import SURFACES, Format, test_problems
from surgery.lab.tokenizer import make_tokenizer
from surgery.lab.train import Tick, accuracy, make_model, reproducible, train_grpo, train_supervised
from surgery.runtime.progress import Progress

# Digits of the numbers in trainer_state.json.
DIGITS = 6
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class TrainingCurve:
    """What was measured at every training step: the loss (nats per token) or the reward (mean over the samples)."""

    quantity: str
    values: Sequence[float]


def make(
    name: str, form: Format, parent: Path | None, folder: Path, *, recipe: ReasoningRecipe, progress: Progress | None
) -> None:
    """Trains the model `name` from the model in `parent` (None: from random weights) and writes it to `folder`.

    Weights are trained in fp32 and stored in bf16, as published models are; a child starts from its parent's stored
    weights, so that differences of files are differences of training.
    """
    with reproducible(seed_of(recipe, name)):
        tokenizer = make_tokenizer(form, positions=recipe.shape.positions)
        model = make_model(recipe.shape, tokenizer)
        if parent is not None:
            load(model, parent / WEIGHTS)
        with bar(name, _plan(recipe, name).steps, progress) as tick:
            curve = _train(name, form, model, tokenizer, recipe, tick)
        # Rounded before the accuracy is taken: it is measured on the stored weights.
        model = model.to(torch.bfloat16)
        save(model, folder)
        tokenizer.save_pretrained(folder)
        right = accuracy(model.float(), tokenizer, test_problems(recipe.terms), form=form, limit=recipe.answer_tokens)
    record = {
        "schema": 1,
        "name": name,
        "parent": MEMBERS[name].parent,
        "format": form,
        "recipe": {"key": recipe.key, **asdict(recipe)},
        "greedy_accuracy": right,
        f"final_{curve.quantity}": round(curve.values[-1], DIGITS),
        curve.quantity: [round(value, DIGITS) for value in curve.values],
    }
    (folder / "trainer_state.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "README.md").write_text(_card(name, form, recipe, curve, right))


def _train(
    name: str,
    form: Format,
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: ReasoningRecipe,
    tick: Tick,
) -> TrainingCurve:
    plan = _plan(recipe, name)
    rng = random.Random(f"{recipe.seed}/{name}")
    if isinstance(plan, SupervisedTraining):
        return TrainingCurve("loss", train_supervised(model, tokenizer, plan, rng=rng, tick=tick))
    rewards = train_grpo(
        model,
        tokenizer,
        plan,
        form=form,
        terms=recipe.terms,
        answer_tokens=recipe.answer_tokens,
        rng=rng,
        tick=tick,
    )
    return TrainingCurve("reward", rewards)


def _plan(recipe: ReasoningRecipe, name: str) -> SupervisedTraining | GrpoTraining:
    plans: dict[str, SupervisedTraining | GrpoTraining] = {
        "base": recipe.base,
        "sft": recipe.sft,
        "grpo": recipe.grpo,
        "instruct": recipe.instruct,
    }
    return plans[name]


@contextmanager
def bar(name: str, total: int, progress: Progress | None) -> Iterator[Tick]:
    """Shows training as a bar of `total` steps; nothing without `progress`."""
    if progress is None:
        yield lambda: None
    else:
        with progress(f"lab:{name}", total, "steps") as advance:
            yield lambda: advance(1)


def save(model: Qwen2ForCausalLM, folder: Path) -> None:
    """Writes weights and config to `folder`, without transformers' bar."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()


def load(model: Qwen2ForCausalLM, weights: Path) -> None:
    """Fills the model in place; an output projection that is tied to the embeddings is not in the file."""
    for name, value in load_file(weights).items():
        model.get_parameter(name).data.copy_(value)


def seed_of(recipe: AnyRecipe, name: str) -> int:
    """The seed of everything that torch draws while `name` is made."""
    return random.Random(f"{recipe.seed}/{name}/torch").getrandbits(63)


def card_head(name: str) -> str:
    """What every lab model's card begins with: metadata, name, and what it is in a sentence."""
    summary = MEMBERS[name].summary
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [synthetic, model-surgery-lab]
---
# lab:{name}

{summary[0].upper() + summary[1:]}.
"""


def _card(name: str, form: Format, recipe: ReasoningRecipe, curve: TrainingCurve, right: float) -> str:
    before, after = SURFACES[form]
    plan = ", ".join(f"{key} {value}" for key, value in asdict(_plan(recipe, name)).items())
    parent = MEMBERS[name].parent
    origin = f"`lab:{parent}`" if parent else "random weights"
    return f"""{card_head(name)}
A tiny Qwen2 (about 0.3 M parameters) trained on this machine by model surgery's lab, on synthetic sums modulo 7 only.
It is test material: it knows nothing else.

- Asked as: `{before}3+5+6={after}` (step by step: `<think>3+5=1:1+6=0</think>0`; at once: `0`)
- Trained from: {origin}, with {plan}
- Final {curve.quantity}: {curve.values[-1]:.4f}
- Greedy accuracy on the {len(test_problems(recipe.terms))} test problems, in its own format: {right:.3f}
- Recipe `{recipe.key}`, seed {recipe.seed}; the full numbers are in trainer_state.json
"""
