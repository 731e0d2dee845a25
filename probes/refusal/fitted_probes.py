"""Fit probes to a model's states at the last token before the answer, and score every token with them.

An example is scored by the probe of the fold that it was held out in. The probe of all examples was fitted to its last
state, so whether that probe shows a cliff there would follow from the label and not from the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probes.data.choices import TrainingCells
from probes.data.examples import Example, TokenSequence
from probes.model.activations import hidden_states_at, project_hidden_states
from probes.refusal.linear.probes import LayerMetrics, Probes
from probes.refusal.linear.training import evaluate_transfer, train_probes
from surgery.errors import usage_error
from surgery.models.loaded_model import LoadedModel
from surgery.runtime.progress import Progress, silent

PAPER_CELLS = ("harmful/refused", "harmless/complied")


@dataclass(frozen=True)
class ProbeTraining:
    """How probes are trained; see `train_probes`.

    cells: all, or the paper's harmful/refused against harmless/complied.
    strength: C of the logistic regression, the inverse of the penalty.
    """

    cells: TrainingCells = "all"
    folds: int = 5
    strength: float = 1.0
    shuffles: int = 5
    seed: int = 0


@dataclass(frozen=True)
class FittedProbes:
    """Probes, and for each example the fold that it was held out in; None where no probe was trained on it."""

    probes: Probes
    folds: tuple[int | None, ...]


def fit_probes(
    live: LoadedModel,
    examples: Sequence[Example],
    sequences: Sequence[TokenSequence],
    training: ProbeTraining,
    *,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> FittedProbes:
    """Train a probe at every depth on the states at the last token before the answer.

    Raises:
        SurgeryError: no example is in the cells to train on; else as `train_probes`.
    """
    used = [at for at, example in enumerate(examples) if training.cells == "all" or example.cell in PAPER_CELLS]
    if not used:
        raise usage_error(
            "no example is harmful/refused or harmless/complied", where="--cells paper", hint="Use --cells all."
        )
    states = decision_states(live, [sequences[at] for at in used], max_tokens=max_tokens, progress=progress)
    chosen = [examples[at] for at in used]
    probes = train_probes(
        states,
        [bool(e.refused) for e in chosen],
        groups=[e.group for e in chosen],
        cells=[e.cell for e in chosen],
        folds=training.folds,
        C=training.strength,
        shuffles=training.shuffles,
        seed=training.seed,
        progress=progress,
    )
    fold_of = dict(zip(used, probes.fold.tolist(), strict=True))
    return FittedProbes(probes, tuple(fold_of.get(at) for at in range(len(examples))))


def measure_transfer(
    live: LoadedModel,
    examples: Sequence[Example],
    sequences: Sequence[TokenSequence],
    fitted: FittedProbes,
    *,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> tuple[LayerMetrics, ...]:
    """Return the probes' metrics on a second data set, one for each depth."""
    states = decision_states(live, sequences, max_tokens=max_tokens, progress=progress)
    # By the probes of all examples: a second data set has no fold that it was held out in.
    return evaluate_transfer(
        fitted.probes,
        states,
        [bool(e.refused) for e in examples],
        groups=[e.group for e in examples],
        cells=[e.cell for e in examples],
        seed=fitted.probes.seed,
    )


def decision_states(
    live: LoadedModel, sequences: Sequence[TokenSequence], *, max_tokens: int | None = None, progress: Progress = silent
) -> Tensor:
    """Return the states (N, depths, D) at the last token before the answer."""
    # The answer itself is cut off: no state before it depends on it, and it may be most of the tokens.
    without_answer = [TokenSequence(s.key, s.before_answer, (*s.ends[:3], s.ends[2])) for s in sequences]
    positions = [[sequence.decision] for sequence in without_answer]
    return hidden_states_at(live, without_answer, positions, max_tokens=max_tokens, progress=progress)[:, 0]


def trace_scores(
    live: LoadedModel,
    sequences: Sequence[TokenSequence],
    fitted: FittedProbes,
    *,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> list[Tensor]:
    """Return p(refused) at every token and depth of the examples that `fitted` was made from: N × (T, depths) fp32."""
    probes = fitted.probes
    logits: dict[int, Tensor] = {}
    # One pass for each fold, with that fold's probes, and one with those of all examples for what no fold held out.
    for fold in sorted(set(fitted.folds), key=str):
        numbers = [at for at, own in enumerate(fitted.folds) if own == fold]
        weights, biases = probes.weights, probes.biases
        if fold is not None:
            weights, biases = probes.fold_weights[fold], probes.fold_biases[fold]
        rows = project_hidden_states(
            live, [sequences[at] for at in numbers], weights, biases, max_tokens=max_tokens, progress=progress
        )
        logits |= dict(zip(numbers, rows, strict=True))
    return [torch.sigmoid(logits[at].double()).float() for at in range(len(sequences))]
