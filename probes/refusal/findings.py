"""The findings of a refusal run, and the files in its folder.

    results.json         `Findings`: everything that tables are made of
    probes.safetensors   one probe per depth (`probes.refusal.linear.probes.Probes`)
    traces.safetensors   `scores`: the last depth's refusal score of every token, one example after the other (fp32);
                         `all`: the same at every depth (fp16, tokens × depths); `ends`: (N, 4) ends of the segments
    heads.safetensors    `exact` and `paper`: (N, layers, heads), NaN where a layer has none; `layer.{l}`: (heads,
                         head_dim) the mean input of the output projection at the last token before the answer
    examples.jsonl       the examples with thinking, response and verdict, in the order of all tensors
    report.html          tables and figures

Findings are of one model: they have the hash of its weights, and an edit of another model rejects them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import model_validator

from probes.data.choices import AttributionForm
from probes.data.records import DataRecord, FindingsRecord, IntervalRecord, ModelRecord, read_record, write_record
from surgery.checkpoint.selectors import Head

KIND = "refusal"
PROBES, TRACES, HEADS = "probes.safetensors", "traces.safetensors", "heads.safetensors"


class ProbeRecord(FindingsRecord):
    """Out-of-fold metrics of the probe of one depth; see `LayerMetrics`."""

    depth: int
    auroc: IntervalRecord
    accuracy: IntervalRecord
    balanced_accuracy: float | None
    ece: float | None
    brier: float | None
    selectivity: float | None


class CliffRecord(FindingsRecord):
    """The mean measures of one cell's cliffs; see `CellCliffs`."""

    cell: str
    n: int
    plateau: IntervalRecord
    p90: IntervalRecord
    last: IntervalRecord
    final: IntervalRecord
    misalignment: IntervalRecord
    onset: float | None


class HeadRecord(FindingsRecord):
    """A head's mean attribution over the examples that heads were scored on, with a bootstrap interval.

    exact: in units of the probe's logit. paper: along the unit probe direction, norm not folded in.
    """

    layer: int
    head: int
    exact: IntervalRecord | None
    paper: IntervalRecord

    @property
    def name(self) -> Head:
        return Head(self.layer, self.head)


class GreedyStepRecord(FindingsRecord):
    """What ablating a set of heads does to the probe's score, to answers, and to harmless text.

    score: mean p(refused) at the last token before the answer. refusal, harmless_refusal: shares of answers that
    refuse. kl: on harmless answers, in nats per token. None where it was not measured.
    """

    heads: list[str]
    score: IntervalRecord
    refusal: IntervalRecord | None = None
    harmless_refusal: IntervalRecord | None = None
    kl: IntervalRecord | None = None
    perplexity: float | None = None


class EffectRecord(FindingsRecord):
    """One head's causal effect on the probe's logit."""

    layer: int
    head: int
    effect: IntervalRecord


class CausalRecord(FindingsRecord):
    """What `prove_heads` measured: single heads, greedy sets, and random sets of the same sizes as the control.

    effects: of single heads. spearman: rank correlation of attribution and effect. base: without ablation.
    steps: greedy sets of 1, 2, … heads. stopped: why no larger set was tried.
    """

    ablation: str
    positions: str
    method: str
    cell: str
    n: int
    effects: list[EffectRecord]
    spearman: IntervalRecord
    candidates: list[str]
    base: GreedyStepRecord
    steps: list[GreedyStepRecord]
    stopped: str
    control: list[list[GreedyStepRecord]]
    kl_budget: float

    @model_validator(mode="after")
    def _every_set_has_heads(self) -> CausalRecord:
        if not all(step.heads for step in self.steps):
            raise ValueError("heads in each of the greedy sets")
        return self


class Findings(FindingsRecord):
    """All findings of a run. `settings` are the options it ran with; `causal` is added by `prove_heads`."""

    model: ModelRecord
    data: DataRecord
    settings: dict[str, Any]
    markers: dict[str, str] | None
    cells: dict[str, int]
    never_closed: int
    generated: int
    warnings: list[str]
    folds: int
    probes: list[ProbeRecord]
    transfer: list[ProbeRecord] | None
    transfer_data: DataRecord | None
    depth: int
    cliffs: list[CliffRecord]
    onset_cell: str | None
    heads_cell: str
    heads_n: int
    heads: list[HeadRecord]
    attribution: AttributionForm
    unexplained: float | None
    skipped_layers: list[int]
    causal: CausalRecord | None = None

    @property
    def ranked(self) -> list[HeadRecord]:
        """The heads, lowest attribution first: those that most suppress refusal."""
        return sorted(self.heads, key=lambda row: (self.score_of(row), row.name))

    def score_of(self, row: HeadRecord) -> float:
        """Return the attribution that heads are ranked by; below 0 the head writes against refusal."""
        # By the form that the run was asked for, even where the other one was computed too.
        score = self._score(row)
        assert score is not None  # see `_every_head_has_a_score`
        return score

    def _score(self, row: HeadRecord) -> float | None:
        form = row.exact if self.attribution == "exact" else row.paper
        return None if form is None else form.value

    @model_validator(mode="after")
    def _every_head_has_a_score(self) -> Findings:
        if not 0 <= self.depth < len(self.probes):
            raise ValueError(f"a depth of the {len(self.probes)} probes, depth is {self.depth}")
        if self.transfer is not None and len(self.transfer) != len(self.probes):
            raise ValueError(f"as many rows of transfer as probes, {len(self.probes)}")
        for row in self.heads:
            if self._score(row) is None:
                raise ValueError(f"a score by the form {self.attribution} for each head, {row.name} has none")
        return self


def read_findings(run: Path) -> Findings:
    """Read the findings in the folder `run`. Raises SurgeryError if it has none, or those of another kind.

    Example:
        print(read_findings(Path("RUN")).heads[0])
    """
    return read_record(run, KIND, Findings)


def write_findings(folder: Path, findings: Findings) -> None:
    """Write the findings into `folder` atomically."""
    write_record(folder, KIND, findings, findings.model)
