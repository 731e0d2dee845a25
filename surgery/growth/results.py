"""Records of a growth on disk: `training.json` of every trained model, and `results.json` of the run.

`training.json` is in the folder of the model that was trained, and appears with it. `results.json` collects these
records and the models' scores, for programs and for the report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from surgery.errors import SurgeryError, usage_error
from surgery.evaluation.scoring import Score
from surgery.growth.plan import GrowthPlan, GrowthStage
from surgery.io.atomic import write_file
from surgery.io.json_records import Strict, read_record, record_text
from surgery.io.safe_paths import find_file

SCHEMA = 1
KIND = "growth"
AGAIN = "Grow the model again"
TRAINING, RESULTS, REPORT = "training.json", "results.json", "report.html"
MOST_POINTS = 2000  # of a stored loss curve: more cannot be seen in a plot

EmbeddingTraining = Literal["frozen", "trained"]
Budget = Literal["tokens", "flops"]


class GrowthRecordBase(Strict):
    """Base of the records in a growth's files."""


# Field names from here on are keys of training.json and results.json.
class LossPoint(GrowthRecordBase):
    """The mean loss, in nats per token, of the steps that ended at `tokens` of this training."""

    tokens: int
    loss: float


class CacheUse(GrowthRecordBase):
    """Whether the prefix cache was used and why, and where the states of windows came from.

    read, extended, computed: windows since the training was last started or resumed, in the main process; see
    `surgery.growth.prefix_cache.prefix.PrefixStatistics`. bytes: size on the disk.
    """

    used: bool
    reason: str
    bytes: int = 0
    read: int = 0
    extended: int = 0
    computed: int = 0


class TrainingRecord(GrowthRecordBase):
    """One training, from checkpoint to checkpoint.

    key: hash of everything that decides the result. layers: of the model. new: indices of the added layers. tokens:
    trained on here. first_window: windows of the corpus that were drawn before. first_loss, last_loss: means over the
    first and last twentieth of the training. flops: operations of this training, as if nothing were cached.
    tokens_per_second: without loading, saving and measuring. proven: frozen tensors whose hash is the same in the
    checkpoints before and after.
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
    tokens: Annotated[int, Field(ge=1)]
    first_window: int
    stopped: Literal["tokens", "plateau"]
    seconds: float
    tokens_per_second: float
    flops: float
    first_loss: float
    last_loss: float
    curve: Annotated[tuple[LossPoint, ...], Field(min_length=1)]
    cache: CacheUse
    proven: int
    processes: int
    embedding: EmbeddingTraining = "frozen"
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
        # JSON has no NaN.
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
        """Return the measurement as a `Score` of `model`."""
        # Scores without an interval have NaN bounds; JSON has no NaN, so they are null there.
        low, high = (math.nan if end is None else end for end in (self.low, self.high))
        return Score(model, self.task, self.metric, self.value, low, high, self.n, self.higher_is_better)


class TrainedStage(GrowthRecordBase):
    """A model of the run: its training and its scores."""

    training: TrainingRecord
    scores: tuple[ScoreRecord, ...] = ()


class Growth(GrowthRecordBase):
    """The results of a whole run."""

    plan: GrowthPlan
    stages: Annotated[tuple[TrainedStage, ...], Field(min_length=1)]
    baselines: tuple[TrainedStage, ...] = ()

    @property
    def scores(self) -> list[Score]:
        """The scores of every model, the stages first."""
        return [score.score(model.training.name) for model in (*self.stages, *self.baselines) for score in model.scores]


def downsample_losses(losses: Sequence[float], tokens_per_step: int) -> tuple[LossPoint, ...]:
    """Return at most `MOST_POINTS` points, each the mean over equally many steps (the last over what is left)."""
    size = max(1, -(-len(losses) // MOST_POINTS))
    return tuple(
        LossPoint(tokens=tokens_per_step * (start + len(part)), loss=math.fsum(part) / len(part))
        for start in range(0, len(losses), size)
        if (part := losses[start : start + size])
    )


def first_and_last_loss(losses: Sequence[float]) -> tuple[float, float]:
    """Return the mean loss over the first and over the last twentieth of a training."""
    # Single steps are too noisy to compare.
    size = max(1, len(losses) // 20)
    return math.fsum(losses[:size]) / size, math.fsum(losses[-size:]) / size


def read_training(folder: Path) -> TrainingRecord:
    """Read the record of the training that wrote the model in `folder`. Raises SurgeryError without one."""
    path = find_file(folder, TRAINING)
    if path is None:
        raise SurgeryError(f"has no {TRAINING}: it is no stage of a growth", where=folder)
    return read_record(path, KIND, SCHEMA, TrainingRecord, again=AGAIN)


def read_growth(run: Path) -> Growth:
    """Read the results in the folder `run`. Raises SurgeryError without any."""
    path = find_file(run, RESULTS)
    if path is None:
        raise usage_error(f"has no {RESULTS}", where=run, hint="Give a folder that `surgery grow run … -o RUN` wrote.")
    return read_record(path, KIND, SCHEMA, Growth, again=AGAIN)


def write_growth(run: Path, growth: Growth) -> None:
    """Write results.json, whole or not at all."""
    write_file(run / RESULTS, record_text(KIND, SCHEMA, growth))


def training_text(record: TrainingRecord) -> str:
    """Return the content of training.json."""
    return record_text(KIND, SCHEMA, record)
