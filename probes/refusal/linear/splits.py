"""Labels of examples: canonical order, class weights, folds by group, and permuted labels for the selectivity control.

None of it depends on the order in which the data came, once that is `canonical_order`. Legend: N examples, D features.
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

# No example weighs more than ten: a cell with one or two examples must not decide where the boundary lies.
MAX_WEIGHT = 10.0
# Permutations that are tried until every fold can be trained on both classes.
MAX_PERMUTATIONS = 100


@dataclass(frozen=True, eq=False)
class LabeledExamples:
    """N examples without their states: verdicts, cells such as "harmful/refused", and groups."""

    refused: Bools
    cells: tuple[str, ...]
    groups: tuple[str, ...]

    def select(self, rows: Sequence[int] | Integers | Bools) -> LabeledExamples:
        """Return the examples at `rows`, which are indices or a mask."""
        chosen = np.arange(len(self.cells))[rows].tolist()
        cells, groups = tuple(self.cells[row] for row in chosen), tuple(self.groups[row] for row in chosen)
        return LabeledExamples(self.refused[chosen], cells, groups)


def canonical_order(states: Tensor, labelled: LabeledExamples) -> Integers:
    """Return the order (N,) by group, verdict, cell and the states (N, layers, D); examples that tie are equal."""
    # Hashed, for states of thousands of numbers would be slow to compare.
    rows = states.detach().cpu().float().contiguous().numpy()
    keys = [
        (group, bool(refused), cell, hash_bytes(row.tobytes()))
        for group, refused, cell, row in zip(labelled.groups, labelled.refused, labelled.cells, rows, strict=True)
    ]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


def cell_weights(labelled: LabeledExamples) -> tuple[Floats, tuple[str, ...]]:
    """Return each example's weight (N,), and the cells whose weight was capped at `MAX_WEIGHT`.

    An example in a cell of n, whose class has k cells, weighs min(N / (2 · k · n), 10). So both classes weigh the
    same, the cells of a class weigh the same, and the mean weight is 1 where none is capped: C keeps the meaning that
    it has without weights.
    """
    strata = list(zip(labelled.refused.tolist(), labelled.cells, strict=True))
    sizes = Counter(strata)
    cells_of_class = Counter(refused for refused, _ in sizes)
    uncapped = {stratum: len(strata) / (2 * cells_of_class[stratum[0]] * size) for stratum, size in sizes.items()}
    capped = tuple(sorted(cell for (_, cell), weight in uncapped.items() if weight > MAX_WEIGHT))
    return np.array([min(uncapped[stratum], MAX_WEIGHT) for stratum in strata]), capped


def assign_folds(labelled: LabeledExamples, folds: int, seed: int) -> tuple[Integers, int]:
    """Return the fold (N,) in which each example is held out, and the number of folds.

    There are at most `folds`, and no more than either class has groups. Groups are never split; folds are stratified
    by cell where every cell has an example for each fold, else by verdict (scikit-learn's StratifiedGroupKFold,
    shuffled by `seed`).

    Raises:
        SurgeryError: a class has one group only, or no split trains every fold on both classes.
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
    # Uneven groups may leave a fold without one of the classes; fewer folds are larger, and may have both.
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

    # scikit-learn warns about strata with fewer examples than folds: not every fold can have one.
    by_cell = min(Counter(labelled.cells).values()) >= folds
    strata = np.array(labelled.cells) if by_cell else labelled.refused
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    fold = np.zeros(len(labelled.cells), dtype=np.int64)
    for number, (_, held_out) in enumerate(splitter.split(strata, strata, np.array(labelled.groups))):
        fold[held_out] = number
    return fold


def _trainable(refused: Bools, fold: Integers, folds: int) -> bool:
    """Whether both classes are left to train on when any one fold is held out."""
    return all(0 < refused[fold != number].sum() < (fold != number).sum() for number in range(folds))


def permute_labels(labelled: LabeledExamples, fold: Integers, folds: int, seed: int) -> LabeledExamples:
    """Return the same examples with permuted verdicts and cells, the control of selectivity.

    Whole groups are shuffled, and the examples within each group too. So a group's examples get labels that belong
    together, as far as the groups' sizes allow, and each label stays as frequent as it is. Where all groups are
    composed alike, the order within them makes the difference.

    Args:
        labelled: in canonical order.
        fold, folds: as `assign_folds` returned them.

    Raises:
        SurgeryError: after 100 permutations there is still a fold that would be trained on one class only.
    """
    generator = np.random.default_rng(seed)
    groups = np.array(labelled.groups)
    rows = [np.flatnonzero(groups == group) for group in sorted(set(labelled.groups))]
    for _ in range(MAX_PERMUTATIONS):
        # The labels in their own order go into shuffled slots of shuffled groups.
        slots = np.concatenate([generator.permutation(rows[at]) for at in generator.permutation(len(rows))])
        source = np.empty(len(groups), dtype=np.int64)
        source[slots] = np.concatenate(rows)
        permuted = labelled.select(source)
        if _trainable(permuted.refused, fold, folds):
            return LabeledExamples(permuted.refused, permuted.cells, labelled.groups)
    raise SurgeryError(
        "labels could not be shuffled so that every fold is trained on both classes",
        hint="Give more groups, or set the number of shuffles to 0.",
    )
