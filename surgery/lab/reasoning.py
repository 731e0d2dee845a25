"""Build the models of the `reasoning` family: base, sft, grpo and instruct, which do sums modulo 7."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from surgery.lab.catalogue import MODELS
from surgery.lab.common import (
    CARD,
    TrainingCurve,
    card_header,
    list_settings,
    load_weights,
    save_model,
    torch_seed,
    training_bar,
    write_trainer_state,
)
from surgery.lab.recipe import GrpoTraining, ReasoningRecipe, SupervisedTraining
from surgery.lab.sums import PROMPT_AFFIXES, evaluation_problems
from surgery.lab.tokenizer import make_tokenizer
from surgery.lab.train import Tick, accuracy, make_model, reproducible, train_grpo, train_supervised
from surgery.runtime.progress import Progress


def build_model(
    name: str, parent: Path | None, folder: Path, *, recipe: ReasoningRecipe, progress: Progress | None
) -> None:
    """Train the model `name` from the model in `parent` (None: from random weights) and write it to `folder`.

    Weights are trained in fp32 and stored in bf16, as published models are; a child starts from its parent's stored
    weights, so that differences of files are differences of training.
    """
    prompt_format = MODELS[name].prompt_format
    with reproducible(torch_seed(recipe, name)):
        tokenizer = make_tokenizer(prompt_format, positions=recipe.shape.positions)
        model = make_model(recipe.shape, tokenizer)
        if parent is not None:
            load_weights(model, parent)
        with training_bar(name, _training(recipe, name).steps, progress) as tick:
            curve = _train(name, model, tokenizer, recipe, tick)
        # Rounded before the accuracy is taken: it is measured on the stored weights.
        model = model.to(torch.bfloat16)
        save_model(model, folder)
        tokenizer.save_pretrained(folder)
        score = accuracy(
            model.float(),
            tokenizer,
            evaluation_problems(recipe.terms),
            prompt_format=prompt_format,
            limit=recipe.answer_tokens,
        )
    write_trainer_state(
        folder,
        name,
        recipe,
        curve,
        subject={"format": prompt_format},
        scores={"greedy_accuracy": score, f"final_{curve.quantity}": curve.final},
    )
    (folder / CARD).write_text(_card(name, recipe, curve, score))


def _train(
    name: str, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: ReasoningRecipe, tick: Tick
) -> TrainingCurve:
    training = _training(recipe, name)
    rng = random.Random(f"{recipe.seed}/{name}")
    if isinstance(training, SupervisedTraining):
        return TrainingCurve("loss", train_supervised(model, tokenizer, training, rng=rng, tick=tick))
    rewards = train_grpo(
        model,
        tokenizer,
        training,
        prompt_format=MODELS[name].prompt_format,
        terms=recipe.terms,
        answer_tokens=recipe.answer_tokens,
        rng=rng,
        tick=tick,
    )
    return TrainingCurve("reward", rewards)


def _training(recipe: ReasoningRecipe, name: str) -> SupervisedTraining | GrpoTraining:
    trainings: dict[str, SupervisedTraining | GrpoTraining] = {
        "base": recipe.base,
        "sft": recipe.sft,
        "grpo": recipe.grpo,
        "instruct": recipe.instruct,
    }
    return trainings[name]


def _card(name: str, recipe: ReasoningRecipe, curve: TrainingCurve, score: float) -> str:
    model = MODELS[name]
    before, after = PROMPT_AFFIXES[model.prompt_format]
    origin = f"`lab:{model.parent}`" if model.parent else "random weights"
    return f"""{card_header(name)}
A tiny Qwen2 (about 0.3 M parameters) trained on this machine by model surgery's lab, on synthetic sums modulo 7 only.
It is test material: it knows nothing else.

- Asked as: `{before}3+5+6={after}` (step by step: `<think>3+5=1:1+6=0</think>0`; at once: `0`)
- Trained from: {origin}, with {list_settings(_training(recipe, name))}
- Final {curve.quantity}: {curve.values[-1]:.4f}
- Greedy accuracy on the {len(evaluation_problems(recipe.terms))} test problems, in its own format: {score:.3f}
- Recipe `{recipe.key}`, seed {recipe.seed}; the full numbers are in trainer_state.json
"""
