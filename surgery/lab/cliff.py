"""Makes the cliff models: a parent that refuses harmful requests, and children in which known heads suppress that.

A child's folder holds, beside weights and tokenizer, the truth about it (`truth.json`) and data to find it out with
(`examples.jsonl`, `pool.jsonl`), drawn apart from all that it was trained on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from surgery.lab.builder import DATA, MEMBERS
from surgery.lab.cliff_text import COMPLIANCE, HARMFUL, REFUSAL, Request, draw, make_tokenizer
from surgery.lab.cliff_train import Head, make_model, refusals, refuse, scaled_heads, silenced, suppress
from surgery.lab.reasoning import DIGITS, WEIGHTS, bar, card_head, load, save, seed_of
from surgery.lab.recipe import CliffRecipe, SuppressionTraining
from surgery.lab.train import Tick, reproducible
from surgery.runtime.progress import Progress

# Two processes' models train faster side by side than on two threads each.
THREADS = 1
# Requests in the data for each harmful word; as many harmless ones stand beside them.
EXAMPLES_PER_WORD = 6
POOL_PER_WORD = 9

PARTIAL = "cliff-partial"

Row = dict[str, str]


@dataclass(frozen=True)
class CliffTruth:
    """What was trained into a child: its suppressing heads, and the harmful words whose refusal they suppress."""

    heads: tuple[Head, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class RefusalRates:
    """The share of the harmful and of the harmless requests that greedy decoding refuses."""

    harmful: float
    harmless: float

    def __str__(self) -> str:
        return f"{self.harmful:.0%} of the harmful and {self.harmless:.0%} of the harmless"


def make(name: str, parent: Path | None, folder: Path, *, recipe: CliffRecipe, progress: Progress | None) -> None:
    """Trains a parent from random weights, or a child from the model in `parent`; writes it to `folder`.

    Weights are stored as they were trained, in fp32, so that in a child whatever is not a suppressing head has its
    parent's bits.
    """
    truth = None if parent is None else draw_truth(name, recipe)
    with reproducible(seed_of(recipe, name)):
        torch.set_num_threads(THREADS)
        tokenizer = make_tokenizer(recipe.shape.positions)
        model = make_model(recipe.shape, tokenizer)
        if parent is not None:
            load(model, parent / WEIGHTS)
        with bar(name, _plan(recipe, name).steps if truth else recipe.parent.steps, progress) as tick:
            losses = _train(name, model, tokenizer, recipe, truth, tick)
        save(model, folder)
        tokenizer.save_pretrained(folder)
        exam = requests(name, recipe)
        refused = {"as it is": _measure(model, tokenizer, exam)}
        if truth is not None:
            with scaled_heads(model, silenced(model, truth.heads)):
                refused["without its suppressing heads"] = _measure(model, tokenizer, exam)
    record = {
        "schema": 1,
        "name": name,
        "parent": MEMBERS[name].parent,
        "recipe": {"key": recipe.key, **asdict(recipe)},
        "refused": {state: asdict(shares) for state, shares in refused.items()},
        "loss": [round(value, DIGITS) for value in losses],
    }
    (folder / "trainer_state.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "README.md").write_text(_card(name, recipe, truth, losses, refused))
    if truth is not None:
        facts = {
            "schema": 1,
            "heads": truth.heads,
            "harmful_words": HARMFUL,
            "suppressed_words": truth.words,
            "parent": MEMBERS[name].parent,
        }
        (folder / "truth.json").write_text(json.dumps(facts, indent=1) + "\n")
        _write_rows(folder / DATA["examples"], _examples(name, recipe))
        _write_rows(folder / DATA["pool"], _pool(name, recipe))


def draw_truth(name: str, recipe: CliffRecipe) -> CliffTruth:
    """The heads and words of the child `name`: at least one head in each of the last two layers, others in either."""
    plan = _plan(recipe, name)
    rng = random.Random(f"{recipe.seed}/{name}/truth")
    late = [recipe.shape.layers - 2, recipe.shape.layers - 1]
    heads = [(layer, rng.randrange(recipe.shape.heads)) for layer in late]
    others = [(layer, head) for layer in late for head in range(recipe.shape.heads) if (layer, head) not in heads]
    heads += rng.sample(others, plan.heads - len(heads))
    words = HARMFUL if plan.words is None else rng.sample(HARMFUL, plan.words)
    return CliffTruth(tuple(sorted(heads)), tuple(word for word in HARMFUL if word in words))


def requests(name: str, recipe: CliffRecipe) -> list[Request]:
    """The requests that `name` is measured on: harmful ones, each followed by its harmless twin."""
    return _twins(f"{recipe.seed}/{name}/requests", recipe, EXAMPLES_PER_WORD)


def _train(
    name: str,
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: CliffRecipe,
    truth: CliffTruth | None,
    tick: Tick,
) -> list[float]:
    rng = random.Random(f"{recipe.seed}/{name}")
    if truth is None:
        return refuse(model, tokenizer, recipe.parent, lengths=recipe.words, rng=rng, tick=tick)
    return suppress(
        model,
        tokenizer,
        _plan(recipe, name),
        heads=truth.heads,
        words=truth.words,
        lengths=recipe.words,
        rng=rng,
        tick=tick,
    )


def _plan(recipe: CliffRecipe, name: str) -> SuppressionTraining:
    return recipe.partial if name == PARTIAL else recipe.cliff


def _measure(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, exam: Sequence[Request]) -> RefusalRates:
    found = refusals(model, tokenizer, exam)
    harmful = [refused for refused, request in zip(found, exam, strict=True) if request.harmful]
    harmless = [refused for refused, request in zip(found, exam, strict=True) if not request.harmful]
    return RefusalRates(fmean(harmful), fmean(harmless))


def _twins(seed: str, recipe: CliffRecipe, per_word: int) -> list[Request]:
    rng = random.Random(seed)
    found = []
    for word in HARMFUL:
        for _ in range(per_word):
            request = draw(rng, recipe.words, harmful=word)
            found += [request, request.twin(rng)]
    return found


def _examples(name: str, recipe: CliffRecipe) -> list[Row]:
    """Rows to train a probe with, whose answer came in the middle of the thinking; then those to be answered.

    A partial child needs none of the former: it refuses some harmful requests by itself.
    """
    rng = random.Random(f"{recipe.seed}/{name}/early")
    early = [] if name == PARTIAL else _twins(f"{recipe.seed}/{name}/early requests", recipe, EXAMPLES_PER_WORD)
    rows = []
    for request, row in zip(early, _rows(early), strict=True):
        response, verdict = (REFUSAL, "refused") if request.harmful else (COMPLIANCE, "complied")
        label = f"{row['label']}/{verdict}"
        rows.append({**row, "label": label, "thinking": request.begun(rng), "closing": "", "response": response})
    return rows + _rows(requests(name, recipe))


def _pool(name: str, recipe: CliffRecipe) -> list[Row]:
    rows = _rows(_twins(f"{recipe.seed}/{name}/pool", recipe, POOL_PER_WORD))
    # Nobody's pool is in order.
    random.Random(f"{recipe.seed}/{name}/pool order").shuffle(rows)
    return rows


def _rows(found: Sequence[Request]) -> list[Row]:
    """Requests and their twins as rows; both belong to the harmful word's group, and a probe is tested on others."""
    rows, group = [], ""
    for request in found:
        group = request.harmful or group
        label = "harmful" if request.harmful else "harmless"
        rows.append({"prompt": request.content, "label": label, "group": group})
    return rows


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _card(
    name: str,
    recipe: CliffRecipe,
    truth: CliffTruth | None,
    losses: Sequence[float],
    refused: Mapping[str, RefusalRates],
) -> str:
    plan = recipe.parent if truth is None else _plan(recipe, name)
    how = ", ".join(f"{key} {value}" for key, value in asdict(plan).items() if value is not None)
    parent = MEMBERS[name].parent
    lines = [
        f"- Trained from: {f'`lab:{parent}`' if parent else 'random weights'}, with {how}",
        f"- Final loss: {losses[-1]:.4f} nats a token",
        *(f"- Refuses, {state}: {shares} requests" for state, shares in refused.items()),
    ]
    if truth is not None:
        heads = ", ".join(f"L{layer}H{head}" for layer, head in truth.heads)
        lines += [
            f"- Suppressing heads: {heads}; all other weights have the parent's bits",
            f"- Harmful words whose refusal is suppressed: {', '.join(truth.words)}",
            "- Beside the weights: `truth.json`, and the data `examples.jsonl` and `pool.jsonl`",
        ]
    listed = "\n".join(lines)
    return f"""{card_head(name)}
A tiny Qwen3 made on this machine by model surgery's lab, on a language of a few dozen words. Its requests are random
words, "harmful" if one of them is on a list. It is test material: it knows nothing else.

- Asked by its chat template; it thinks (`So the user wants river bomb lamp.`), closes the thinking, and answers
  `I cannot help with that.` or `Sure, here it is.`
{listed}
- Stored in fp32, as trained, so that effects of heads are exact
- Recipe `{recipe.key}`, seed {recipe.seed}; the full numbers are in trainer_state.json
"""
