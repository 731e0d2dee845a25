"""Makes the substrate and the specialists on it: random weights, then one domain each, under one frozen embedding."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from surgery.lab.builder import MEMBERS
from surgery.lab.reasoning import DIGITS, WEIGHTS, bar, card_head, load, save, seed_of
from surgery.lab.recipe import Domain, DomainTraining, SpecialistsRecipe
from surgery.lab.sorting import SORTING_CHARACTERS, sorting_test_problems
from surgery.lab.sums import test_problems
from surgery.lab.tokenizer import make_tokenizer
from surgery.lab.train import Exercise, accuracy, make_model, reproducible, train_domain
from surgery.runtime.progress import Progress


def make(name: str, parent: Path | None, folder: Path, *, recipe: SpecialistsRecipe, progress: Progress | None) -> None:
    """Makes the substrate (no `parent`), or trains a specialist from the substrate in `parent`; writes to `folder`.

    Trained in fp32 and stored in bf16. The embedding starts from stored values and gets no gradient, so that its
    bytes are the substrate's.
    """
    plan = _plan(recipe, name)
    losses: list[float] = []
    with reproducible(seed_of(recipe, name)):
        tokenizer = make_tokenizer("plain", positions=recipe.shape.positions, more=SORTING_CHARACTERS)
        model = make_model(recipe.shape, tokenizer, tied=False)
        if plan is not None and parent is not None:
            load(model, parent / WEIGHTS)
            model.get_input_embeddings().requires_grad_(False)
            rng = random.Random(f"{recipe.seed}/{name}")
            with bar(name, plan.steps, progress) as tick:
                losses = train_domain(model, tokenizer, plan, rng=rng, tick=tick)
        # Rounded before the accuracies are taken: they are measured on the stored weights.
        model = model.to(torch.bfloat16)
        save(model, folder)
        tokenizer.save_pretrained(folder)
        right = accuracies(model.float(), tokenizer, recipe)
    record = {
        "schema": 1,
        "name": name,
        "parent": MEMBERS[name].parent,
        "domain": None if plan is None else plan.domain,
        "recipe": {"key": recipe.key, **asdict(recipe)},
        "greedy_accuracy": right,
        "loss": [round(value, DIGITS) for value in losses],
    }
    (folder / "trainer_state.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "README.md").write_text(_card(name, plan, recipe, losses, right))


def accuracies(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: SpecialistsRecipe
) -> dict[Domain, float]:
    """The share of each domain's test problems that greedy decoding answers rightly."""
    exams: dict[Domain, Sequence[Exercise]] = {
        "sums": test_problems(recipe.terms),
        "sorting": sorting_test_problems(recipe.jumbles),
    }
    return {
        domain: accuracy(model, tokenizer, problems, form="plain", limit=recipe.answer_tokens)
        for domain, problems in exams.items()
    }


def _plan(recipe: SpecialistsRecipe, name: str) -> DomainTraining | None:
    return {"substrate": None, "adder": recipe.adder, "sorter": recipe.sorter}[name]


def _card(
    name: str,
    plan: DomainTraining | None,
    recipe: SpecialistsRecipe,
    losses: Sequence[float],
    right: Mapping[Domain, float],
) -> str:
    if plan is None:
        origin = "- Not trained"
    else:
        how = ", ".join(f"{key} {value}" for key, value in asdict(plan).items())
        origin = f"""- Trained from: `lab:{MEMBERS[name].parent}`, all but the token embedding, with {how}
- Final loss: {losses[-1]:.4f}, noise included"""
    return f"""{card_head(name)}
A tiny Qwen2 (about 0.3 M parameters) made on this machine by model surgery's lab, on synthetic problems only. It is
test material: it knows nothing else.

- Asked as: `3+5+6=` (`<think>3+5=1:1+6=0</think>0`), or `7,2,9,4>` (`2479`)
{origin}
- Greedy accuracy on the test problems: sums {right["sums"]:.3f}, sorting {right["sorting"]:.3f}
- Recipe `{recipe.key}`, seed {recipe.seed}; the full numbers are in trainer_state.json
"""
