"""Linear probes for refusal: in come the model's states at one position of every example and whether the example is
refused; out comes, for every layer, a direction w and a bias b, with p(refused) = σ(w·h + b) on the raw state h, and
how far that can be trusted (arXiv 2510.06036, equation 1).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from probes.refusal.linear.logistic import (
    MOST_WEIGHT,
    Integers,
    LabeledExamples,
    assign_folds,
    canonical_order,
    cell_weights,
    fit_logistic,
    permute_labels,
    sigmoid,
)
from probes.refusal.linear.probes import LayerMetrics as LayerMetrics
from probes.refusal.linear.probes import Probes as Probes
from surgery.engine.workers import default_threads
from surgery.errors import SurgeryError, listing, usage_error
from surgery.evaluation.statistics import Floats, auroc, bootstrap_auroc, brier, ece, wilson_interval
from surgery.runtime.progress import Progress, silent

WITHOUT = {
    "harmful/refused": "the probe has not seen a harmful request being refused.",
    "harmful/complied": "among harmful requests the probe has not seen what tells answers from refusals.",
    "harmless/refused": "the probe has not seen refusal apart from a harmful topic.",
    "harmless/complied": "the probe has not seen a plain answer to a harmless request.",
}
CELLS = ("harmful/refused", "harmful/complied", "harmless/refused", "harmless/complied")
# Of a logit: what differs by less is no order, but where the optimiser happened to stop.
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
    """Trains a probe on every layer, and tests it on groups it was not trained on.

    Each probe is scikit-learn's logistic regression (L2, lbfgs) on standardised features; the paper's has no
    standardisation and no cells. Examples are weighted so that both classes weigh the same, and within a class its
    cells (`cell_weights`). Scores for the metrics are out of fold: mean, deviation, weights and
    probe are of the other folds only. The probes that are returned are fitted to all examples.

    Args:
        states: (N, layers, D) of any float dtype.
        refused, groups, cells: (N,); examples of one group are never on both sides of a split.
        folds: fewer where a class lies in fewer groups, which `notes` says then.
        C: inverse strength of the penalty, as in scikit-learn.
        shuffles: how many times labels are dealt anew to measure selectivity; 0 leaves it out.
        seed: of folds, bootstrap and shuffles.

    Equal data give equal probes, in whatever order they come and on however many processors.

    Raises:
        SurgeryError: a class is missing or lies in one group; states are not finite; lengths differ; an option is out
            of range; the optimiser does not converge.
    """
    for name, value, least in (("folds", folds, 2), ("shuffles", shuffles, 0)):
        if value < least:
            raise usage_error(f"{name}: got {value}, expected at least {least}")
    if not 0 < C < math.inf:
        raise usage_error(f"C: got {C}, expected a positive number")
    labelled = _check(states, refused, groups, cells)
    order = canonical_order(states, labelled)
    labelled = labelled.at(order)
    fold, count = assign_folds(labelled, folds, seed)
    deals = [permute_labels(labelled, fold, count, seed + 1 + at) for at in range(shuffles)]
    ordered = states.detach()[torch.from_numpy(order).to(states.device)]
    fits: list[_Trained] = []
    with progress("Training probes", states.shape[1], "steps") as advance, _one_thread_each():
        work = partial(_train_layer, ordered, [labelled, *deals], fold=fold, folds=count, C=C, seed=seed)
        with ThreadPoolExecutor(default_threads()) as pool:
            for one in pool.map(work, range(states.shape[1])):
                fits.append(one)
                advance(1)
    back = np.argsort(order)
    return Probes(
        weights=torch.from_numpy(np.stack([one.weights for one in fits])).float(),
        biases=torch.tensor([one.bias for one in fits], dtype=torch.float64).float(),
        metrics=tuple(one.metrics for one in fits),
        out_of_fold=torch.from_numpy(np.stack([one.held for one in fits], axis=1)[back]).float(),
        fold=torch.from_numpy(fold[back]),
        folds=count,
        fold_weights=torch.from_numpy(np.stack([one.fold_weights for one in fits], axis=1)).float(),
        fold_biases=torch.from_numpy(np.stack([one.fold_biases for one in fits], axis=1)).float(),
        counts=dict(sorted(Counter(labelled.cells).items())),
        C=C,
        seed=seed,
        notes=_notes(labelled, folds, count),
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
    """How well the probes do on another data set, layer by layer; arguments as in `train_probes`.

    Raises:
        SurgeryError: a class is missing; states are not finite, or of another shape than the probes'.
    """
    labelled = _check(states, refused, groups, cells)
    logits = probes.logits(states).cpu().double().numpy().round(DECIMALS)
    return tuple(_measure(logits[:, layer], labelled, seed) for layer in range(logits.shape[1]))


def find_confounds(cells: Sequence[str]) -> list[str]:
    """Sentences on what a probe trained on examples of these cells cannot tell apart; none where all four are there.

    cells: (N,) of "harmful/refused" and the like, "unknown" where topic or verdict is not known.
    """
    counts = Counter(cells)
    unknown = sum(count for cell, count in counts.items() if cell not in CELLS)
    found = {cell: counts[cell] for cell in CELLS if counts[cell]}
    sentences = []
    if unknown:
        sentences.append(
            f"{unknown} of {len(cells)} examples lack a topic or a verdict, so that it is not known whether the probe "
            "reads refusal or topic in them."
        )
    if set(found) == {"harmful/refused", "harmless/complied"}:
        sentences.append(
            f"Topic and refusal coincide: all {found['harmful/refused']} harmful examples are refused and all "
            f"{found['harmless/complied']} harmless ones complied with. The probe may read the topic instead of the "
            "refusal; add harmful requests that are answered, or harmless ones that are refused."
        )
    elif found:
        sentences += [f"No example is {cell}: {WITHOUT[cell]}" for cell in CELLS if cell not in found]
    return sentences


def _check(states: Tensor, refused: Sequence[bool], groups: Sequence[str], cells: Sequence[str]) -> LabeledExamples:
    lengths = {"refused": len(refused), "groups": len(groups), "cells": len(cells)}
    if states.ndim != 3 or any(length != len(states) for length in lengths.values()):
        given = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise SurgeryError(
            f"states of shape {list(states.shape)} do not fit {given}: expected (examples, layers, width)"
        )
    verdicts = np.array([bool(verdict) for verdict in refused], dtype=np.bool_)
    for verdict, name, cell in ((True, "refused", CELLS[0]), (False, "complied", CELLS[3])):
        if not (verdicts == verdict).any():
            there = listing(f"{cell} {count}" for cell, count in sorted(Counter(cells).items())) or "none at all"
            raise SurgeryError(
                f"no example is {name} (there are: {there}), and a probe learns from both kinds",
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


def _notes(labelled: LabeledExamples, asked: int, folds: int) -> tuple[str, ...]:
    notes = []
    if folds < asked:
        few = {
            name: len({g for g, refused in zip(labelled.groups, labelled.refused, strict=True) if refused == verdict})
            for name, verdict in (("refused", True), ("complied", False))
        }
        notes.append(
            f"{asked} folds were asked for, {folds} were made: refused examples lie in {few['refused']} groups and "
            f"complied ones in {few['complied']}."
        )
    _, capped = cell_weights(labelled)
    if capped:
        notes.append(
            f"The examples of {listing(capped)} are so few that their weight was capped at {MOST_WEIGHT:g}: the cell "
            "counts less than the others of its class."
        )
    return tuple(notes)


@dataclass(frozen=True)
class _Trained:
    """One layer's probe, fitted to all examples, weights (D,); out-of-fold scores (N,); and the probe of every fold,
    (folds, D) and (folds,)."""

    weights: Floats
    bias: float
    held: Floats
    metrics: LayerMetrics
    fold_weights: Floats
    fold_biases: Floats


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """BLAS on one thread for each layer, so that sums are the same on any number of processors; no optimiser warnings.

    Both are settings of the whole process, so they are made once around the threads.
    """
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():
        # `fit_logistic` looks at the gradient itself.
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _train_layer(
    states: Tensor,
    label_sets: Sequence[LabeledExamples],
    layer: int,
    *,
    fold: Integers,
    folds: int,
    C: float,
    seed: int,
) -> _Trained:
    """Trained on the first of `label_sets`; the others are shuffled, and only their areas count."""
    inputs = states[:, layer].cpu().double().numpy()
    fold_weights, fold_biases = np.empty((folds, inputs.shape[1])), np.empty(folds)
    held = np.empty((len(label_sets), len(inputs)))
    for number in range(folds):
        train, test = np.flatnonzero(fold != number), fold == number
        parts = [labels.at(train) for labels in label_sets]
        weights, biases = fit_logistic(
            inputs[train], [p.refused for p in parts], [cell_weights(p)[0] for p in parts], C=C
        )
        held[:, test] = weights @ inputs[test].T + biases[:, None]
        fold_weights[number], fold_biases[number] = weights[0], biases[0]
    weights, biases = fit_logistic(inputs, [label_sets[0].refused], [cell_weights(label_sets[0])[0]], C=C)
    held = held.round(DECIMALS)
    shuffled = [auroc(logits, labels.refused) for logits, labels in zip(held[1:], label_sets[1:], strict=True)]
    metrics = _measure(held[0], label_sets[0], seed, shuffled)
    return _Trained(weights[0], float(biases[0]), sigmoid(held[0]), metrics, fold_weights, fold_biases)


def _measure(logits: Floats, labelled: LabeledExamples, seed: int, shuffled: Sequence[float] = ()) -> LayerMetrics:
    refused, scores = labelled.refused, sigmoid(logits)
    # Ranked by logits, for high scores differ by less than float64 can tell.
    area = bootstrap_auroc(logits, refused, groups=labelled.groups, seed=seed)
    right = (logits >= 0) == refused
    weights, _ = cell_weights(labelled)
    low, high = wilson_interval(float(right.sum()), len(right))
    chance = math.fsum(shuffled) / len(shuffled) if shuffled else None
    return LayerMetrics(
        auroc=area.value,
        auroc_low=area.low,
        auroc_high=area.high,
        accuracy=float(right.mean()),
        accuracy_low=low,
        accuracy_high=high,
        balanced_accuracy=float(right[refused].mean() + right[~refused].mean()) / 2,
        ece=ece(scores, refused, weights=weights),
        brier=brier(scores, refused, weights=weights),
        shuffled=chance,
        selectivity=None if chance is None else area.value - chance,
    )
