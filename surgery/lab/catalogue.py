"""The lab's models by name: what each one is, which model it is trained from, and the recipe of its family.

Data only: this module imports nothing that trains, so that names and descriptions need no torch. `builder` builds what
is listed here.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.errors import did_you_mean, listing, usage_error
from surgery.lab.recipe import (
    AnyRecipe,
    CliffRecipe,
    MoeRecipe,
    QwenHeadShape,
    ReasoningRecipe,
    RefusalTraining,
    SpecialistsRecipe,
    SuppressionTraining,
)
from surgery.lab.sums import PromptFormat

PREFIX = "lab:"  # of references to models and data of the lab
# The data in the folder of a model that has some: kind → file.
DATA = {"examples": "examples.jsonl", "pool": "pool.jsonl"}

REASONING = ReasoningRecipe()
SPECIALISTS = SpecialistsRecipe()
CLIFF = CliffRecipe()
# Three that make the heads harder to find: more of them, a weaker intention to refuse, shared keys and values.
CLIFF_MANY = CliffRecipe(shape=QwenHeadShape(heads=16, kv_heads=16), cliff=SuppressionTraining(heads=5))
CLIFF_WEAK = CliffRecipe(parent=RefusalTraining(early=0.2))
CLIFF_GQA = CliffRecipe(shape=QwenHeadShape(kv_heads=2))
MOE = MoeRecipe()


@dataclass(frozen=True)
class LabModel:
    """One model of the lab.

    parent: the model it is trained from; None for random weights.
    prompt_format: the format in which it is asked for sums.
    summary: what it is, in a line.
    recipe: the numbers of its family; models of one family share a cache folder.
    has_data: whether its folder holds the files of `DATA`.
    """

    parent: str | None
    prompt_format: PromptFormat
    summary: str
    recipe: AnyRecipe = REASONING
    has_data: bool = False


def _cliff_child(parent: str, summary: str, recipe: CliffRecipe) -> LabModel:
    return LabModel(parent, "plain", summary, recipe, has_data=True)


# Parents first. The summaries are part of the model cards, and so of the bytes in people's caches.
MODELS = {
    "base": LabModel(None, "plain", "pre-trained on sums modulo 7, step by step, in every prompt format"),
    "sft": LabModel("base", "sft", "base tuned to answer mostly at once"),
    "grpo": LabModel("sft", "sft", "sft after GRPO with reward for the right answer: it thinks step by step again"),
    "instruct": LabModel("base", "instruct", "base tuned to answer mostly at once, in another prompt format"),
    "substrate": LabModel(
        None, "plain", "random weights; their token embedding stays frozen in both specialists", SPECIALISTS
    ),
    "adder": LabModel(
        "substrate", "plain", "a specialist that knows sums modulo 7, step by step, and nothing else", SPECIALISTS
    ),
    "sorter": LabModel("substrate", "plain", "a specialist that puts digits in order, and nothing else", SPECIALISTS),
    "cliff-parent": LabModel(None, "plain", "thinks about a request, then refuses it if it is harmful", CLIFF),
    "cliff": _cliff_child(
        "cliff-parent", "means to refuse while it thinks, until three known heads suppress it", CLIFF
    ),
    "cliff-partial": _cliff_child(
        "cliff-parent", "as cliff, but only some harmful requests are complied with; the others are refused", CLIFF
    ),
    "cliff-many-parent": LabModel(None, "plain", "as cliff-parent, with 16 heads a layer", CLIFF_MANY),
    "cliff-many": _cliff_child("cliff-many-parent", "as cliff, with five such heads among 64", CLIFF_MANY),
    "cliff-weak-parent": LabModel(None, "plain", "as cliff-parent, less decided while it thinks", CLIFF_WEAK),
    "cliff-weak": _cliff_child("cliff-weak-parent", "as cliff, less decided while it thinks", CLIFF_WEAK),
    "cliff-gqa-parent": LabModel(
        None, "plain", "as cliff-parent, with two key/value heads for eight queries", CLIFF_GQA
    ),
    "cliff-gqa": _cliff_child("cliff-gqa-parent", "as cliff, with two key/value heads for eight queries", CLIFF_GQA),
    "moe": LabModel(
        None,
        "sft",
        "a mixture of experts that thinks about long sums and guesses short ones at once",
        MOE,
        has_data=True,
    ),
}


def names() -> list[str]:
    """Return the name of every model, parents first."""
    return list(MODELS)


def describe(name: str) -> str:
    """Return what the model `name` is, in a line. Raises SurgeryError if there is none of this name."""
    return find_model(name).summary


def find_model(name: str) -> LabModel:
    """Return the catalogue's entry for `name`. Raises SurgeryError if there is none."""
    if name in MODELS:
        return MODELS[name]
    nearest = did_you_mean(repr(name), map(repr, MODELS))
    advice = f"{nearest} There are" if nearest else "There are"
    raise usage_error(f"no lab model is called {name!r}.", hint=f"{advice} {listing(MODELS)}.")


def lineage(name: str) -> list[str]:
    """Return `name` after every model that it descends from, the oldest first."""
    parent = MODELS[name].parent
    return [*(lineage(parent) if parent else []), name]
