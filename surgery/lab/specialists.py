"""Build the `substrate` family: random weights, and two specialists trained on one domain each.

Both specialists read by the substrate's frozen token embedding.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
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
from surgery.lab.recipe import Domain, DomainTraining, SpecialistsRecipe
from surgery.lab.sorting import SORTING_CHARACTERS, sorting_evaluation_problems
from surgery.lab.sums import evaluation_problems
from surgery.lab.tokenizer import make_tokenizer
from surgery.lab.train import Exercise, accuracy, make_model, reproducible, train_domain
from surgery.runtime.progress import Progress


def build_model(
    name: str, parent: Path | None, folder: Path, *, recipe: SpecialistsRecipe, progress: Progress | None
) -> None:
    """Create the substrate (no `parent`), or train a specialist from the substrate in `parent`; write it to `folder`.

    Trained in fp32 and stored in bf16. The embedding starts from stored values and gets no gradient, so that its
    bytes are the substrate's.
    """
    training = _training(recipe, name)
    losses: list[float] = []
    with reproducible(torch_seed(recipe, name)):
        tokenizer = make_tokenizer("plain", positions=recipe.shape.positions, extra=SORTING_CHARACTERS)
        model = make_model(recipe.shape, tokenizer, tied=False)
        if training is not None and parent is not None:
            load_weights(model, parent)
            model.get_input_embeddings().requires_grad_(False)
            rng = random.Random(f"{recipe.seed}/{name}")
            with training_bar(name, training.steps, progress) as tick:
                losses = train_domain(model, tokenizer, training, rng=rng, tick=tick)
        # Rounded before the accuracies are taken: they are measured on the stored weights.
        model = model.to(torch.bfloat16)
        save_model(model, folder)
        tokenizer.save_pretrained(folder)
        scores = accuracies(model.float(), tokenizer, recipe)
    write_trainer_state(
        folder,
        name,
        recipe,
        TrainingCurve("loss", losses),
        subject={"domain": None if training is None else training.domain},
        scores={"greedy_accuracy": scores},
    )
    (folder / CARD).write_text(_card(name, training, recipe, losses, scores))


def accuracies(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: SpecialistsRecipe
) -> dict[Domain, float]:
    """Return the share of each domain's test problems that greedy decoding solves."""
    test_sets: dict[Domain, Sequence[Exercise]] = {
        "sums": evaluation_problems(recipe.terms),
        "sorting": sorting_evaluation_problems(recipe.jumbles),
    }
    return {
        domain: accuracy(model, tokenizer, problems, prompt_format="plain", limit=recipe.answer_tokens)
        for domain, problems in test_sets.items()
    }


def _training(recipe: SpecialistsRecipe, name: str) -> DomainTraining | None:
    return {"substrate": None, "adder": recipe.adder, "sorter": recipe.sorter}[name]


def _card(
    name: str,
    training: DomainTraining | None,
    recipe: SpecialistsRecipe,
    losses: Sequence[float],
    scores: Mapping[Domain, float],
) -> str:
    if training is None:
        origin = "- Not trained"
    else:
        settings = list_settings(training)
        origin = f"""- Trained from: `lab:{MODELS[name].parent}`, all but the token embedding, with {settings}
- Final loss: {losses[-1]:.4f}, noise included"""
    return f"""{card_header(name)}
A tiny Qwen2 (about 0.3 M parameters) made on this machine by model surgery's lab, on synthetic problems only. It is
test material: it knows nothing else.

- Asked as: `3+5+6=` (`<think>3+5=1:1+6=0</think>0`), or `7,2,9,4>` (`2479`)
{origin}
- Greedy accuracy on the test problems: sums {scores["sums"]:.3f}, sorting {scores["sorting"]:.3f}
- Recipe `{recipe.key}`, seed {recipe.seed}; the full numbers are in trainer_state.json
"""
