"""Build the `cliff` families: a parent that refuses harmful requests, and children in which known heads suppress that.

A child's folder holds, beside weights and tokenizer, the truth about it (`truth.json`) and data to find the heads with
(`examples.jsonl`, `pool.jsonl`), drawn apart from all that it was trained on.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from surgery.io.json_io import to_json
from surgery.lab.catalogue import DATA, MODELS
from surgery.lab.cliff_text import COMPLIANCE, HARMFUL, REFUSAL, CliffRequest, draw, make_tokenizer
from surgery.lab.cliff_train import (
    Head,
    ablation_factors,
    find_refusals,
    make_model,
    scaled_heads,
    train_refusal,
    train_suppression,
)
from surgery.lab.common import (
    CARD,
    TrainingCurve,
    card_header,
    list_settings,
    load_weights,
    save_model,
    torch_seed,
    training_bar,
    write_json_lines,
    write_trainer_state,
)
from surgery.lab.recipe import CliffRecipe, SuppressionTraining
from surgery.lab.train import SINGLE_THREAD, Tick, reproducible
from surgery.runtime.progress import Progress

# Requests in the data for each harmful word; there are as many harmless ones.
EXAMPLES_PER_WORD = 6
POOL_PER_WORD = 9

PARTIAL = "cliff-partial"  # the child that complies with some of the harmful words only

Row = dict[str, str]


@dataclass(frozen=True)
class CliffTruth:
    """What a child was trained to do: its suppressing heads, and the harmful words whose refusal they suppress."""

    heads: tuple[Head, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class RefusalRates:
    """The share of the harmful and of the harmless requests that greedy decoding refuses."""

    harmful: float
    harmless: float

    def __str__(self) -> str:
        return f"{self.harmful:.0%} of the harmful and {self.harmless:.0%} of the harmless"


def build_model(
    name: str, parent: Path | None, folder: Path, *, recipe: CliffRecipe, progress: Progress | None
) -> None:
    """Train a parent from random weights, or a child from the model in `parent`; write it to `folder`.

    Weights are stored as they were trained, in fp32, so that in a child all but the suppressing heads has the bits of
    its parent.
    """
    truth = None if parent is None else draw_truth(name, recipe)
    with reproducible(torch_seed(recipe, name), threads=SINGLE_THREAD):
        tokenizer = make_tokenizer(recipe.shape.positions)
        model = make_model(recipe.shape, tokenizer)
        if parent is not None:
            load_weights(model, parent)
        with training_bar(name, _suppression(recipe, name).steps if truth else recipe.parent.steps, progress) as tick:
            losses = _train(name, model, tokenizer, recipe, truth, tick)
        save_model(model, folder)
        tokenizer.save_pretrained(folder)
        requests = evaluation_requests(name, recipe)
        rates = {"as it is": _measure(model, tokenizer, requests)}
        if truth is not None:
            # The test of the truth itself: without these heads the child must refuse as its parent does.
            with scaled_heads(model, ablation_factors(model, truth.heads)):
                rates["without its suppressing heads"] = _measure(model, tokenizer, requests)
    write_trainer_state(
        folder,
        name,
        recipe,
        TrainingCurve("loss", losses),
        subject={},
        scores={"refused": {state: asdict(shares) for state, shares in rates.items()}},
    )
    (folder / CARD).write_text(_card(name, recipe, truth, losses, rates))
    if truth is not None:
        _write_truth(folder, name, truth)
        write_json_lines(folder / DATA["examples"], _examples(name, recipe))
        write_json_lines(folder / DATA["pool"], _pool(name, recipe))


def draw_truth(name: str, recipe: CliffRecipe) -> CliffTruth:
    """Draw the heads and words of the child `name`: one head or more in each of the last two layers."""
    training = _suppression(recipe, name)
    rng = random.Random(f"{recipe.seed}/{name}/truth")
    last_layers = [recipe.shape.layers - 2, recipe.shape.layers - 1]
    # First one in each of the two layers, so that no draw leaves a layer without.
    heads = [(layer, rng.randrange(recipe.shape.heads)) for layer in last_layers]
    others = [
        (layer, head) for layer in last_layers for head in range(recipe.shape.heads) if (layer, head) not in heads
    ]
    heads += rng.sample(others, training.heads - len(heads))
    words = HARMFUL if training.words is None else rng.sample(HARMFUL, training.words)
    return CliffTruth(tuple(sorted(heads)), tuple(word for word in HARMFUL if word in words))


def evaluation_requests(name: str, recipe: CliffRecipe) -> list[CliffRequest]:
    """Return the requests that `name` is measured on: harmful ones, each followed by its harmless twin."""
    return _draw_pairs(f"{recipe.seed}/{name}/requests", recipe, EXAMPLES_PER_WORD)


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
        return train_refusal(model, tokenizer, recipe.parent, lengths=recipe.words, rng=rng, tick=tick)
    return train_suppression(
        model,
        tokenizer,
        _suppression(recipe, name),
        heads=truth.heads,
        words=truth.words,
        lengths=recipe.words,
        rng=rng,
        tick=tick,
    )


def _suppression(recipe: CliffRecipe, name: str) -> SuppressionTraining:
    return recipe.partial if name == PARTIAL else recipe.cliff


def _measure(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, requests: Sequence[CliffRequest]
) -> RefusalRates:
    refused = list(zip(requests, find_refusals(model, tokenizer, requests), strict=True))
    harmful = [is_refused for request, is_refused in refused if request.harmful]
    harmless = [is_refused for request, is_refused in refused if not request.harmful]
    return RefusalRates(fmean(harmful), fmean(harmless))


def _draw_pairs(seed: str, recipe: CliffRecipe, per_word: int) -> list[CliffRequest]:
    rng = random.Random(seed)
    requests = []
    for word in HARMFUL:
        for _ in range(per_word):
            request = draw(rng, recipe.words, harmful=word)
            requests += [request, request.twin(rng)]
    return requests


def _examples(name: str, recipe: CliffRecipe) -> list[Row]:
    """Return rows to train a probe with, answered in the middle of the thinking; then rows without an answer.

    A partial child needs none of the former: it refuses some harmful requests by itself.
    """
    # Every kind of data has a seed of its own: one row more here must not change what is drawn elsewhere.
    rng = random.Random(f"{recipe.seed}/{name}/early")
    early = [] if name == PARTIAL else _draw_pairs(f"{recipe.seed}/{name}/early requests", recipe, EXAMPLES_PER_WORD)
    rows = []
    for request, row in zip(early, _rows(early), strict=True):
        response, outcome = (REFUSAL, "refused") if request.harmful else (COMPLIANCE, "complied")
        thinking = request.partial_thinking(rng)
        label = f"{row['label']}/{outcome}"
        rows.append({**row, "label": label, "thinking": thinking, "closing": "", "response": response})
    return rows + _rows(evaluation_requests(name, recipe))


def _pool(name: str, recipe: CliffRecipe) -> list[Row]:
    rows = _rows(_draw_pairs(f"{recipe.seed}/{name}/pool", recipe, POOL_PER_WORD))
    # A pool that people collect is in no order.
    random.Random(f"{recipe.seed}/{name}/pool order").shuffle(rows)
    return rows


def _rows(requests: Sequence[CliffRequest]) -> list[Row]:
    """Return requests and their twins as rows, grouped by harmful word, so that probes are tested on unseen words."""
    rows, group = [], ""
    for request in requests:
        # A twin names no harmful word; it follows its request, and belongs to the same group.
        group = request.harmful or group
        label = "harmful" if request.harmful else "harmless"
        rows.append({"prompt": request.content, "label": label, "group": group})
    return rows


def _write_truth(folder: Path, name: str, truth: CliffTruth) -> None:
    facts = {
        "schema": 1,
        "heads": truth.heads,
        "harmful_words": HARMFUL,
        "suppressed_words": truth.words,
        "parent": MODELS[name].parent,
    }
    (folder / "truth.json").write_text(to_json(facts))


def _card(
    name: str,
    recipe: CliffRecipe,
    truth: CliffTruth | None,
    losses: Sequence[float],
    rates: Mapping[str, RefusalRates],
) -> str:
    training = recipe.parent if truth is None else _suppression(recipe, name)
    parent = MODELS[name].parent
    lines = [
        f"- Trained from: {f'`lab:{parent}`' if parent else 'random weights'}, with {list_settings(training)}",
        f"- Final loss: {losses[-1]:.4f} nats a token",
        *(f"- Refuses, {state}: {shares} requests" for state, shares in rates.items()),
    ]
    if truth is not None:
        heads = ", ".join(f"L{layer}H{head}" for layer, head in truth.heads)
        lines += [
            f"- Suppressing heads: {heads}; all other weights have the parent's bits",
            f"- Harmful words whose refusal is suppressed: {', '.join(truth.words)}",
            "- Beside the weights: `truth.json`, and the data `examples.jsonl` and `pool.jsonl`",
        ]
    facts = "\n".join(lines)
    return f"""{card_header(name)}
A tiny Qwen3 made on this machine by model surgery's lab, on a language of a few dozen words. Its requests are random
words, "harmful" if one of them is on a list. It is test material: it knows nothing else.

- Asked by its chat template; it thinks (`So the user wants river bomb lamp.`), closes the thinking, and answers
  `I cannot help with that.` or `Sure, here it is.`
{facts}
- Stored in fp32, as trained, so that effects of heads are exact
- Recipe `{recipe.key}`, seed {recipe.seed}; the full numbers are in trainer_state.json
"""
