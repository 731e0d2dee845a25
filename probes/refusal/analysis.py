"""Analyse prepared examples: train the probes, trace every token, measure the cliffs, score the heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from probes.data.choices import AttributionForm
from probes.data.examples import Example
from probes.data.preparation import PreparedData
from probes.data.probe_run import ProbeRun
from probes.model.residual_stream import trace_residual_stream
from probes.refusal import cliffs as cliff_measures
from probes.refusal.cliffs import RefusalCliff
from probes.refusal.fitted_probes import FittedProbes, ProbeTraining, fit_probes, measure_transfer, trace_scores
from probes.refusal.heads.attribution import HeadAttribution, attribute_heads
from probes.refusal.linear.probes import LayerMetrics
from surgery.models.choices import SpecialTokens

# A mean over fewer examples than this would rank heads by the accidents of one prompt.
LEAST_SCORED = 3
# Heads are scored where suppression can be seen: on harmful prompts that were answered, if there are enough of them.
SCORED_ON = ("harmful/complied", "harmful/refused", "unknown/complied", "unknown/refused", "harmless/complied")


@dataclass(frozen=True)
class RefusalSettings:
    """How prepared examples are analysed; the fields are those of `probe_refusal`."""

    training: ProbeTraining
    attribution: AttributionForm
    limit: int | None
    batch_tokens: int | None
    special_tokens: SpecialTokens = "text"


@dataclass(frozen=True, eq=False)
class RefusalAnalysis:
    """What one run measured, before it is turned into findings.

    prepared, transfer: the examples, and those of the second data set.
    fitted: the probes; transfer_metrics: how they do on the second data set, layer by layer.
    depth: the depth whose scores are reported, that after the final norm.
    traces: N × (T, depths) refusal scores. cliffs: one for each example.
    cell: the cell whose examples heads were scored on; heads: their attribution, in the order of `scored`.
    """

    run: ProbeRun
    settings: RefusalSettings
    prepared: PreparedData
    transfer: PreparedData | None
    fitted: FittedProbes
    transfer_metrics: tuple[LayerMetrics, ...] | None
    depth: int
    traces: Sequence[Tensor]
    cliffs: Sequence[RefusalCliff]
    cell: str
    heads: HeadAttribution

    @property
    def scored(self) -> list[Example]:
        """The examples that heads were scored on."""
        return [example for example in self.prepared.examples if example.cell == self.cell]


def analyse(
    run: ProbeRun, prepared: PreparedData, transfer: PreparedData | None, settings: RefusalSettings
) -> RefusalAnalysis:
    """Train the probes on `prepared`, test them on `transfer`, trace the examples and score the heads.

    Raises:
        SurgeryError: as `fit_probes`, `trace_residual_stream` and `attribute_heads`.
    """
    live, progress, max_tokens = run.live, run.options.progress, settings.batch_tokens
    examples, sequences = prepared.examples, prepared.sequences
    fitted = fit_probes(live, examples, sequences, settings.training, max_tokens=max_tokens, progress=progress)
    transfer_metrics = None
    if transfer is not None:
        transfer_metrics = measure_transfer(
            live, transfer.examples, transfer.sequences, fitted, max_tokens=max_tokens, progress=progress
        )
    # After the final norm: the state that the answer's first token is read from, and that heads are attributed to.
    depth = live.n_depths - 1
    traces = trace_scores(live, sequences, fitted, max_tokens=max_tokens, progress=progress)
    cliffs = [
        cliff_measures.measure_cliff(sequence, scores[:, depth].numpy(), cell=example.cell, group=example.group)
        for example, sequence, scores in zip(examples, sequences, traces, strict=True)
    ]
    # One cell only: means over harmful and harmless prompts would mix heads that do different things.
    cell = _cell_to_score(examples)
    heads = attribute_heads(
        live,
        [sequence for example, sequence in zip(examples, sequences, strict=True) if example.cell == cell],
        fitted.probes.weights[depth],
        float(fitted.probes.biases[depth]),
        stream=trace_residual_stream(live) if settings.attribution == "exact" else None,
        max_tokens=max_tokens,
        progress=progress,
    )
    return RefusalAnalysis(
        run, settings, prepared, transfer, fitted, transfer_metrics, depth, traces, cliffs, cell=cell, heads=heads
    )


def _cell_to_score(examples: Sequence[Example]) -> str:
    counts = cliff_measures.count_cells([example.cell for example in examples])
    largest = max(counts, key=lambda cell: counts[cell])
    return next((cell for cell in SCORED_ON if counts.get(cell, 0) >= LEAST_SCORED), largest)
