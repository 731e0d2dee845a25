"""Train and test linear probes for refusal, one for each layer (arXiv 2510.06036, equation 1).

A probe is a direction w and a bias b with p(refused) = σ(w·h + b) on the raw state h at one position of an example.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probes.refusal.linear.logistic import fit_logistic, sigmoid
from probes.refusal.linear.probes import LayerMetrics, Probes
from probes.refusal.linear.splits import (
    MAX_WEIGHT,
    Integers,
    LabeledExamples,
    assign_folds,
    canonical_order,
    cell_weights,
    permute_labels,
)
from surgery.engine.work.workers import default_threads
from surgery.errors import SurgeryError, listing, usage_error
from surgery.evaluation.statistics import Floats, auroc, bootstrap_auroc, brier, ece, wilson_interval
from surgery.runtime.progress import Progress, silent

CELLS = ("harmful/refused", "harmful/complied", "harmless/refused", "harmless/complied")
# What a probe cannot have learned without examples of a cell.
MISSING_CELL_NOTES = {
    "harmful/refused": "the probe has not seen a harmful request being refused.",
    "harmful/complied": "among harmful requests the probe has not seen what tells answers from refusals.",
    "harmless/refused": "the probe has not seen refusal apart from a harmful topic.",
    "harmless/complied": "the probe has not seen a plain answer to a harmless request.",
}
# Logits are rounded to so many decimals before they are ranked: smaller differences only show where the optimiser
# happened to stop, and would make the AUROC depend on the machine.
DECIMALS = 6


def train_probes(
    states: Tensor,
    refused: Sequence[bool],
    *,
    groups: Sequence[str],
    cells: Sequence[str],
    folds: int = 5,
    C: float = 1.0,
    shuffles: int = 5,
    seed: int = 0,
    progress: Progress = silent,
) -> Probes:
    """Train a probe on every layer, and test it on groups that it was not trained on.

    Each probe is scikit-learn's logistic regression (L2, lbfgs) on standardised features; the paper's has no
    standardisation and no cells. Examples are weighted so that both classes weigh the same, and within a class its
    cells (`cell_weights`). Scores for the metrics are out of fold: mean, deviation, weights and probe come from the
    other folds only. The probes that are returned are fitted to all examples.

    Equal data give equal probes, whatever their order and the number of processors.

    Args:
        states: (N, layers, D) of any float dtype.
        refused, groups, cells: (N,); examples of one group are never on both sides of a split.
        folds: fewer are made where a class has fewer groups, and `notes` has a sentence on it.
        C: inverse strength of the penalty, as in scikit-learn.
        shuffles: how many times labels are permuted to measure selectivity; 0 leaves it out.
        seed: of folds, bootstrap and shuffles.

    Raises:
        SurgeryError: a class is missing or has one group only; states are not finite; lengths differ; an option is out
            of range; the optimiser does not converge.
    """
    _check_options(folds, C, shuffles)
    labelled = _check_examples(states, refused, groups, cells)
    order = canonical_order(states, labelled)
    labelled = labelled.select(order)
    fold, n_folds = assign_folds(labelled, folds, seed)
    # `seed` itself is that of the folds.
    permuted = [permute_labels(labelled, fold, n_folds, seed + 1 + at) for at in range(shuffles)]
    ordered = states.detach()[torch.from_numpy(order).to(states.device)]
    trainer = _LayerTrainer(ordered, (labelled, *permuted), fold, n_folds, C, seed)
    fits = _train_layers(trainer, progress)
    # Everything with a row for each example goes back into the order in which the examples came.
    original_order = np.argsort(order)
    return Probes(
        weights=torch.from_numpy(np.stack([fit.weights for fit in fits])).float(),
        biases=torch.tensor([fit.bias for fit in fits], dtype=torch.float64).float(),
        metrics=tuple(fit.metrics for fit in fits),
        out_of_fold=torch.from_numpy(np.stack([fit.out_of_fold for fit in fits], axis=1)[original_order]).float(),
        fold=torch.from_numpy(fold[original_order]),
        folds=n_folds,
        fold_weights=torch.from_numpy(np.stack([fit.fold_weights for fit in fits], axis=1)).float(),
        fold_biases=torch.from_numpy(np.stack([fit.fold_biases for fit in fits], axis=1)).float(),
        counts=dict(sorted(Counter(labelled.cells).items())),
        C=C,
        seed=seed,
        notes=_notes(labelled, folds, n_folds),
    )


def evaluate_transfer(
    probes: Probes,
    states: Tensor,
    refused: Sequence[bool],
    *,
    groups: Sequence[str],
    cells: Sequence[str],
    seed: int = 0,
) -> tuple[LayerMetrics, ...]:
    """Return the metrics of the probes on another data set, layer by layer; arguments as in `train_probes`.

    Raises:
        SurgeryError: a class is missing; states are not finite, or of another shape than the probes'.
    """
    labelled = _check_examples(states, refused, groups, cells)
    # Rounded as in training, so that ties are the same ones.
    logits = probes.logits(states).cpu().double().numpy().round(DECIMALS)
    return tuple(_metrics(logits[:, layer], labelled, seed) for layer in range(logits.shape[1]))


def find_confounds(cells: Sequence[str]) -> list[str]:
    """Return sentences on what a probe trained on examples of these cells cannot tell apart; none if all four occur.

    cells: (N,) of "harmful/refused" and the like, with "unknown" for a topic or verdict that is not known.
    """
    counts = Counter(cells)
    unknown = sum(count for cell, count in counts.items() if cell not in CELLS)
    present = {cell: counts[cell] for cell in CELLS if counts[cell]}
    sentences = []
    if unknown:
        sentences.append(
            f"{unknown} of {len(cells)} examples lack a topic or a verdict, so that it is not known whether the probe "
            "reads refusal or topic in them."
        )
    if set(present) == {"harmful/refused", "harmless/complied"}:
        sentences.append(
            f"Topic and refusal coincide: all {present['harmful/refused']} harmful examples are refused and all "
            f"{present['harmless/complied']} harmless ones complied with. The probe may read the topic instead of the "
            "refusal; add harmful requests that are answered, or harmless ones that are refused."
        )
    elif present:
        sentences += [f"No example is {cell}: {MISSING_CELL_NOTES[cell]}" for cell in CELLS if cell not in present]
    return sentences


def _check_options(folds: int, C: float, shuffles: int) -> None:
    for name, value, least in (("folds", folds, 2), ("shuffles", shuffles, 0)):
        if value < least:
            raise usage_error(f"{name}: got {value}, expected at least {least}")
    if not 0 < C < math.inf:
        raise usage_error(f"C: got {C}, expected a positive number")


def _check_examples(
    states: Tensor, refused: Sequence[bool], groups: Sequence[str], cells: Sequence[str]
) -> LabeledExamples:
    lengths = {"refused": len(refused), "groups": len(groups), "cells": len(cells)}
    if states.ndim != 3 or any(length != len(states) for length in lengths.values()):
        given = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise SurgeryError(
            f"states of shape {list(states.shape)} do not fit {given}: expected (examples, layers, width)"
        )
    verdicts = np.array([bool(verdict) for verdict in refused], dtype=np.bool_)
    for verdict, name, cell in ((True, "refused", CELLS[0]), (False, "complied", CELLS[3])):
        if not (verdicts == verdict).any():
            present = listing(f"{cell} {count}" for cell, count in sorted(Counter(cells).items())) or "none at all"
            raise SurgeryError(
                f"no example is {name} (there are: {present}), and a probe learns from both kinds",
                hint=f"Add {cell} examples, or check the labels.",
            )
    bad = ~torch.isfinite(states.detach()).all(dim=-1)
    if bad.any():
        example, layer = (int(at) for at in bad.nonzero()[0])
        raise SurgeryError(
            f"{int(bad.any(dim=1).sum())} of {len(states)} examples have states that are NaN or infinite; the first is "
            f"example {example} at layer {layer}",
            hint="Compute in float32 or bfloat16: float16 overflows in many models.",
        )
    return LabeledExamples(verdicts, tuple(cells), tuple(groups))


def _notes(labelled: LabeledExamples, requested: int, folds: int) -> tuple[str, ...]:
    notes = []
    if folds < requested:
        n_groups = {
            name: len({g for g, refused in zip(labelled.groups, labelled.refused, strict=True) if refused == verdict})
            for name, verdict in (("refused", True), ("complied", False))
        }
        notes.append(
            f"{requested} folds were asked for, {folds} were made: refused examples lie in {n_groups['refused']} "
            f"groups and complied ones in {n_groups['complied']}."
        )
    _, capped = cell_weights(labelled)
    if capped:
        notes.append(
            f"The examples of {listing(capped)} are so few that their weight was capped at {MAX_WEIGHT:g}: the cell "
            "counts less than the others of its class."
        )
    return tuple(notes)


@dataclass(frozen=True, eq=False)
class _LayerFit:
    """One layer's probe, fitted to all examples: weights (D,) and bias.

    out_of_fold: (N,) p(refused). fold_weights, fold_biases: (folds, D) and (folds,), the probe of every fold.
    """

    weights: Floats
    bias: float
    out_of_fold: Floats
    metrics: LayerMetrics
    fold_weights: Floats
    fold_biases: Floats


def _train_layers(trainer: _LayerTrainer, progress: Progress) -> list[_LayerFit]:
    n_layers = trainer.states.shape[1]
    fits: list[_LayerFit] = []
    with (
        progress("Training probes", n_layers, "steps") as advance,
        _single_threaded_blas(),
        ThreadPoolExecutor(default_threads()) as pool,
    ):
        for fit in pool.map(trainer.train, range(n_layers)):
            fits.append(fit)
            advance(1)
    return fits


@contextmanager
def _single_threaded_blas() -> Iterator[None]:
    """Limit BLAS to one thread, so that sums are the same on any number of processors; silence optimiser warnings.

    Both are settings of the whole process, so they are made once around the threads.
    """
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():
        # `fit_logistic` checks the gradient itself.
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


@dataclass(frozen=True, eq=False)
class _LayerTrainer:
    """What the training of all layers shares.

    states: (N, layers, D) in canonical order. label_sets: the labels, then their permutations, of which only the AUROC
    is used. fold: (N,) the fold that each example is held out in.
    """

    states: Tensor
    label_sets: tuple[LabeledExamples, ...]
    fold: Integers
    n_folds: int
    C: float
    seed: int

    def train(self, layer: int) -> _LayerFit:
        """Fit and cross-validate the probe of one layer."""
        # One layer at a time in fp64: all of them would take up to four times the memory of the states.
        states = self.states[:, layer].cpu().double().numpy()
        labelled, *permuted = self.label_sets
        logits, fold_weights, fold_biases = self._cross_validate(states)
        weights, biases = fit_logistic(states, [labelled.refused], [cell_weights(labelled)[0]], C=self.C)
        # After fitting, so that only what is ranked and reported is rounded.
        logits = logits.round(DECIMALS)
        shuffled = [auroc(own, labels.refused) for own, labels in zip(logits[1:], permuted, strict=True)]
        metrics = _metrics(logits[0], labelled, self.seed, shuffled)
        return _LayerFit(weights[0], float(biases[0]), sigmoid(logits[0]), metrics, fold_weights, fold_biases)

    def _cross_validate(self, states: Floats) -> tuple[Floats, Floats, Floats]:
        """Return out-of-fold logits (label sets, N), and the folds' weights (folds, D) and biases (folds,)."""
        fold_weights, fold_biases = np.empty((self.n_folds, states.shape[1])), np.empty(self.n_folds)
        logits = np.empty((len(self.label_sets), len(states)))
        for number in range(self.n_folds):
            train, test = np.flatnonzero(self.fold != number), self.fold == number
            # All label sets in one call, for they share the standardised features.
            parts = [labels.select(train) for labels in self.label_sets]
            weights, biases = fit_logistic(
                states[train], [p.refused for p in parts], [cell_weights(p)[0] for p in parts], C=self.C
            )
            logits[:, test] = weights @ states[test].T + biases[:, None]
            fold_weights[number], fold_biases[number] = weights[0], biases[0]
        return logits, fold_weights, fold_biases


def _metrics(logits: Floats, labelled: LabeledExamples, seed: int, shuffled: Sequence[float] = ()) -> LayerMetrics:
    refused, scores = labelled.refused, sigmoid(logits)
    # Ranked by logits: in float64 many high scores round to the same number.
    area = bootstrap_auroc(logits, refused, groups=labelled.groups, seed=seed)
    correct = (logits >= 0) == refused
    weights, _ = cell_weights(labelled)
    low, high = wilson_interval(float(correct.sum()), len(correct))
    chance = math.fsum(shuffled) / len(shuffled) if shuffled else None
    return LayerMetrics(
        auroc=area.value,
        auroc_low=area.low,
        auroc_high=area.high,
        accuracy=float(correct.mean()),
        accuracy_low=low,
        accuracy_high=high,
        balanced_accuracy=float(correct[refused].mean() + correct[~refused].mean()) / 2,
        ece=ece(scores, refused, weights=weights),
        brier=brier(scores, refused, weights=weights),
        shuffled=chance,
        selectivity=None if chance is None else area.value - chance,
    )
