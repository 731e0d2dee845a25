"""Turn the analysis of a run into findings, and write the run's folder.

Which file holds what is described in `probes.refusal.findings`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from probes.data.preparation import data_record, model_record
from probes.data.records import interval_record, special_tokens_record, write_examples
from probes.refusal import cliffs as cliff_measures
from probes.refusal.analysis import RefusalAnalysis
from probes.refusal.findings import (
    HEADS,
    PROBES,
    TRACES,
    CliffRecord,
    Findings,
    HeadRecord,
    ProbeRecord,
    write_findings,
)
from probes.refusal.fitted_probes import PAPER_CELLS
from probes.refusal.heads.attribution import HeadAttribution
from probes.refusal.linear.probes import LayerMetrics
from probes.refusal.linear.training import find_confounds
from surgery.errors import SurgeryError
from surgery.evaluation.statistics import EstimateWithInterval, bootstrap_mean
from surgery.io.json_io import jsonable
from surgery.io.output_files import use_new_file_mode
from surgery.models.loaded_model import LoadedModel

# The parts of the probe's logit must sum to it within this share of its size, by the dtype of the model. In half
# precision every layer rounds its sum to 8 or 11 bits, and the parts are computed in fp32.
UNEXPLAINED = {torch.float32: 1e-3, torch.float64: 1e-6}
UNEXPLAINED_HALF = 0.1


def to_findings(analysis: RefusalAnalysis) -> Findings:
    """Return the findings of an analysis.

    Raises:
        SurgeryError: the parts of the probe's logit do not sum to it.
    """
    run, prepared, settings, cell = analysis.run, analysis.prepared, analysis.settings, analysis.cell
    exact = settings.attribution == "exact"
    # A cell where no score falls has no onset to report.
    with_onset = any(cliff.cell == cell and cliff.onset is not None for cliff in analysis.cliffs)
    metrics, transfer_metrics = analysis.fitted.probes.metrics, analysis.transfer_metrics
    return Findings(
        model=model_record(run.live, run.weights_hash),
        data=data_record(run.data),
        settings=_settings_record(analysis),
        markers=None if prepared.markers is None else {k: str(v) for k, v in asdict(prepared.markers).items()},
        cells=dict(cliff_measures.count_cells([example.cell for example in prepared.examples])),
        never_closed=len(prepared.unfinished),
        generated=prepared.generated,
        warnings=_warnings(analysis),
        folds=analysis.fitted.probes.folds,
        probes=_probe_records(metrics),
        transfer=None if transfer_metrics is None else _probe_records(transfer_metrics),
        transfer_data=None if run.transfer is None else data_record(run.transfer),
        depth=analysis.depth,
        cliffs=_cliff_records(analysis.cliffs),
        onset_cell=cell if with_onset else None,
        heads_cell=cell,
        heads_n=len(analysis.scored),
        heads=_head_records(analysis.heads, [example.group for example in analysis.scored]),
        attribution=settings.attribution,
        unexplained=_unexplained_share(run.live, analysis.heads) if exact else None,
        skipped_layers=list(run.live.skipped),
    )


def write_run(folder: Path, findings: Findings, analysis: RefusalAnalysis) -> None:
    """Write all files of a run into `folder`: tensors, examples, results.json and the report."""
    # Matplotlib is slow to import, and only the process that writes needs it.
    from probes.refusal.report import write_report

    analysis.fitted.probes.save(folder / PROBES)
    _save_traces(folder / TRACES, analysis)
    _save_heads(folder / HEADS, analysis.run.live, analysis.heads)
    write_examples(folder, analysis.prepared.examples)
    write_findings(folder, findings)
    write_report(folder, name=str(analysis.run.out))


def _unexplained_share(live: LoadedModel, heads: HeadAttribution) -> float:
    """The part of the probe's logit that its parts leave unexplained, as a share of the size of those parts."""
    # Not of the logit alone, which is small where large parts cancel.
    size = max(float(heads.logit.abs().max()), float((heads.embedding.abs() + heads.blocks.abs().sum(1)).max()), 1e-9)
    share = float((heads.total - heads.logit).abs().max()) / size
    allowed = UNEXPLAINED.get(live.model.dtype, UNEXPLAINED_HALF)
    if share > allowed:
        raise SurgeryError(
            f"the parts of the probe's logit do not sum to it: {share:.1%} of it is left over, expected at most "
            f"{allowed:.1%}",
            where=live.name,
            hint="Compute in --dtype float32, or use --attribution paper.",
        )
    return share


