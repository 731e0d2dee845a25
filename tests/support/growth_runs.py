"""A growth small enough for tests: two corpora, a tokenizer and an embedding of them, and plans that take seconds."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from torch import Tensor

from surgery.growth.data.corpus import documents
from surgery.growth.data.tokenizer_training import train_tokenizer
from surgery.growth.embedding.build import make_embedding
from surgery.growth.options import RunOptions
from surgery.growth.prepare import PreparedRun, load_plan, prepare_run
from surgery.growth.results import Growth
from surgery.growth.run import grow
from surgery.reporting.report import Figure

WIDTH, SEQUENCE, BATCH = 16, 8, 4
STEPS = 6
TOKENS = STEPS * BATCH * SEQUENCE
CPU = RunOptions(device="cpu")

PLAN: dict[str, Any] = {
    "model": {"heads": 2, "mlp": 24},
    "sequence": SEQUENCE,
    "batch": BATCH,
    "training": {"learning_rate": 0.01},
    "stages": [{"times": 3, "tokens": TOKENS}],
}


def write_corpora(folder: Path) -> None:
    """`sums.txt` and `words.txt`, which share their letters and little else."""
    rng = random.Random(0)
    sums = "\n".join(f"{a}+{b}={a + b};" for a, b in ((rng.randrange(99), rng.randrange(99)) for _ in range(300)))
    words = " ".join(rng.choice(("tree", "stone", "river", "cloud", "the", "of", "and")) for _ in range(900))
    (folder / "sums.txt").write_text(sums)
    (folder / "words.txt").write_text(words)


def write_substrate(folder: Path) -> None:
    """The tokenizer `tok` and the embedding `emb` of both corpora."""
    texts = (document.text for document in documents([str(folder / "sums.txt"), str(folder / "words.txt")]))
    train_tokenizer(texts, folder / "tok", vocab=320)
    make_embedding(str(folder / "tok"), folder / "emb", kind="random", width=WIDTH)


def write_plan(folder: Path, name: str = "plan.yml", **changes: Any) -> Path:
    """A plan's file in `folder`; what is changed to None is left out."""
    said = {key: value for key, value in (PLAN | changes).items() if value is not None}
    path = folder / name
    path.write_text(yaml.safe_dump(said))
    return path


def prepared(
    bench: Path, run: Path, *, plan: Path | None = None, corpus: str = "sums.txt", **changes: Any
) -> PreparedRun:
    """A run of a plan with changes, on the embedding and a corpus of `bench`."""
    path = plan or write_plan(run.parent, f"{run.name}.yml", **changes)
    embed = None if changes.get("start") else str(bench / "emb")
    return prepare_run(load_plan(str(path), embed=embed, corpus=[str(bench / corpus)]), run)


def grown(bench: Path, run: Path, *, corpus: str = "sums.txt", options: RunOptions = CPU, **changes: Any) -> Growth:
    """That run, done."""
    return grow(prepared(bench, run, corpus=corpus, **changes), options)


def no_pictures(patch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures of reports, which take as long as the training."""
    patch.setattr("surgery.growth.plots.render_figure", lambda canvas, title, caption: Figure(title, caption, b""))


def weights(run: Path) -> Mapping[str, Tensor]:
    """Every tensor of every model in a run, by folder and name."""
    found = {}
    for path in sorted(run.glob("*/model.safetensors")):
        found |= {f"{path.parent.name}/{name}": tensor for name, tensor in load_file(path).items()}
    return found


def curves(growth: Growth) -> list[list[float]]:
    """The losses of every training."""
    return [[point.loss for point in model.training.curve] for model in (*growth.stages, *growth.baselines)]
