"""Growth on a tiny scale: windows with something to learn in them, and stages that take a second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from support.architectures import VOCABULARY
from support.models import open_folder
from torch import Tensor

from surgery.growth.plan import GrowthStage, Lora, StageTraining, TrainableParts
from surgery.growth.prefix_cache.cache import PrefixCache
from surgery.growth.prefix_cache.prefix import Prefix
from surgery.growth.training.loop import StageResult, train_stage, trainable_model
from surgery.growth.training.schedule import TrainingSchedule
from surgery.models.loaded_model import LoadedModel

SEQUENCE, BATCH, COUNT, SEED = 16, 4, 24, 5


class Windows:
    """`COUNT` windows of a stream in which each id mostly tells the next one, over and over again."""

    identity = "toy"

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(1)
        follows = torch.randperm(VOCABULARY, generator=draw)
        ids = [7]
        for chance in torch.rand(COUNT * SEQUENCE, generator=draw).tolist():
            ids.append(int(follows[ids[-1]]) if chance < 0.9 else int(chance * 1000) % VOCABULARY)
        self.stream = torch.tensor(ids)
        self.required = 0

    def require(self, n_windows: int) -> None:
        self.required = max(self.required, n_windows)

    def window_at(self, drawn: int) -> int:
        assert drawn < self.required, "windows are to be required before they are drawn"
        return (7 * drawn) % COUNT

    def windows(self, numbers: Sequence[int]) -> Tensor:
        return torch.stack([self.stream[n * SEQUENCE : (n + 1) * SEQUENCE + 1] for n in numbers])


def make_stage(
    train: Sequence[TrainableParts] = ("new", "head", "norm"), *, steps: int = 6, **settings: Any
) -> GrowthStage:
    """So many steps at a rate that is high, so that much happens in few."""
    training = StageTraining(**{"learning_rate": 1e-2, "warmup": 0.34} | settings.pop("training", {}))
    return GrowthStage(
        train=tuple(train), tokens=steps * BATCH * SEQUENCE, training=training, lora=Lora(rank=2), **settings
    )


def with_cache(live: LoadedModel, depth: int, folder: Path) -> Prefix:
    """The prefix below `depth`, cached in `folder`."""
    cache = PrefixCache(
        folder, windows=COUNT, sequence=SEQUENCE, width=live.width, dtype=torch.float32, tokens=Windows.identity
    )
    return Prefix(live, depth, cache)


def train(model: Path, stage: GrowthStage, folder: Path, *, cache: Path | None = None, **options: Any) -> StageResult:
    """Trains the model in the folder `model`, whose last layer is the new one; states go to `folder`."""
    live = open_folder(model)
    return train_live(live, stage, folder, cache=cache, **options)


def train_live(
    live: LoadedModel,
    stage: GrowthStage,
    folder: Path,
    *,
    cache: Path | None = None,
    batch: int = BATCH,
    depth: int | None = None,
    first_window: int = 2,
    **options: Any,
) -> StageResult:
    """Trains a model in memory; `depth` is that of the cached prefix, by default the right one."""
    schedule = TrainingSchedule(stage, stage.training or StageTraining(), first_window, SEQUENCE, batch, SEED)
    with trainable_model(live, schedule, [len(live.layers) - 1]) as model:
        prefix = None if cache is None else with_cache(live, model.depth if depth is None else depth, cache)
        return train_stage(model, schedule, **{"store": Windows(), "prefix": prefix, "folder": folder} | options)
