"""What probing a model's experts found, as a folder: RUN/results.json, the examples, the report.

    results.json    `ExpertFindings`; `experts` holds every expert, best first
    examples.jsonl  the texts that were counted on
    report.html     tables and pictures

Findings are of one model: its weights' hash is among them, and an edit of another model refuses them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from probes.data.records import DataRecord, FindingsRecord, IntervalRecord, ModelRecord, read_record, write_record
from surgery.checkpoint.selectors import Expert

KIND = "experts"


class MarkerRecord(FindingsRecord):
    """A marker: its weight in the total, and at how many positions it ends."""

    text: str
    weight: float
    positions: int


class ExpertRecord(FindingsRecord):
    """One expert. npmi: the published total, unsmoothed; by_marker: the same per marker, unweighted.

    smoothed: the total with smoothing, and its interval, by which the supported are ranked. difference: Σ of weight ×
    (share of the marker's positions at which it fires, less that of all others). fires, at_marker: positions. rate: the
    share of all positions at which it fires. q: the share of false discoveries. rank: None where it lacks support, and
    `why` says of what. norm_ratio: ‖what it adds‖ ÷ ‖the layer's input‖ where it fires; of ranked experts only.
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
    """Scores at one β. control: None for the chosen experts, else the number of the random set that stood in.

    part: `choice`, on which β was chosen, or `test`. collapsed: the share of answers that end in a loop.
    """

    beta: float
    experts: list[str]
    control: int | None
    part: str
    scores: dict[str, IntervalRecord]
    collapsed: IntervalRecord | None


class SweepRecord(FindingsRecord):
    """A grid of β with held-out choice; `best` was chosen on one half of each task and tested on the other."""

    tasks: list[str]
    experts: list[str]
    way: str
    phase: str
    points: list[PointRecord]
    best: float


class OverlapRecord(FindingsRecord):
    """How much the ranking agrees with that on a second data set."""

    data: DataRecord
    top: int
    shared: list[str]
    jaccard: float
    spearman: IntervalRecord


class ExpertFindings(FindingsRecord):
    """Everything that one run found. top_k: experts per token, by layer."""

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

    @property
    def ranked(self) -> list[ExpertRecord]:
        """Those with support, best first."""
        return [row for row in self.experts if row.rank is not None]


def read_expert_findings(run: Path) -> ExpertFindings:
    """The findings in the folder `run`. Raises SurgeryError where it holds none, or something else."""
    return read_record(run, KIND, ExpertFindings)


def write_expert_findings(folder: Path, findings: ExpertFindings) -> None:
    """Writes them into `folder`, whole or not at all."""
    write_record(folder, KIND, findings, findings.model)
