"""One run from a model and data to findings: probes trained, every token traced, cliffs measured, heads scored.

After arXiv 2510.06036. Deviations, all towards telling what is there: features are standardised and all four cells of
topic and verdict are used and weighted alike (`cells="paper"` takes the paper's two); metrics, traces and cliffs of an
example come from the probe that did not see its group; heads are scored with the final norm folded in
(`attribution="paper"` does without).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from probes.data.examples import DataSet, Example, TokenSequence
from probes.data.prepare import (
    CACHES,
    GenerationOptions,
    Prepared,
    data_record,
    model_record,
    open_model,
    phrases_of,
    prepare,
    run_folder,
)
from probes.data.read import read_data
from probes.data.records import interval, write_examples
from probes.model.residual_stream import trace_residual_stream
from probes.refusal import cliffs as cliff_measures
from probes.refusal.cross_validated import PAPER_CELLS, ProbeTraining, fit_probes, trace, transfer_to
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
from probes.refusal.head_attribution import HeadAttribution, attribute_heads
from probes.refusal.probe import LayerMetrics, Probes
from probes.refusal.train_probes import confounds
from surgery.engine.options import ExecutionOptions
from surgery.engine.verification import weights_hash
from surgery.errors import SurgeryError, usage_error
from surgery.evaluation.statistics import EstimateWithInterval, bootstrap_mean
from surgery.io.atomic import check_free, partial_path
from surgery.io.json_io import jsonable
from surgery.models.loaded_model import LoadedModel
from surgery.runtime.collectives import barrier
from surgery.runtime.environment import is_main

Form = Literal["exact", "paper"]
MEASURES = ("plateau", "p90", "last", "final", "misalignment")
READABLE = 0o644  # safetensors makes files for their owner alone
# Heads are scored where suppression shows: on harmful prompts that were answered, if there are at least so many.
LEAST_SCORED = 3
SCORED_ON = ("harmful/complied", "harmful/refused", "unknown/complied", "unknown/refused", "harmless/complied")
# The parts of the probe's logit must sum to it within this share of its range, by the dtype of the model.
UNEXPLAINED = {torch.float32: 1e-3, torch.float64: 1e-6}
UNEXPLAINED_HALF = 0.1


def probe_refusal(
    model: str,
    data: str,
    out: Path,
    *,
    transfer: str | None = None,
    asking: GenerationOptions = GenerationOptions(),
    training: ProbeTraining = ProbeTraining(),
    attribution: Form = "exact",
    limit: int | None = None,
    dtype: str = "auto",
    batch_tokens: int | None = None,
    options: ExecutionOptions = ExecutionOptions(),
) -> Findings:
    """Probes `model` on `data` and writes what it finds to the folder `out`.

    Args:
        data: a file, a Hub data set, or lab:NAME; see `prompts.read_data`.
        transfer: a second data set that the probes are tested on.
        attribution: exact folds the norms in, so that all parts sum to the probe's logit; paper does not.
        limit: only the first examples of each data set.
        dtype: that the model computes in; auto is the one it is stored in.
        batch_tokens: tokens of a batch; None tries what fits.

    Raises:
        SurgeryError: as `prompts.read_data`, `preparing.prepare`, `linear.train_probes`, `residual.read_stream`.
    """
    check_free(out, overwrite=options.overwrite)
    if not 0 < training.strength < math.inf:
        raise usage_error(f"got {training.strength:g}, expected a positive number", where="--strength")
    if asking.phrases is not None:
        # The run keeps the phrases: what is judged later must not depend on what has become of their file.
        asking = replace(asking, phrases=tuple(phrases_of(asking)))
    dataset = read_data(data, limit=limit)
    other = None if transfer is None else read_data(transfer, limit=limit)
    live = open_model(model, device=options.device, dtype=dtype)
    identity = weights_hash(live.checkpoint, options=options)
    partial = partial_path(out)
    model_id = f"{identity} {live.model.dtype}"

    def ready(rows: DataSet, name: str) -> Prepared:
        return prepare(
            live,
            rows,
            asking,
            model_id=model_id,
            cache=partial / name,
            device=options.device,
            progress=options.progress,
        )

    prepared = ready(dataset, CACHES[0])
    examples, sequences = prepared.examples, prepared.sequences
    trained = fit_probes(live, examples, sequences, training, max_tokens=batch_tokens, progress=options.progress)
    probes = trained.probes
    second = None if other is None else ready(other, CACHES[1])
    transferred = None
    if second is not None:
        transferred = transfer_to(
            live, second.examples, second.sequences, trained, max_tokens=batch_tokens, progress=options.progress
        )
    depth = live.n_depths - 1
    traces = trace(live, sequences, trained, max_tokens=batch_tokens, progress=options.progress)
    cliffs = [
        cliff_measures.measure(sequence, scores[:, depth].numpy(), cell=example.cell, group=example.group)
        for example, sequence, scores in zip(examples, sequences, traces, strict=True)
    ]
    cell = _scored_cell(examples)
    scored = [sequence for example, sequence in zip(examples, sequences, strict=True) if example.cell == cell]
    groups = [example.group for example in examples if example.cell == cell]
    stream = trace_residual_stream(live) if attribution == "exact" else None
    found = attribute_heads(
        live,
        scored,
        probes.weights[depth],
        float(probes.biases[depth]),
        stream=stream,
        max_tokens=batch_tokens,
        progress=options.progress,
    )
    findings = Findings(
        model=model_record(live, identity),
        data=data_record(dataset),
        settings=_settings(asking, training, attribution, limit),
        markers=None if prepared.markers is None else {k: str(v) for k, v in asdict(prepared.markers).items()},
        cells=dict(cliff_measures.counts([example.cell for example in examples])),
        never_closed=len(prepared.lost),
        generated=prepared.generated,
        warnings=_warnings(prepared, second, probes, training),
        folds=probes.folds,
        probes=_probe_records(probes.metrics),
        transfer=None if transferred is None else _probe_records(transferred),
        transfer_data=None if other is None else data_record(other),
        depth=depth,
        cliffs=_cliff_records(cliffs),
        onset_cell=cell if any(cliff.cell == cell and cliff.onset is not None for cliff in cliffs) else None,
        heads_cell=cell,
        heads_n=len(scored),
        heads=_head_records(found, groups),
        attribution=attribution,
        unexplained=_unexplained(live, found) if attribution == "exact" else None,
        skipped_layers=list(live.skipped),
    )
    if is_main():
        from probes.refusal.report import write_report

        with run_folder(out, overwrite=options.overwrite) as folder:
            probes.save(folder / PROBES)
            _save_traces(folder / TRACES, sequences, traces, depth)
            _save_heads(folder / HEADS, live, found)
            write_examples(folder, examples)
            write_findings(folder, findings)
            write_report(folder, name=str(out))
    barrier()
    return findings


def _scored_cell(examples: Sequence[Example]) -> str:
    counts = cliff_measures.counts([example.cell for example in examples])
    return next(
        (cell for cell in SCORED_ON if counts.get(cell, 0) >= LEAST_SCORED), max(counts, key=lambda c: counts[c])
    )


def _unexplained(live: LoadedModel, found: HeadAttribution) -> float:
    """How much of the probe's logit its parts leave unexplained, as a share of the size of those parts."""
    size = max(float(found.logit.abs().max()), float((found.embedding.abs() + found.blocks.abs().sum(1)).max()), 1e-9)
    left = float((found.total - found.logit).abs().max()) / size
    allowed = UNEXPLAINED.get(live.model.dtype, UNEXPLAINED_HALF)
    if left > allowed:
        raise SurgeryError(
            f"the parts of the probe's logit do not sum to it: {left:.1%} of it is left over, expected at most "
            f"{allowed:.1%}",
            where=live.name,
            hint="Compute in --dtype float32, or use --attribution paper.",
        )
    return left


