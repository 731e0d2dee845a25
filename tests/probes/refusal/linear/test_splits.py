"""Weights and permuted labels: classes and cells weigh the same, and labels stay as frequent as they are."""

from __future__ import annotations

import numpy as np
import pytest
from support.linear_probes import ANSWERED, COMPLIED, REFUSED

from probes.refusal.linear.splits import LabeledExamples, assign_folds, cell_weights, permute_labels


def test_permuting_keeps_frequencies_and_labels_that_belong_together() -> None:
    cells = [REFUSED] * 9 + [COMPLIED] * 9
    labelled = LabeledExamples(np.arange(18) < 9, tuple(cells), tuple(f"g{at // 3}" for at in range(18)))
    fold, folds = assign_folds(labelled, 3, seed=0)
    dealt = permute_labels(labelled, fold, folds, seed=5)
    assert dealt.groups == labelled.groups and sorted(dealt.cells) == sorted(cells)
    assert [cell == REFUSED for cell in dealt.cells] == dealt.refused.tolist() != labelled.refused.tolist()
    assert all(len(set(dealt.cells[at : at + 3])) == 1 for at in range(0, 18, 3))


def test_cells_of_a_class_weigh_the_same_and_so_do_the_classes() -> None:
    cells = [REFUSED] * 4 + [ANSWERED] * 2 + [COMPLIED] * 18
    labelled = LabeledExamples(np.array([cell == REFUSED for cell in cells]), tuple(cells), tuple(map(str, range(24))))
    weights, capped = cell_weights(labelled)
    sums = {cell: weights[[c == cell for c in cells]].sum() for cell in set(cells)}
    assert sums == pytest.approx({REFUSED: 12, ANSWERED: 6, COMPLIED: 6})
    assert capped == ()
