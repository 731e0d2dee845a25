"""From answered examples to probes, and from probes to the score of every token, each by a probe that did not see it.

In come a live model, examples and their tokens; out come probes trained on the states at the last token before the
answer, and traces. An example's trace is read by the probe of the fold that it was held out in: the probe of all
examples has been fitted to its last state, and would show a cliff, or none, because it was told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from probes.data.examples import Example, TokenSequence
from probes.model.activations import hidden_states_at, project_hidden_states
from probes.refusal.linear.probes import LayerMetrics, Probes
from probes.refusal.linear.training import evaluate_transfer, train_probes
from surgery.errors import usage_error
from surgery.models.loaded_model import LoadedModel
from surgery.runtime.progress import Progress, silent

TrainingCells = Literal["all", "paper"]
PAPER_CELLS = ("harmful/refused", "harmless/complied")


@dataclass(frozen=True)
class ProbeTraining:
    """How probes are trained; see `linear.train_probes`. cells: all, or the paper's harmful/refused against
    harmless/complied."""

    cells: TrainingCells = "all"
    folds: int = 5
    strength: float = 1.0
    shuffles: int = 5
    seed: int = 0


@dataclass(frozen=True)
class FittedProbes:
    """Probes, and the fold that each example was held out in; None for those that no probe was trained on."""

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
    """Probes at every depth, on the states at the last token before the answer.

    Raises:
        SurgeryError: no example is in the cells asked for; else as `linear.train_probes`.
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
    held = dict(zip(used, probes.fold.tolist(), strict=True))
    return FittedProbes(probes, tuple(held.get(at) for at in range(len(examples))))


def measure_transfer(
    live: LoadedModel,
    examples: Sequence[Example],
    sequences: Sequence[TokenSequence],
    trained: FittedProbes,
    *,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> tuple[LayerMetrics, ...]:
    """How well the probes do on a second data set, depth by depth."""
    states = decision_states(live, sequences, max_tokens=max_tokens, progress=progress)
    return evaluate_transfer(
        trained.probes,
        states,
        [bool(e.refused) for e in examples],
        groups=[e.group for e in examples],
        cells=[e.cell for e in examples],
        seed=trained.probes.seed,
    )


def decision_states(
    live: LoadedModel, sequences: Sequence[TokenSequence], *, max_tokens: int | None = None, progress: Progress = silent
) -> Tensor:
    """(N, depths, D): the states at the last token before the answer."""
    short = [TokenSequence(s.key, s.before_answer, (*s.ends[:3], s.ends[2])) for s in sequences]
    at = [[sequence.decision] for sequence in short]
    return hidden_states_at(live, short, at, max_tokens=max_tokens, progress=progress)[:, 0]


def trace_scores(
    live: LoadedModel,
    sequences: Sequence[TokenSequence],
    trained: FittedProbes,
    *,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> list[Tensor]:
    """p(refused) at every token and depth of the examples that `trained` was made from: N × (T, depths) fp32."""
    probes = trained.probes
    found: dict[int, Tensor] = {}
    for fold in sorted(set(trained.folds), key=str):
        numbers = [at for at, own in enumerate(trained.folds) if own == fold]
        weights, biases = probes.weights, probes.biases
        if fold is not None:
            weights, biases = probes.fold_weights[fold], probes.fold_biases[fold]
        rows = project_hidden_states(
            live, [sequences[at] for at in numbers], weights, biases, max_tokens=max_tokens, progress=progress
        )
        found |= dict(zip(numbers, rows, strict=True))
    return [torch.sigmoid(found[at].double()).float() for at in range(len(sequences))]