def _head_records(heads: HeadAttribution, groups: Sequence[str]) -> list[HeadRecord]:
    records = []
    for layer, paper in sorted(heads.paper.items()):
        # Layer by layer, for layers may have different numbers of heads.
        exact = heads.exact.get(layer)
        paper_band = bootstrap_mean(paper.numpy(), groups=groups)
        exact_band = None if exact is None else bootstrap_mean(exact.numpy(), groups=groups)
        n = len(paper)
        records += [
            HeadRecord(
                layer=layer,
                head=head,
                exact=None if exact_band is None else interval_record(exact_band.at(head), n),
                paper=interval_record(paper_band.at(head), n),
            )
            for head in range(paper.shape[1])
        ]
    return records


def _probe_records(metrics: Sequence[LayerMetrics]) -> list[ProbeRecord]:
    return [
        ProbeRecord(
            depth=depth,
            auroc=interval_record(m.auroc_interval),
            accuracy=interval_record(EstimateWithInterval(m.accuracy, m.accuracy_low, m.accuracy_high)),
            balanced_accuracy=m.balanced_accuracy,
            ece=m.ece,
            brier=m.brier,
            selectivity=m.selectivity,
        )
        for depth, m in enumerate(metrics)
    ]


def _cliff_records(cliffs: Sequence[cliff_measures.RefusalCliff]) -> list[CliffRecord]:
    return [
        CliffRecord(
            cell=cell,
            n=row.n,
            onset=row.onset,
            **{name: interval_record(getattr(row, name), row.n) for name in cliff_measures.MEASURES},
        )
        for cell, row in cliff_measures.mean_cliffs(cliffs).items()
    ]


def _warnings(analysis: RefusalAnalysis) -> list[str]:
    all_cells = analysis.settings.training.cells == "all"
    cells = [e.cell for e in analysis.prepared.examples if all_cells or e.cell in PAPER_CELLS]
    probes = analysis.fitted.probes
    warnings = [*find_confounds(cells), *probes.notes]
    last = probes.metrics[-1]
    # `not >` and not `<=`: a bound that is NaN is no evidence either.
    if not last.auroc_low > 0.5:
        warnings.append(
            f"The probe after the final norm is no better than chance on examples that it was not fitted to (AUROC "
            f"{last.auroc:.3f} [{last.auroc_low:.3f}, {last.auroc_high:.3f}]): its cliffs and heads mean nothing."
        )
    for prepared, name in ((analysis.prepared, "examples"), (analysis.transfer, "examples of the second data set")):
        if prepared is not None and prepared.unfinished:
            warnings.append(
                f"{len(prepared.unfinished)} {name} were left out: their thinking never closed. Raise --max-new-tokens."
            )
    return warnings


def _settings_record(analysis: RefusalAnalysis) -> dict[str, Any]:
    settings = analysis.settings
    return {
        "asking": jsonable(asdict(analysis.run.generation)),
        "training": asdict(settings.training),
        "attribution": settings.attribution,
        "limit": settings.limit,
        **special_tokens_record(settings.special_tokens),
    }


def _save_traces(path: Path, analysis: RefusalAnalysis) -> None:
    traces = analysis.traces
    tensors = {
        "scores": torch.cat([trace[:, analysis.depth] for trace in traces]).contiguous(),
        # fp16: tokens × depths is the largest tensor of a run, and nothing is computed from it.
        "all": torch.cat(list(traces)).half().contiguous(),
        "ends": torch.tensor([list(sequence.ends) for sequence in analysis.prepared.sequences]),
    }
    save_file(tensors, path)
    use_new_file_mode(path)  # safetensors makes files that only their owner can read


def _save_heads(path: Path, live: LoadedModel, heads: HeadAttribution) -> None:
    # Layers may have different numbers of heads, or none: NaN fills the table where there is no head.
    widest = max((p.n_heads for p in live.projections.values()), default=0)
    count = len(heads.logit)
    tensors: dict[str, Tensor] = {}
    for name, scores in (("exact", heads.exact), ("paper", heads.paper)):
        table = torch.full((count, len(live.layers), widest), float("nan"))
        for layer, values in scores.items():
            table[:, layer, : values.shape[1]] = values
        tensors[name] = table
    for layer, inputs in heads.inputs.items():
        projection = live.projections[layer]
        tensors[f"layer.{layer}"] = inputs.mean(0).view(projection.n_heads, projection.head_dim).contiguous()
    save_file(tensors, path)
    use_new_file_mode(path)  # safetensors makes files that only their owner can read
