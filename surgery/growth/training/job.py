"""Inputs of one training: what all trainings of a run share (`RunContext`) and what is its own (`TrainingJob`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.growth.options import RunOptions
from surgery.growth.plan import GrowthPlan, GrowthStage, StageTraining
from surgery.growth.results import Budget, EmbeddingTraining
from surgery.growth.training.schedule import TrainingSchedule, WindowSource
from surgery.io.hashing import hash_text

CACHE = "cache"


@dataclass(frozen=True)
class RunContext:
    """What all trainings of a run share.

    run: the run's folder. store: source of its token windows. cached_windows: windows that the prefix cache has room
    for. device: where this process trains. inputs: what the run starts from, as entries of manifests.
    """

    run: Path
    plan: GrowthPlan
    store: WindowSource
    cached_windows: int
    device: str
    inputs: Mapping[str, Mapping[str, Any]]
    options: RunOptions

    @property
    def cache_folder(self) -> Path:
        """Folder of the prefix cache; runs whose plans name the same folder get separate ones in it."""
        if self.plan.cache.folder is None:
            return self.run / CACHE
        # The path of the run distinguishes them; the cache is deleted at the end, so that moving a run loses nothing
        # but it.
        return self.plan.cache.folder / hash_text(str(self.run.resolve()))


@dataclass(frozen=True)
class TrainingJob:
    """One training.

    name: of the folder in the run. start: the model that is trained. new: indices of the layers that the stage added.
    key: hash of everything that decides the result. first_window: windows drawn before. passes: how often each window
    meets the prefix that this training starts with, in this stage and later ones; None: no prefix cache. budget: of a
    baseline; None for a stage.
    """

    name: str
    start: Path | str
    stage: GrowthStage
    new: tuple[int, ...]
    key: str
    seed: int
    first_window: int
    passes: float | None
    budget: Budget | None = None

    @property
    def embedding(self) -> EmbeddingTraining:
        """Whether the embedding trains."""
        # A head that is tied to the embedding cannot train alone (see `prepare_stage_model`), so that this covers it.
        return "trained" if {"embedding", "all"} & set(self.stage.train) else "frozen"

    def schedule(self, plan: GrowthPlan) -> TrainingSchedule:
        """Return the job's training schedule with the sizes of `plan`."""
        training = self.stage.training or StageTraining()
        return TrainingSchedule(self.stage, training, self.first_window, plan.sequence, plan.batch, self.seed)
