"""One run from a mixture-of-experts model and texts to its cognitive experts (arXiv 2505.14681): routing counted,
experts scored by nPMI at the markers of thinking, and, if asked, a grid of β tried with controls.

Deviations from the paper: experts need support, and are ranked by the smoothed score with intervals and a
false-discovery rate; the published score is the field `npmi`, and its rank stands beside ours. β is chosen on one half
of a task and tested on the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from probes.data.examples import DataSet
from probes.data.preparation import (
    CACHES,
    GenerationOptions,
    PreparedData,
    data_record,
    model_record,
    open_model,
    prepare,
    run_folder,
)
from probes.data.reader import read_data
from probes.data.records import interval_record, write_examples
from probes.data.tokenization import encode, render_prompt
from probes.experts.findings import (
    ExpertFindings,
    ExpertRecord,
    MarkerRecord,
    OverlapRecord,
    write_expert_findings,
)
from probes.experts.npmi import ExpertScores, Support, check_markers, ranking_overlap, score_experts
from probes.experts.report import write_expert_report
from probes.experts.sweep import BetaGrid, check_tasks, sweep_beta
from probes.model.expert_norms import norm_ratios
from probes.model.routers import Router, find_routers
from probes.model.routing import PARTS, Marker, RoutingCounts, count_routing, parse_marker
from probes.side_effects.compare import prompts_of
from surgery.engine.options import ExecutionOptions
from surgery.engine.verification import weights_hash
from surgery.errors import usage_error
from surgery.evaluation.statistics import EstimateWithInterval
from surgery.io.atomic import check_free, partial_path
from surgery.io.json_io import jsonable
from surgery.models.loaded_model import LoadedModel
from surgery.runtime.collectives import barrier
from surgery.runtime.environment import is_main

MEASURED = 10  # of the ranked experts, whose share of the residual stream is measured
COMPARED = 10  # experts at the top of two data sets


def probe_experts(
    model: str,
    data: str,
    tokens: Sequence[str],
    out: Path,
    *,
    transfer: str | None = None,
    asking: GenerationOptions = GenerationOptions(),
    support: Support = Support(),
    grid: BetaGrid | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    batch_tokens: int | None = None,
    seed: int = 0,
    options: ExecutionOptions = ExecutionOptions(),
) -> ExpertFindings:
    """Finds the experts of `model` that go with `tokens`, and writes what it finds to the folder `out`.

    Args:
        data: texts to count on; what they lack is generated. See `prompts.read_data`.
        tokens: markers with signed weights: `<think>`, `-</think>`, `-0.5*Alternatively`; see `routing.parse_marker`.
        transfer: a second data set, on which the ranking is held against the first.
        grid: β to try on tasks; None leaves that out.

    Raises:
        SurgeryError: the model has no experts; a marker is not in its vocabulary, never occurs, is given twice, or none
            has a weight above 0; as `preparing.prepare` and `expert_sweep.sweep`.
    """
    check_free(out, overwrite=options.overwrite)
    if not tokens:
        raise usage_error("no marker was given.", hint="Add --token '<think>' --token=-'</think>'.")
    if grid is not None:
        check_tasks(grid)
    dataset = read_data(data, limit=limit)
    other = None if transfer is None else read_data(transfer, limit=limit)
    live = open_model(model, device=options.device, dtype=dtype)
    routers = find_routers(live)
    markers = [parse_marker(token, live.tokenizer) for token in tokens]
    if twice := [marker.text for at, marker in enumerate(markers) if marker.text in [m.text for m in markers[:at]]]:
        raise usage_error(f"{twice[0]!r} is given twice", where="--token")
    check_markers(markers)
    identity = weights_hash(live.checkpoint, options=options)
    partial = partial_path(out)
    model_id = f"{identity} {live.model.dtype}"

    def counted(rows: DataSet, name: str) -> tuple[PreparedData, RoutingCounts, list[ExpertScores]]:
        prepared = prepare(
            live,
            rows,
            asking,
            model_id=model_id,
            cache=partial / name,
            device=options.device,
            progress=options.progress,
        )
        counts = count_routing(
            live, routers, prepared.sequences, markers, max_tokens=batch_tokens, progress=options.progress
        )
        return prepared, counts, score_experts(counts, markers, support=support, seed=seed)

    prepared, counts, scored = counted(dataset, CACHES[0])
    second = None if other is None else counted(other, CACHES[1])
    records = _records(live, routers, prepared, counts, scored, batch_tokens, options)
    ranked = [row for row in records if row.rank is not None]
    swept = None
    if grid is not None:
        prompts = _prompts(live, prepared)
        swept = sweep_beta(
            live,
            routers,
            ranked,
            records,
            prompts,
            grid,
            max_new_tokens=asking.max_new_tokens,
            progress=options.progress,
        )
    findings = ExpertFindings(
        model=model_record(live, identity),
        data=data_record(dataset),
        settings=_settings(tokens, asking, support, grid, limit, seed),
        markers=[
            MarkerRecord(text=m.text, weight=m.weight, positions=int(counts.positions[..., at].sum()))
            for at, m in enumerate(markers, start=1)
        ],
        positions=int(counts.positions[..., 0].sum()),
        by_part={part: int(counts.positions[:, at, 0].sum()) for at, part in enumerate(PARTS)},
        sequences=counts.sequences,
        generated=prepared.generated,
        layers=list(counts.layers),
        n_experts=list(counts.experts),
        top_k=list(counts.top_k),
        warnings=_warnings(prepared, counts, markers, ranked),
        experts=records,
        overlap=None if second is None or other is None else _overlap(other, scored, second[2]),
        sweep=swept,
    )
    if is_main():
        with run_folder(out, overwrite=options.overwrite) as folder:
            write_examples(folder, prepared.examples)
            write_expert_findings(folder, findings)
            write_expert_report(folder, name=str(out))
    barrier()
    return findings


def _records(
    live: LoadedModel,
    routers: Sequence[Router],
    prepared: PreparedData,
    counts: RoutingCounts,
    scored: Sequence[ExpertScores],
    batch_tokens: int | None,
    options: ExecutionOptions,
) -> list[ExpertRecord]:
    total = int(counts.positions[..., 0].sum())
    records = [
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
        for row in scored
    ]
    top = [row.name for row in records if row.rank is not None][:MEASURED]
    if not top:
        return records
    ratios = norm_ratios(live, routers, prepared.sequences, top, max_tokens=batch_tokens, progress=options.progress)
    return [row.model_copy(update={"norm_ratio": ratios.get(row.name)}) for row in records]


def _prompts(live: LoadedModel, prepared: PreparedData) -> list[tuple[int, ...]]:
    """Each prompt once, as ids, without what was answered."""
    bare = prompts_of(prepared.examples, len(prepared.examples), any_topic=True)
    return [encode(live.tokenizer, render_prompt(live.tokenizer, example, prepared.markers)) for example in bare]


def _warnings(
    prepared: PreparedData, counts: RoutingCounts, markers: Sequence[Marker], ranked: Sequence[ExpertRecord]
) -> list[str]:
    found = []
    if prepared.lost:
        found.append(
            f"{len(prepared.lost)} examples were left out: their thinking never closed. Raise --max-new-tokens."
        )
    for at, marker in enumerate(markers, start=1):
        here = counts.positions[..., at].sum(0)
        if int(here[0]) == int(here.sum()):
            found.append(
                f"Every {marker.text!r} stands in the prompt, where the template puts it: experts that fire there may "
                "go with the template, not with thinking."
            )
    if not ranked:
        found.append("No expert has evidence enough to be ranked; the published scores alone say little.")
    return found


def _overlap(other: DataSet, first: Sequence[ExpertScores], second: Sequence[ExpertScores]) -> OverlapRecord:
    found = ranking_overlap(first, second, COMPARED)
    return OverlapRecord(
        data=data_record(other),
        top=found.top,
        shared=[str(expert) for expert in found.shared],
        jaccard=found.jaccard,
        spearman=interval_record(found.spearman),
    )


def _settings(
    tokens: Sequence[str],
    asking: GenerationOptions,
    support: Support,
    grid: BetaGrid | None,
    limit: int | None,
    seed: int,
) -> dict[str, Any]:
    settings = {
        "tokens": list(tokens),
        "asking": asdict(asking),
        "support": asdict(support),
        "grid": None if grid is None else asdict(grid),
        "limit": limit,
        "seed": seed,
    }
    plain = jsonable(settings)
    assert isinstance(plain, dict)
    return plain
