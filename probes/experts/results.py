"""Turn the analysis of a model's experts into findings, and write the run's folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from probes.data.examples import DataSet
from probes.data.preparation import data_record, model_record
from probes.data.records import interval_record, special_tokens_record, write_examples
from probes.experts.analysis import ExpertAnalysis, ScoredData
from probes.experts.findings import ExpertFindings, MarkerRecord, OverlapRecord, write_expert_findings
from probes.experts.report import write_expert_report
from probes.experts.scoring import ranking_overlap
from probes.model.routing import PARTS
from surgery.io.json_io import jsonable

COMPARED_EXPERTS = 10  # at the top of the rankings of two data sets


def to_findings(analysis: ExpertAnalysis) -> ExpertFindings:
    """Return the findings as they are written to results.json."""
    run, counts, prepared = analysis.run, analysis.first.counts, analysis.first.prepared
    return ExpertFindings(
        model=model_record(run.live, run.weights_hash),
        data=data_record(run.data),
        settings=_settings(analysis),
        # Column 0 of the counts is all positions; the markers' follow in their order.
        markers=[
            MarkerRecord(text=m.text, weight=m.weight, positions=int(counts.positions[..., column].sum()))
            for column, m in enumerate(analysis.markers, start=1)
        ],
        positions=int(counts.positions[..., 0].sum()),
        by_part={part: int(counts.positions[:, index, 0].sum()) for index, part in enumerate(PARTS)},
        sequences=counts.sequences,
        generated=prepared.generated,
        layers=list(counts.layers),
        n_experts=list(counts.experts),
        top_k=list(counts.top_k),
        warnings=_warnings(analysis),
        experts=list(analysis.experts),
        overlap=_overlap(analysis.run.transfer, analysis.first, analysis.second),
        sweep=analysis.sweep,
    )


def write_run(folder: Path, findings: ExpertFindings, analysis: ExpertAnalysis) -> None:
    """Write results.json, the examples and the report into `folder`."""
    write_examples(folder, analysis.first.prepared.examples)
    write_expert_findings(folder, findings)
    write_expert_report(folder, name=str(analysis.run.out))


def _warnings(analysis: ExpertAnalysis) -> list[str]:
    warnings = []
    unfinished = analysis.first.prepared.unfinished
    if unfinished:
        warnings.append(
            f"{len(unfinished)} examples were left out: their thinking never closed. Raise --max-new-tokens."
        )
    for column, marker in enumerate(analysis.markers, start=1):
        # Templates write <think> themselves: such a marker is no decision of the model.
        by_part = analysis.first.counts.positions[..., column].sum(0)
        if int(by_part[PARTS.index("prompt")]) == int(by_part.sum()):
            warnings.append(
                f"Every {marker.text!r} stands in the prompt, where the template puts it: experts that fire there may "
                "go with the template, not with thinking."
            )
    if not analysis.ranked:
        warnings.append("No expert has evidence enough to be ranked; the published scores alone say little.")
    return warnings


def _overlap(transfer: DataSet | None, first: ScoredData, second: ScoredData | None) -> OverlapRecord | None:
    if transfer is None or second is None:
        return None
    overlap = ranking_overlap(first.scores, second.scores, COMPARED_EXPERTS)
    return OverlapRecord(
        data=data_record(transfer),
        top=overlap.top,
        shared=[str(expert) for expert in overlap.shared],
        jaccard=overlap.jaccard,
        spearman=interval_record(overlap.spearman),
    )


def _settings(analysis: ExpertAnalysis) -> dict[str, Any]:
    settings = analysis.settings
    record = jsonable(
        {
            "tokens": list(settings.tokens),
            "asking": asdict(analysis.run.generation),
            "support": asdict(settings.support),
            "grid": None if settings.grid is None else asdict(settings.grid),
            "limit": settings.limit,
            "seed": settings.seed,
            **special_tokens_record(settings.special_tokens),
        }
    )
    assert isinstance(record, dict)
    return record