def _head_records(found: HeadAttribution, groups: Sequence[str]) -> list[HeadRecord]:
    records = []
    for layer, paper in sorted(found.paper.items()):
        exact = found.exact.get(layer)
        paper_band = bootstrap_mean(paper.numpy(), groups=groups)
        exact_band = None if exact is None else bootstrap_mean(exact.numpy(), groups=groups)
        for head in range(paper.shape[1]):
            columns = [
                None
                if band is None
                else interval(EstimateWithInterval(band.mean[head], band.low[head], band.high[head]), len(paper))
                for band in (exact_band, paper_band)
            ]
            assert columns[1] is not None
            records.append(HeadRecord(layer=layer, head=head, exact=columns[0], paper=columns[1]))
    return records


def _probe_records(metrics: Sequence[LayerMetrics]) -> list[ProbeRecord]:
    return [
        ProbeRecord(
            depth=depth,
            auroc=interval(EstimateWithInterval(m.auroc, m.auroc_low, m.auroc_high)),
            accuracy=interval(EstimateWithInterval(m.accuracy, m.accuracy_low, m.accuracy_high)),
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
            **{name: interval(getattr(row, name), row.n) for name in MEASURES},
        )
        for cell, row in cliff_measures.by_cell(cliffs).items()
    ]


def _warnings(prepared: Prepared, second: Prepared | None, probes: Probes, training: ProbeTraining) -> list[str]:
    cells = [e.cell for e in prepared.examples if training.cells == "all" or e.cell in PAPER_CELLS]
    found = [*confounds(cells), *probes.notes]
    last = probes.metrics[-1]
    if not last.auroc_low > 0.5:
        found.append(
            f"The probe after the final norm is no better than chance on examples that it was not fitted to (AUROC "
            f"{last.auroc:.3f} [{last.auroc_low:.3f}, {last.auroc_high:.3f}]): its cliffs and heads mean nothing."
        )
    for part, name in ((prepared, "examples"), (second, "examples of the second data set")):
        if part is not None and part.lost:
            found.append(f"{len(part.lost)} {name} were left out: their thinking never closed. Raise --max-new-tokens.")
    return found


def _settings(
    asking: GenerationOptions, training: ProbeTraining, attribution: Form, limit: int | None
) -> dict[str, Any]:
    return {
        "asking": jsonable(asdict(asking)),
        "training": asdict(training),
        "attribution": attribution,
        "limit": limit,
    }


def _save_traces(path: Path, sequences: Sequence[TokenSequence], traces: Sequence[Tensor], depth: int) -> None:
    save_file(
        {
            "scores": torch.cat([trace[:, depth] for trace in traces]).contiguous(),
            "all": torch.cat(list(traces)).half().contiguous(),
            "ends": torch.tensor([list(sequence.ends) for sequence in sequences]),
        },
        path,
    )
    path.chmod(READABLE)


def _save_heads(path: Path, live: LoadedModel, found: HeadAttribution) -> None:
    widest = max((p.n_heads for p in live.projections.values()), default=0)
    count = len(found.logit)
    tensors: dict[str, Tensor] = {}
    for name, scores in (("exact", found.exact), ("paper", found.paper)):
        table = torch.full((count, len(live.layers), widest), float("nan"))
        for layer, values in scores.items():
            table[:, layer, : values.shape[1]] = values
        tensors[name] = table
    for layer, inputs in found.inputs.items():
        projection = live.projections[layer]
        tensors[f"layer.{layer}"] = inputs.mean(0).view(projection.n_heads, projection.head_dim).contiguous()
    save_file(tensors, path)
    path.chmod(READABLE)
