"""Analyse a mixture-of-experts model: count its routing decisions, score its experts, and sweep β over the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from probes.data.preparation import PreparedData
from probes.data.probe_run import ProbeRun
from probes.data.records import interval_record
from probes.data.tokenization import encode_before_answer
from probes.experts.findings import ExpertRecord, SweepRecord
from probes.experts.scoring import ExpertScores, Support, check_markers, score_experts
from probes.experts.sweep import BetaGrid, sweep_beta
from probes.model.expert_norms import norm_ratios
from probes.model.routers import Router, find_routers
from probes.model.routing import Marker, RoutingCounts, count_routing, parse_marker
from probes.side_effects.compare import bare_prompts
from surgery.checkpoint.selectors import Expert
from surgery.errors import usage_error
from surgery.evaluation.statistics import EstimateWithInterval
from surgery.models.choices import SpecialTokens

# Ranked experts whose share of the residual stream is measured: each takes one more run of its layer's experts.
MEASURED_EXPERTS = 10


@dataclass(frozen=True)
class ExpertSettings:
    """How a run is analysed; the fields are those of `probe_experts`."""

    tokens: tuple[str, ...]
    support: Support
    grid: BetaGrid | None
    limit: int | None
    batch_tokens: int | None
    seed: int
    special_tokens: SpecialTokens = "text"


@dataclass(frozen=True, eq=False)
class ScoredData:
    """A data set with its examples, the routing decisions counted on them, and every expert's scores, best first."""

    prepared: PreparedData
    counts: RoutingCounts
    scores: Sequence[ExpertScores]


@dataclass(frozen=True, eq=False)
class ExpertAnalysis:
    """What one run measured, before it is turned into findings.

    first, second: the data set, and the transfer data set if there is one.
    experts: a record for every expert, best first.
    """

    run: ProbeRun
    settings: ExpertSettings
    markers: Sequence[Marker]
    first: ScoredData
    second: ScoredData | None
    experts: Sequence[ExpertRecord]
    sweep: SweepRecord | None

    @property
    def ranked(self) -> list[ExpertRecord]:
        """The experts with support, best first."""
        return [row for row in self.experts if row.rank is not None]


def analyse(run: ProbeRun, settings: ExpertSettings) -> ExpertAnalysis:
    """Score the experts on the run's data sets, and sweep β if `settings` has a grid.

    Raises:
        SurgeryError: as `probe_experts`.
    """
    return _Analyser(run, settings).analyse()


@dataclass(frozen=True)
class _Analyser:
    """The steps of `analyse`, which share the run, its settings, routers and markers."""

    run: ProbeRun
    settings: ExpertSettings

    @cached_property
    def routers(self) -> Sequence[Router]:
        return find_routers(self.run.live)

    @cached_property
    def markers(self) -> Sequence[Marker]:
        return _parse_markers(self.settings.tokens, self.run.live.tokenizer)

    def analyse(self) -> ExpertAnalysis:
        # Both before the data are completed: a dense model or a misspelt marker must not cost hours of generation.
        _, markers = self.routers, self.markers
        first = self._score(self.run.prepare())
        transfer = self.run.prepare_transfer()
        second = None if transfer is None else self._score(transfer)
        # Ratios and sweep use the first data set alone; the second only tests the ranking.
        experts = self._with_norm_ratios(_expert_records(first), first)
        sweep = None if self.settings.grid is None else self._sweep(self.settings.grid, experts, first)
        return ExpertAnalysis(self.run, self.settings, markers, first, second, experts, sweep)

    def _score(self, prepared: PreparedData) -> ScoredData:
        counts = count_routing(
            self.run.live,
            self.routers,
            prepared.sequences,
            self.markers,
            max_tokens=self.settings.batch_tokens,
            progress=self.run.options.progress,
        )
        scores = score_experts(counts, self.markers, support=self.settings.support, seed=self.settings.seed)
        return ScoredData(prepared, counts, scores)

    def _with_norm_ratios(self, experts: list[ExpertRecord], data: ScoredData) -> list[ExpertRecord]:
        best: list[Expert] = [row.name for row in experts if row.rank is not None][:MEASURED_EXPERTS]
        if not best:
            return experts
        ratios = norm_ratios(
            self.run.live,
            self.routers,
            data.prepared.sequences,
            best,
            max_tokens=self.settings.batch_tokens,
            progress=self.run.options.progress,
        )
        # The others keep None: "not measured" must not look like "adds nothing".
        return [row.model_copy(update={"norm_ratio": ratios.get(row.name)}) for row in experts]

    def _sweep(self, grid: BetaGrid, experts: Sequence[ExpertRecord], data: ScoredData) -> SweepRecord:
        return sweep_beta(
            self.run.live,
            self.routers,
            [row for row in experts if row.rank is not None],
            experts,
            _bare_prompts(self.run.live.tokenizer, data.prepared),
            grid,
            max_new_tokens=self.run.generation.max_new_tokens,
            progress=self.run.options.progress,
        )


def _parse_markers(tokens: Sequence[str], tokenizer: Any) -> list[Marker]:
    markers = [parse_marker(token, tokenizer) for token in tokens]
    texts = [marker.text for marker in markers]
    if repeated := [text for index, text in enumerate(texts) if text in texts[:index]]:
        raise usage_error(f"{repeated[0]!r} is given twice", where="--token")
    check_markers(markers)
    return markers


def _expert_records(data: ScoredData) -> list[ExpertRecord]:
    # Column 0 counts all positions; those of the markers are among them.
    total = int(data.counts.positions[..., 0].sum())
    return [
        ExpertRecord(
            layer=row.layer,
            expert=row.expert,
            npmi=row.npmi,
            by_marker=list(row.by_marker),
            smoothed=interval_record(EstimateWithInterval(row.smoothed, row.low, row.high)),
            difference=row.difference,
            fires=row.fires,
            at_marker=row.at_marker,
            rate=row.fires / total,
            q=row.q,
            rank=row.rank,
            rank_low=row.rank_low,
            rank_high=row.rank_high,
            published_rank=row.published_rank,
            why=row.why,
        )
        for row in data.scores
    ]


def _bare_prompts(tokenizer: Any, prepared: PreparedData) -> list[tuple[int, ...]]:
    """Return each prompt once, as ids, without thinking and response."""
    bare = bare_prompts(prepared.examples, len(prepared.examples), any_topic=True)
    return [encode_before_answer(tokenizer, example, prepared.markers)[1] for example in bare]
