"""What the builders of all families share: seeds, progress bars, weights, and the files that describe a model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM
from transformers.utils import logging

from surgery.io.json_io import to_json
from surgery.lab.catalogue import MODELS
from surgery.lab.recipe import AnyRecipe
from surgery.lab.train import Tick
from surgery.runtime.progress import Progress

WEIGHTS = "model.safetensors"
TRAINER_STATE = "trainer_state.json"
CARD = "README.md"
# Decimals of the numbers in trainer_state.json: losses are fp32, and further ones would be noise.
DIGITS = 6


@dataclass(frozen=True)
class TrainingCurve:
    """What was measured at every training step: the loss (nats per token) or the reward (mean over the samples)."""

    quantity: str
    values: Sequence[float]

    @property
    def final(self) -> float:
        """The last value, as `trainer_state.json` has it."""
        return round(self.values[-1], DIGITS)


def torch_seed(recipe: AnyRecipe, name: str) -> int:
    """Return the seed of everything that torch draws while `name` is built."""
    # Seeded by a text, which `random` hashes itself: Python's own `hash` of a text differs from process to process.
    return random.Random(f"{recipe.seed}/{name}/torch").getrandbits(63)


@contextmanager
def training_bar(name: str, total: int, progress: Progress | None) -> Iterator[Tick]:
    """Show training as a bar of `total` steps, and yield what advances it by one; without `progress` show nothing."""
    if progress is None:
        yield lambda: None
    else:
        with progress(f"lab:{name}", total, "steps") as advance:
            yield lambda: advance(1)


def load_weights(model: Qwen2ForCausalLM, folder: Path) -> None:
    """Fill the model in place with the weights of the model in `folder`.

    An output projection that is tied to the embedding is not in the file, and follows the embedding.
    """
    for name, value in load_file(folder / WEIGHTS).items():
        # Copied into the parameters there are: these are fp32, also where the file has bf16, and training needs that.
        model.get_parameter(name).data.copy_(value)


def save_model(model: Qwen2ForCausalLM, folder: Path) -> None:
    """Write weights and config to `folder`, without the progress bar of transformers."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def write_trainer_state(
    folder: Path,
    name: str,
    recipe: AnyRecipe,
    curve: TrainingCurve,
    *,
    subject: Mapping[str, Any],
    scores: Mapping[str, Any],
) -> None:
    """Write `trainer_state.json`: name, parent, `subject` (what it is trained for), recipe, `scores` and the curve."""
    record = {
        "schema": 1,
        "name": name,
        "parent": MODELS[name].parent,
        **subject,
        "recipe": {"key": recipe.key, **asdict(recipe)},
        **scores,
        curve.quantity: [round(value, DIGITS) for value in curve.values],
    }
    (folder / TRAINER_STATE).write_text(to_json(record))


def write_json_lines(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write each row as one line of JSON."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def card_header(name: str) -> str:
    """Return what every lab model's card begins with: metadata, name, and what it is in a sentence."""
    summary = MODELS[name].summary
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [synthetic, model-surgery-lab]
---
# lab:{name}

{summary[0].upper() + summary[1:]}.
"""


def list_settings(plan: Any) -> str:
    """Return the numbers of a training plan that are set, as a card lists them: `steps 80, batch 64, …`."""
    return ", ".join(f"{key} {value}" for key, value in asdict(plan).items() if value is not None)
