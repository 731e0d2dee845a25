"""The arithmetic of probe training: in come one layer's states and verdicts; out come weights of examples, folds,
labels dealt anew, and logistic regressions on standardised features with the scaling folded into w and b. All of it
in float64, and none of it depends on the order of the data once that is `canonical_order`.

Legend: N examples, D features, S label sets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.evaluation.statistics import Floats
from surgery.io.hashing import hash_bytes

Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]

# No example counts more than ten: a cell with one or two in it must not decide where the border lies.
MOST_WEIGHT = 10.0
# lbfgs stops where no partial derivative of the mean loss is larger, or where float64 has no more to give.
TOLERANCE = 1e-10
MOST_STEPS = 10_000
# What lbfgs may leave in the gradient of the mean loss before we call it a failure.
LARGEST_GRADIENT = 1e-5
# How often labels are dealt until every fold can be trained on both classes.
MOST_DEALS = 100


@dataclass(frozen=True, eq=False)
class LabeledExamples:
    """What is known of N examples apart from their states: verdicts, cells such as "harmful/refused", and groups."""

    refused: Bools
    cells: tuple[str, ...]
    groups: tuple[str, ...]

    def at(self, rows: Sequence[int] | Integers | Bools) -> LabeledExamples:
        """The examples at `rows`, numbers or a mask."""
        chosen = np.arange(len(self.cells))[rows].tolist()
        cells, groups = tuple(self.cells[row] for row in chosen), tuple(self.groups[row] for row in chosen)
        return LabeledExamples(self.refused[chosen], cells, groups)


def canonical_order(states: Tensor, labelled: LabeledExamples) -> Integers:
    """The order (N,) by group, verdict, cell and the states themselves, (N, layers, D): examples that tie are equal."""
    rows = states.detach().cpu().float().contiguous().numpy()
    keys = [
        (group, bool(refused), cell, hash_bytes(row.tobytes()))
        for group, refused, cell, row in zip(labelled.groups, labelled.refused, labelled.cells, rows, strict=True)
    ]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


def cell_weights(labelled: LabeledExamples) -> tuple[Floats, tuple[str, ...]]:
    """min(N / (2 · k · n), 10) for an example in a cell of n, whose class has k cells; and the cells that were capped.

    So the classes weigh the same, the cells of a class weigh the same, and the weights' mean is 1 where none is
    capped: C keeps the meaning it has without weights.
    """
    kinds = list(zip(labelled.refused.tolist(), labelled.cells, strict=True))
    sizes = Counter(kinds)
    cells = Counter(refused for refused, _ in sizes)
    wished = {kind: len(kinds) / (2 * cells[kind[0]] * size) for kind, size in sizes.items()}
    capped = tuple(sorted(cell for (_, cell), weight in ((k, wished[k]) for k in wished) if weight > MOST_WEIGHT))
    return np.array([min(wished[kind], MOST_WEIGHT) for kind in kinds]), capped


def assign_folds(labelled: LabeledExamples, folds: int, seed: int) -> tuple[Integers, int]:
    """The fold (N,) in which each example is held out, and how many folds there are: as many as each class has groups.

    Whole groups, stratified by cell where every cell has an example for each fold, else by verdict
    (scikit-learn's StratifiedGroupKFold, shuffled by `seed`).

    Raises:
        SurgeryError: a class lies in one group only, or no split trains every fold on both classes.
    """
    for verdict in (True, False):
        groups = {g for g, refused in zip(labelled.groups, labelled.refused, strict=True) if refused == verdict}
        if len(groups) < 2:
            raise SurgeryError(
                f"all {'refused' if verdict else 'complied'} examples are of one group ({next(iter(groups))!r}), so "
                "that none can be held out",
                hint="Probes are tested on groups they were not trained on: give at least two groups of either kind.",
            )
        folds = min(folds, len(groups))
    for count in range(folds, 1, -1):
        fold = _split(labelled, count, seed)
        if _trainable(labelled.refused, fold, count):
            return fold, count
    raise SurgeryError(
        "the groups cannot be split so that every fold is trained on refused and on complied examples",
        hint="Give more groups, or smaller ones.",
    )


def _split(labelled: LabeledExamples, folds: int, seed: int) -> Integers:
    from sklearn.model_selection import StratifiedGroupKFold

    by_cell = min(Counter(labelled.cells).values()) >= folds
    strata = np.array(labelled.cells) if by_cell else labelled.refused
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    fold = np.zeros(len(labelled.cells), dtype=np.int64)
    for number, (_, held) in enumerate(splitter.split(strata, strata, np.array(labelled.groups))):
        fold[held] = number
    return fold


def _trainable(refused: Bools, fold: Integers, folds: int) -> bool:
    return all(0 < refused[fold != number].sum() < (fold != number).sum() for number in range(folds))


def permute_labels(labelled: LabeledExamples, fold: Integers, folds: int, seed: int) -> LabeledExamples:
    """The same examples with verdicts and cells dealt anew: group by group to the groups in random order, and within
    each group in random order too.

    So a group's examples get labels that belong together, as far as the groups' sizes allow, and each label stays as
    frequent as it is; where all groups are composed alike, the order within them makes the difference. `labelled` is
    in canonical order.

    Raises:
        SurgeryError: after 100 deals there is still a fold that would be trained on one class only.
    """
    generator = np.random.default_rng(seed)
    groups = np.array(labelled.groups)
    rows = [np.flatnonzero(groups == group) for group in sorted(set(labelled.groups))]
    for _ in range(MOST_DEALS):
        # Whose labels go where: the labels in their order, into shuffled slots of shuffled groups.
        slots = np.concatenate([generator.permutation(rows[at]) for at in generator.permutation(len(rows))])
        source = np.empty(len(groups), dtype=np.int64)
        source[slots] = np.concatenate(rows)
        dealt = labelled.at(source)
        if _trainable(dealt.refused, fold, folds):
            return LabeledExamples(dealt.refused, dealt.cells, labelled.groups)
    raise SurgeryError(
        "labels could not be shuffled so that every fold is trained on both classes",
        hint="Give more groups, or set the number of shuffles to 0.",
    )


def fit_logistic(
    states_ND: Floats, verdicts_SN: Sequence[Bools], weights_SN: Sequence[Floats], *, C: float
) -> tuple[Floats, Floats]:
    """L2-regularised logistic regressions on standardised features, one for each label set: w (S, D) and b (S,).

    Minimises Σᵢ sᵢ · loss(w_s·z + b_s, yᵢ) + ‖w_s‖² / 2C for z = (h − μ) / σ, and gives w = w_s / σ and
    b = b_s − w·μ, for raw states h. μ and σ are plain mean and standard deviation; a constant feature has weight 0.

    Raises:
        SurgeryError: the optimiser does not converge.
    """
    from sklearn.linear_model import LogisticRegression

    mean, spread = states_ND.mean(axis=0), states_ND.std(axis=0)
    # Rounding may leave a constant feature with a tiny spread.
    constant = states_ND.max(axis=0) == states_ND.min(axis=0)
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=~constant & (spread > 0))
    features = (states_ND - mean) * scale
    basis = None
    if 2 * len(features) <= features.shape[1]:
        features, basis = to_row_space(features)
    weights, biases = [], []
    for verdicts, counts in zip(verdicts_SN, weights_SN, strict=True):
        model = LogisticRegression(C=C, tol=TOLERANCE, max_iter=MOST_STEPS)
        model.fit(features, verdicts, sample_weight=counts)
        inner, bias = model.coef_[0], float(model.intercept_[0])
        error = counts * (sigmoid(features @ inner + bias) - verdicts)
        left = max(np.abs(features.T @ error + inner / C).max(), abs(error.sum())) / counts.sum()
        if not left <= LARGEST_GRADIENT:
            raise SurgeryError(
                f"the probe's training did not converge: the gradient is {left:.1e}, expected at most "
                f"{LARGEST_GRADIENT:.0e}",
                hint="Regularise more: a smaller C.",
            )
        outer = (inner if basis is None else basis @ inner) * scale
        weights.append(outer)
        biases.append(bias - float(outer @ mean))
    return np.array(weights), np.array(biases)


def to_row_space(features_ND: Floats) -> tuple[Floats, Floats]:
    """Z (N, D) in coordinates of its own row space: F (N, r) and a basis B (D, r) with F = Z·B and BᵀB = 1.

    Under an L2 penalty the best weights have no part outside the row space, for that would cost and change no score:
    the solution on Z is B times the solution on F. From the eigenvectors of Z·Zᵀ, at N ≪ D cheaper than a QR of Z;
    directions whose share of its trace is lost in float64's rounding are left out.
    """
    values, vectors = np.linalg.eigh(features_ND @ features_ND.T)
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    if not kept.any():  # no feature varies: one that is 0 stands for them
        return np.zeros((len(values), 1)), np.zeros((features_ND.shape[1], 1))
    lengths = np.sqrt(values[kept])
    return vectors[:, kept] * lengths, features_ND.T @ (vectors[:, kept] / lengths)


def sigmoid(logits: Floats) -> Floats:
    """1 / (1 + e^−x) without overflow."""
    scores: Floats = 0.5 * (1 + np.tanh(0.5 * logits))
    return scores
