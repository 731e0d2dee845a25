"""What a growth left behind, as records: every training of it, what it was measured on, and where its files lie.

A training's own record (`training.json`) lies in the folder of the model that came out, and appears with it. A run's
`results.json` gathers them, with the scores, for programs and for the report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from surgery.errors import SurgeryError, usage_error
from surgery.evaluation.scoring import Score
from surgery.growth.plan import GrowthPlan, GrowthStage
from surgery.io.atomic import write_file
from surgery.io.json_records import Strict, read_record, record_text

SCHEMA = 1
KIND = "growth"
AGAIN = "Grow the model again"
TRAINING, RESULTS, REPORT = "training.json", "results.json", "report.html"
MOST_POINTS = 2000  # of a curve that is kept: more cannot be seen

Embedding = Literal["frozen", "trained"]
Budget = Literal["tokens", "flops"]


class GrowthRecordBase(Strict):
    """Part of a growth's files."""


class LossPoint(GrowthRecordBase):
    """The mean loss, in nats per token, of the steps that ended at `tokens` of this training."""

    tokens: int
    loss: float


class CacheUse(GrowthRecordBase):
    """What became of the prefix cache: why it was used or not, and how windows came by their states.

    read, extended, computed: windows since the training last began or went on, in the main process; see
    `surgery.growth.prefix_cache.prefix.Statistics`. bytes: that it took on the disk.
    """

    used: bool
    reason: str
    bytes: int = 0
    read: int = 0
    extended: int = 0
    computed: int = 0


class TrainingRecord(GrowthRecordBase):
    """One training, from checkpoint to checkpoint.

    key: hash of all that decides the result. layers: of the model. new: the numbers of those that were added. tokens:
    trained on here. first_window: where in the corpus it began. first_loss, last_loss: means over the first and last
    twentieth of the training. flops: operations of this training with nothing cached. tokens_per_second: without
    loading, saving and measuring. proven: frozen tensors whose hash is the same in the checkpoints before and after.
    """

    key: str
    name: str
    stage: GrowthStage
    layers: int
    new: tuple[int, ...]
    parameters: int
    trained_parameters: int
    optimizer_bytes: int
    steps: int
    tokens: int
    first_window: int
    stopped: Literal["tokens", "plateau"]
    seconds: float
    tokens_per_second: float
    flops: float
    first_loss: float
    last_loss: float
    curve: tuple[LossPoint, ...]
    cache: CacheUse
    proven: int
    processes: int
    embedding: Embedding = "frozen"
    budget: Budget | None = None


class ScoreRecord(GrowthRecordBase):
    """One measurement of a model; see `surgery.evaluation.scoring.Score`."""

    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int
    higher_is_better: bool | None

    @classmethod
    def of(cls, score: Score) -> ScoreRecord:
        low, high = (None if math.isnan(end) else end for end in (score.low, score.high))
        return cls(
            task=score.task,
            metric=score.metric,
            value=score.value,
            low=low,
            high=high,
            n=score.n,
            higher_is_better=score.higher_is_better,
        )

    def score(self, model: str) -> Score:
        """The same as a `Score` of `model`."""
        low, high = (math.nan if end is None else end for end in (self.low, self.high))
        return Score(model, self.task, self.metric, self.value, low, high, self.n, self.higher_is_better)


class TrainedStage(GrowthRecordBase):
    """A model of the run: its training, and its scores."""

    training: TrainingRecord
    scores: tuple[ScoreRecord, ...] = ()


class Growth(GrowthRecordBase):
    """A whole run."""

    plan: GrowthPlan
    stages: tuple[TrainedStage, ...]
    baselines: tuple[TrainedStage, ...] = ()

    @property
    def scores(self) -> list[Score]:
        """Of every model, the stages first."""
        return [score.score(model.training.name) for model in (*self.stages, *self.baselines) for score in model.scores]


def thinned(losses: Sequence[float], tokens_per_step: int) -> tuple[LossPoint, ...]:
    """A curve of at most `MOST_POINTS` points, each the mean over equally many steps (the last over what is left)."""
    size = max(1, -(-len(losses) // MOST_POINTS))
    return tuple(
        LossPoint(tokens=tokens_per_step * (start + len(part)), loss=math.fsum(part) / len(part))
        for start in range(0, len(losses), size)
        if (part := losses[start : start + size])
    )


def ends(losses: Sequence[float]) -> tuple[float, float]:
    """The mean loss over the first and over the last twentieth of a training."""
    size = max(1, len(losses) // 20)
    return math.fsum(losses[:size]) / size, math.fsum(losses[-size:]) / size


def read_training(folder: Path) -> TrainingRecord:
    """The record of the training that made the model in `folder`. Raises SurgeryError without one."""
    path = folder / TRAINING
    if not path.is_file():
        raise SurgeryError(f"has no {TRAINING}: it is no stage of a growth", where=folder)
    return read_record(path, KIND, SCHEMA, TrainingRecord, again=AGAIN)


def read_growth(run: Path) -> Growth:
    """The results in the folder `run`. Raises SurgeryError without any."""
    path = run / RESULTS
    if not path.is_file():
        raise usage_error(f"has no {RESULTS}", where=run, hint="Give a folder that `surgery grow run … -o RUN` wrote.")
    return read_record(path, KIND, SCHEMA, Growth, again=AGAIN)


def write_growth(run: Path, growth: Growth) -> None:
    """Writes results.json, whole or not at all."""
    write_file(run / RESULTS, record_text(KIND, SCHEMA, growth))


def training_text(record: TrainingRecord) -> str:
    """What training.json holds."""
    return record_text(KIND, SCHEMA, record)
