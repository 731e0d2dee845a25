"""One run from a model and data to findings: probes trained, every token traced, cliffs measured, heads scored.

After arXiv 2510.06036. Deviations, all towards telling what is there: features are standardised and all four cells of
topic and verdict are used and weighted alike (`cells="paper"` takes the paper's two); measures come from examples that
a probe was not fitted to; heads are scored with the final norm folded in (`attribution="paper"` does without).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from probes import cliffs as cliff_measures
from probes.activations import project, states_at
from probes.examples import DataSet, Example, TokenSequence
from probes.findings import (
    HEADS,
    PROBES,
    TRACES,
    CliffRecord,
    DataRecord,
    Findings,
    HeadRecord,
    ModelRecord,
    ProbeRecord,
    interval,
    write_examples,
    write_findings,
)
from probes.heads import Attribution, attribute
from probes.linear import LayerMetrics, Probes, confounds, evaluate_transfer, train_probes
from probes.live import LiveModel, open_live
from probes.parallel import is_main, wait
from probes.preparing import Asking, Prepared, prepare
from probes.prompts import read_data
from probes.residual import read_stream
from probes.statistics import Estimate, bootstrap_mean
from probes.templates import template_hash, tokenizer_hash
from surgery.checkpoint import Checkpoint
from surgery.commit import check_free, commit, partial_of
from surgery.errors import SurgeryError, usage_error
from surgery.execute import Options
from surgery.identity import weights_hash

Cells = Literal["all", "paper"]
Form = Literal["exact", "paper"]
MEASURES = ("plateau", "p90", "last", "final", "misalignment")
PAPER_CELLS = ("harmful/refused", "harmless/complied")
GENERATIONS = "generations.jsonl"
# Heads are scored where suppression shows: on harmful prompts that were answered, if there are at least so many.
LEAST_SCORED = 3
SCORED_ON = ("harmful/complied", "harmful/refused", "unknown/complied", "unknown/refused", "harmless/complied")
# The parts of the probe's logit must sum to it within this share of its range, by the dtype of the model.
UNEXPLAINED = {torch.float32: 1e-3, torch.float64: 1e-6}
UNEXPLAINED_HALF = 0.1


@dataclass(frozen=True)
class Training:
    """How probes are trained; see `linear.train_probes`. cells: all, or the paper's harmful/refused against
    harmless/complied."""

    cells: Cells = "all"
    folds: int = 5
    strength: float = 1.0
    shuffles: int = 5
    seed: int = 0


def probe_refusal(
    model: str,
    data: str,
    out: Path,
    *,
    transfer: str | None = None,
    asking: Asking = Asking(),
    training: Training = Training(),
    attribution: Form = "exact",
    limit: int | None = None,
    dtype: str = "auto",
    batch_tokens: int | None = None,
    options: Options = Options(),
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
    dataset = read_data(data, limit=limit)
    other = None if transfer is None else read_data(transfer, limit=limit)
    live = open_live(model, device=options.device, dtype=dtype)
    identity = weights_hash(live.checkpoint, options=options)
    partial = partial_of(out)
    if is_main():
        partial.mkdir(parents=True, exist_ok=True)
    wait()
    model_id = f"{identity} {live.model.dtype}"

    def ready(rows: DataSet, name: str) -> Prepared:
        return prepare(
            live, rows, asking, model_id=model_id, cache=partial / name, device=options.device,
            progress=options.progress,
        )  # fmt: skip

    prepared = ready(dataset, GENERATIONS)
    examples, sequences = prepared.examples, prepared.sequences
    probes = _train(live, examples, sequences, training, batch_tokens, options)
    second = None if other is None else ready(other, f"transfer-{GENERATIONS}")
    transferred = None if second is None else _transfer(live, second, probes, training, batch_tokens, options)

    logits = project(live, sequences, probes.weights, probes.biases, max_tokens=batch_tokens, progress=options.progress)
    depth = live.n_depths - 1
    traces = [torch.sigmoid(rows.double()).float() for rows in logits]
    cliffs = [
        cliff_measures.measure(sequence, trace[:, depth].numpy(), cell=example.cell, group=example.group)
        for example, sequence, trace in zip(examples, sequences, traces, strict=True)
    ]
    cell = _scored_cell(examples)
    scored = [sequence for example, sequence in zip(examples, sequences, strict=True) if example.cell == cell]
    groups = [example.group for example in examples if example.cell == cell]
    stream = read_stream(live) if attribution == "exact" else None
    found = attribute(
        live, scored, probes.weights[depth], float(probes.biases[depth]), stream=stream, max_tokens=batch_tokens,
        progress=options.progress,
    )  # fmt: skip
    findings = Findings(
        model=_model_record(live.checkpoint, live, identity),
        data=_data_record(dataset),
        settings=_settings(asking, training, attribution, limit),
        markers=None if prepared.markers is None else {k: str(v) for k, v in asdict(prepared.markers).items()},
        cells=dict(cliff_measures.counts([example.cell for example in examples])),
        never_closed=len(prepared.lost),
        generated=prepared.generated,
        warnings=_warnings(prepared, probes, training),
        folds=probes.folds,
        probes=_probe_records(probes.metrics),
        transfer=None if transferred is None else _probe_records(transferred),
        transfer_data=None if other is None else _data_record(other),
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
        probes.save(partial / PROBES)
        _save_traces(partial / TRACES, sequences, traces, depth)
        _save_heads(partial / HEADS, live, found)
        write_examples(partial, examples)
        write_findings(partial, findings)
        from probes.report import write_report

        write_report(partial, name=str(out))
        for name in (GENERATIONS, f"transfer-{GENERATIONS}"):
            (partial / name).unlink(missing_ok=True)
        commit(partial, out, overwrite=options.overwrite)
    wait()
    return findings


def _train(
    live: LiveModel,
    examples: Sequence[Example],
    sequences: Sequence[TokenSequence],
    training: Training,
    batch_tokens: int | None,
    options: Options,
) -> Probes:
    used = [at for at, example in enumerate(examples) if training.cells == "all" or example.cell in PAPER_CELLS]
    if not used:
        raise usage_error(
            "no example is harmful/refused or harmless/complied", where="--cells paper", hint="Use --cells all."
        )
    states = decision_states(live, [sequences[at] for at in used], batch_tokens, options)
    chosen = [examples[at] for at in used]
    return train_probes(
        states, [bool(e.refused) for e in chosen], groups=[e.group for e in chosen], cells=[e.cell for e in chosen],
        folds=training.folds, C=training.strength, shuffles=training.shuffles, seed=training.seed,
        progress=options.progress,
    )  # fmt: skip


def decision_states(
    live: LiveModel, sequences: Sequence[TokenSequence], batch_tokens: int | None, options: Options
) -> Tensor:
    """(N, depths, D): the states at the last token before the answer."""
    short = [TokenSequence(s.key, s.before_answer, (*s.ends[:3], s.ends[2])) for s in sequences]
    at = [[sequence.decision] for sequence in short]
    return states_at(live, short, at, max_tokens=batch_tokens, progress=options.progress)[:, 0]


def _transfer(
    live: LiveModel,
    second: Prepared,
    probes: Probes,
    training: Training,
    batch_tokens: int | None,
    options: Options,
) -> tuple[LayerMetrics, ...]:
    states = decision_states(live, second.sequences, batch_tokens, options)
    rows = second.examples
    return evaluate_transfer(
        probes, states, [bool(e.refused) for e in rows], groups=[e.group for e in rows], cells=[e.cell for e in rows],
        seed=training.seed,
    )  # fmt: skip


def _scored_cell(examples: Sequence[Example]) -> str:
    counts = cliff_measures.counts([example.cell for example in examples])
    return next(
        (cell for cell in SCORED_ON if counts.get(cell, 0) >= LEAST_SCORED), max(counts, key=lambda c: counts[c])
    )


def _unexplained(live: LiveModel, found: Attribution) -> float:
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


def _head_records(found: Attribution, groups: Sequence[str]) -> list[HeadRecord]:
    records = []
    for layer, paper in sorted(found.paper.items()):
        exact = found.exact.get(layer)
        paper_band = bootstrap_mean(paper.numpy(), groups=groups)
        exact_band = None if exact is None else bootstrap_mean(exact.numpy(), groups=groups)
        for head in range(paper.shape[1]):
            columns = [
                None
                if band is None
                else interval(Estimate(band.mean[head], band.low[head], band.high[head]), len(paper))
                for band in (exact_band, paper_band)
            ]
            assert columns[1] is not None
            records.append(HeadRecord(layer=layer, head=head, exact=columns[0], paper=columns[1]))
    return records


def _probe_records(metrics: Sequence[LayerMetrics]) -> list[ProbeRecord]:
    return [
        ProbeRecord(
            depth=depth,
            auroc=interval(Estimate(m.auroc, m.auroc_low, m.auroc_high)),
            accuracy=interval(Estimate(m.accuracy, m.accuracy_low, m.accuracy_high)),
            balanced_accuracy=m.balanced_accuracy, ece=m.ece, brier=m.brier, selectivity=m.selectivity,
        )
        for depth, m in enumerate(metrics)
    ]  # fmt: skip


def _cliff_records(cliffs: Sequence[cliff_measures.Cliff]) -> list[CliffRecord]:
    return [
        CliffRecord(
            cell=cell, n=row.n, onset=row.onset,
            **{name: interval(getattr(row, name), row.n) for name in MEASURES},
        )
        for cell, row in cliff_measures.by_cell(cliffs).items()
    ]  # fmt: skip


def _warnings(prepared: Prepared, probes: Probes, training: Training) -> list[str]:
    cells = [e.cell for e in prepared.examples if training.cells == "all" or e.cell in PAPER_CELLS]
    found = [*confounds(cells), *probes.notes]
    if prepared.lost:
        found.append(
            f"{len(prepared.lost)} examples were left out: their thinking never closed. Raise --max-new-tokens."
        )
    return found


def _settings(asking: Asking, training: Training, attribution: Form, limit: int | None) -> dict[str, Any]:
    return {
        "asking": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(asking).items()},
        "training": asdict(training),
        "attribution": attribution,
        "limit": limit,
    }


def _model_record(checkpoint: Checkpoint, live: LiveModel, identity: str) -> ModelRecord:
    return ModelRecord(
        ref=checkpoint.ref, repo_id=checkpoint.repo_id, revision=checkpoint.revision, xxh3=identity,
        tokenizer=tokenizer_hash(live.tokenizer), template=template_hash(live.tokenizer),
        dtype=str(live.model.dtype).removeprefix("torch."),
    )  # fmt: skip


def _data_record(data: DataSet) -> DataRecord:
    return DataRecord(ref=data.ref, revision=data.revision, xxh3=data.digest)


def _save_traces(path: Path, sequences: Sequence[TokenSequence], traces: Sequence[Tensor], depth: int) -> None:
    save_file(
        {
            "scores": torch.cat([trace[:, depth] for trace in traces]).contiguous(),
            "all": torch.cat(list(traces)).half().contiguous(),
            "ends": torch.tensor([list(sequence.ends) for sequence in sequences]),
        },
        path,
    )


def _save_heads(path: Path, live: LiveModel, found: Attribution) -> None:
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
