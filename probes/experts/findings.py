"""Findings about a model's experts, stored in a folder.

    results.json    `ExpertFindings`; `experts` has every expert, best first
    examples.jsonl  the texts that were counted on
    report.html     tables and plots

Findings contain the hash of the model's weights; an edit of another model rejects them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import model_validator

from probes.data.records import DataRecord, FindingsRecord, IntervalRecord, ModelRecord, read_record, write_record
from surgery.checkpoint.selectors import Expert

KIND = "experts"


class MarkerRecord(FindingsRecord):
    """A marker: its weight in the total, and the number of positions at which it ends."""

    text: str
    weight: float
    positions: int


class ExpertRecord(FindingsRecord):
    """One expert.

    npmi: the published total, unsmoothed. by_marker: the same for each marker, unweighted.
    smoothed: the total with smoothing, and its interval; experts with support are ranked by it.
    difference: Σ of weight × (share of the marker's positions at which it fires − that of all other positions).
    fires, at_marker: numbers of positions. rate: the share of all positions at which it fires.
    q: the share of false discoveries.
    rank: None if it lacks support; `why` is what it lacks.
    norm_ratio: ‖what it adds‖ ÷ ‖the layer's input‖ where it fires; of the best ranked experts only.
    """

    layer: int
    expert: int
    npmi: float
    by_marker: list[float]
    smoothed: IntervalRecord
    difference: float
    fires: int
    at_marker: int
    rate: float
    q: float
    rank: int | None
    rank_low: int | None
    rank_high: int | None
    published_rank: int
    why: str | None
    norm_ratio: float | None = None

    @property
    def name(self) -> Expert:
        return Expert(self.layer, self.expert)


class PointRecord(FindingsRecord):
    """Scores at one β.

    control: None for the chosen experts, otherwise the number of the random set.
    part: `choice`, the half on which β was chosen, or `test`.
    collapsed: the share of answers that end in a loop.
    """

    beta: float
    experts: list[str]
    control: int | None
    part: str
    scores: dict[str, IntervalRecord]
    collapsed: IntervalRecord | None


class SweepRecord(FindingsRecord):
    """A grid of β; `best` was chosen on one half of each task's samples and tested on the other."""

    tasks: list[str]
    experts: list[str]
    way: str
    phase: str
    points: list[PointRecord]
    best: float

    @model_validator(mode="after")
    def _has_what_the_report_tells(self) -> SweepRecord:
        tested = {point.beta for point in self.points if point.part == "test" and point.control is None}
        if not self.tasks or not {1.0, self.best} <= tested:
            raise ValueError(f"a task, and points of the test half for β = 1 and the best, {self.best:g}")
        if any(point.scores.keys() != set(self.tasks) for point in self.points):
            raise ValueError("a score of every task at each point")
        return self


class OverlapRecord(FindingsRecord):
    """The agreement of the ranking with that on a second data set."""

    data: DataRecord
    top: int
    shared: list[str]
    jaccard: float
    spearman: IntervalRecord


class ExpertFindings(FindingsRecord):
    """The findings of one run. top_k: experts per token, by layer."""

    model: ModelRecord
    data: DataRecord
    settings: dict[str, Any]
    markers: list[MarkerRecord]
    positions: int
    by_part: dict[str, int]
    sequences: int
    generated: int
    layers: list[int]
    n_experts: list[int]
    top_k: list[int]
    warnings: list[str]
    experts: list[ExpertRecord]
    overlap: OverlapRecord | None = None
    sweep: SweepRecord | None = None

    @model_validator(mode="after")
    def _experts_are_of_the_layers(self) -> ExpertFindings:
        if not len(self.layers) == len(self.n_experts) == len(self.top_k):
            raise ValueError("as many layers as numbers of experts")
        size = dict(zip(self.layers, self.n_experts, strict=True))
        if stray := next((row for row in self.experts if not 0 <= row.expert < size.get(row.layer, 0)), None):
            raise ValueError(f"experts of these layers, {stray.name} is none")
        return self

    @property
    def ranked(self) -> list[ExpertRecord]:
        """The experts with support, best first."""
        return [row for row in self.experts if row.rank is not None]


def read_expert_findings(run: Path) -> ExpertFindings:
    """Read the findings in the folder `run`. Raises SurgeryError if it has none, or those of another kind.

    Example:
        print(read_expert_findings(Path("RUN")).experts[0])
    """
    return read_record(run, KIND, ExpertFindings)


def write_expert_findings(folder: Path, findings: ExpertFindings) -> None:
    """Write results.json and the manifest into `folder`."""
    write_record(folder, KIND, findings, findings.model)
