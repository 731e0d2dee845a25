"""Linear probes equal a plain fit, do not depend on the order of the data, name their limits, and survive saving."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from support.linear_probes import ANSWERED, COMPLIED, REFUSED, Data, make_data

from probes.refusal.linear.logistic import fit_logistic
from probes.refusal.linear.splits import LabeledExamples, cell_weights
from probes.refusal.linear.training import evaluate_transfer, find_confounds
from surgery.errors import SurgeryError
from surgery.evaluation.statistics import auroc, wilson_interval


@pytest.mark.parametrize("width", [12, 300])  # fitted as it is, and in the row space
def test_folded_weights_give_the_scores_of_a_plain_fit_on_standardised_features(width: int) -> None:
    given = make_data(width=width)
    probes = given.train(shuffles=0)
    inputs = given.states[:, 2].double().numpy()
    spread = inputs.std(axis=0)
    spread[2] = 1
    standardised = (inputs - inputs.mean(axis=0)) / spread
    plain = LogisticRegression(tol=1e-10, max_iter=10_000).fit(standardised, given.refused)
    expected = plain.predict_proba(standardised)[:, 1]
    assert probes.scores(given.states)[:, 2].numpy() == pytest.approx(expected, abs=2e-6)
    assert probes.weights[2].numpy() == pytest.approx(plain.coef_[0] / spread, abs=1e-5)
    assert probes.weights[2, 2] == 0
    assert probes.weights.dtype == probes.biases.dtype == torch.float32


def test_permuted_examples_give_permuted_scores_and_the_same_probes() -> None:
    given = make_data(per_group=3)
    cells = [ANSWERED if at % 9 == 0 and cell == COMPLIED else cell for at, cell in enumerate(given.cells)]
    given = dataclasses.replace(given, cells=cells)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(4)).tolist()
    probes, again = given.train(), given.select(order).train()
    assert torch.equal(again.weights, probes.weights) and torch.equal(again.biases, probes.biases)
    assert torch.equal(again.out_of_fold, probes.out_of_fold[order])
    assert torch.equal(again.fold, probes.fold[order])
    assert again.metrics == probes.metrics


def test_out_of_fold_scores_come_from_probes_that_never_saw_the_group() -> None:
    given = make_data()
    probes = given.train(shuffles=0)
    groups, folds = np.array(given.groups), probes.fold.numpy()
    assert all(len(set(folds[groups == group])) == 1 for group in given.groups)
    for number in range(probes.folds):
        test = folds == number
        assert np.array(given.refused)[test].mean() == pytest.approx(0.5, abs=0.2)
        inputs = given.states[:, 2].double().numpy()
        weights, bias = fit_logistic(
            inputs[~test], [np.array(given.refused)[~test]], [cell_weights(rows(given, ~test))[0]], C=1
        )
        logits = inputs[test] @ weights[0] + bias[0]
        assert probes.out_of_fold[test, 2].numpy() == pytest.approx(1 / (1 + np.exp(-logits)), abs=2e-6)


def rows(given: Data, mask: np.ndarray) -> LabeledExamples:
    return LabeledExamples(np.array(given.refused), tuple(given.cells), tuple(given.groups)).select(mask)


def test_metrics_tell_signal_from_noise_and_from_nothing() -> None:
    probes = make_data().train()
    nothing, noise, signal = probes.metrics
    assert (nothing.auroc, nothing.auroc_low, nothing.auroc_high, nothing.selectivity) == (0.5, 0.5, 0.5, 0)
    assert nothing.brier == pytest.approx(0.25) and nothing.ece == pytest.approx(0, abs=1e-6)
    assert torch.count_nonzero(probes.weights[0]) == 0
    assert noise.auroc < 0.75 and abs(noise.selectivity or 0) < 0.25
    assert signal.auroc > 0.97 and signal.selectivity is not None and signal.selectivity > 0.3
    held = probes.out_of_fold[:, 2].double().numpy()
    truth = np.array(make_data().refused)
    assert signal.auroc == auroc(held, truth)
    assert signal.accuracy == ((held >= 0.5) == truth).mean() == signal.balanced_accuracy
    assert (signal.accuracy_low, signal.accuracy_high) == wilson_interval(60 * signal.accuracy, 60)
    assert signal.auroc_interval.value == signal.auroc and signal.auroc_interval.low == signal.auroc_low <= 1


@pytest.mark.parametrize("per_group", [1, 4])
def test_shuffled_labels_are_at_chance_however_groups_are_composed(per_group: int) -> None:
    given = make_data(80, 10, per_group=per_group)
    # Groups of four: with two refused and two complied each at 1, else of one kind.
    given = dataclasses.replace(given, states=given.states[:, 2:], groups=[f"g{at // 4}" for at in range(80)])
    (metrics,) = given.train(shuffles=40).metrics
    assert metrics.auroc > 0.97 and metrics.shuffled == pytest.approx(0.5, abs=0.07)
    assert metrics.selectivity == metrics.auroc - (metrics.shuffled or 0)


def test_a_tiny_cell_is_capped_and_the_notes_say_so() -> None:
    given = make_data(120, 5, per_group=1)
    few = dataclasses.replace(given, cells=[ANSWERED, *given.cells[1:]])
    weights, capped = cell_weights(LabeledExamples(np.array(few.refused), tuple(few.cells), tuple(few.groups)))
    assert weights[0] == 10 and capped == (ANSWERED,)
    notes = few.train(shuffles=0).notes
    assert notes == (
        "The examples of harmful/complied are so few that their weight was capped at 10: the cell counts less than "
        "the others of its class.",
    )


def test_too_few_groups_mean_fewer_folds_and_the_notes_say_so() -> None:
    given = make_data(12, 5, per_group=2)  # three groups of each class
    probes = given.train(shuffles=2)
    assert probes.folds == 3 and set(probes.fold.tolist()) == {0, 1, 2}
    assert probes.notes == (
        "5 folds were asked for, 3 were made: refused examples lie in 3 groups and complied ones in 3.",
    )
    assert given.train(folds=3, shuffles=0).notes == ()


def test_progress_counts_layers() -> None:
    import contextlib

    seen: list[Any] = []

    @contextlib.contextmanager
    def progress(label: str, total: int, unit: str = "bytes") -> Any:
        seen.append((label, total, unit))
        yield seen.append

    make_data(20, 4).train(shuffles=0, progress=progress)
    assert seen == [("Training probes", 3, "steps"), 1, 1, 1]


def test_a_missing_class_names_the_cell_to_add() -> None:
    given = make_data(20, 4)
    complied = dataclasses.replace(given, cells=[COMPLIED] * 20)
    with pytest.raises(SurgeryError) as caught:
        complied.train()
    assert str(caught.value) == (
        "no example is refused (there are: harmless/complied 20), and a probe learns from both kinds. "
        "Add harmful/refused examples, or check the labels."
    )
    with pytest.raises(SurgeryError, match=r"no example is complied .* Add harmless/complied examples"):
        dataclasses.replace(given, cells=[REFUSED] * 20).train()


@pytest.mark.parametrize("name", [REFUSED, COMPLIED])
def test_a_class_in_one_group_cannot_be_tested(name: str) -> None:
    given = make_data(20, 4)
    groups = ["same" if cell == name else group for cell, group in zip(given.cells, given.groups, strict=True)]
    with pytest.raises(SurgeryError, match=rf"all {name.split('/')[1]} examples are of one group \('same'\)"):
        dataclasses.replace(given, groups=groups).train()


def test_states_that_are_not_finite_are_refused() -> None:
    given = make_data(20, 4)
    given.states[7, 2, 1], given.states[9, 1, 0] = math.nan, math.inf
    expected = "2 of 20 examples have states that are NaN or infinite; the first is example 7 at layer 2"
    with pytest.raises(SurgeryError, match=expected):
        given.train()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"folds": 1}, "folds: got 1, expected at least 2"),
        ({"shuffles": -1}, "shuffles: got -1, expected at least 0"),
        ({"C": 0.0}, "C: got 0.0, expected a positive number"),
        ({"C": math.nan}, "C: got nan, expected a positive number"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(SurgeryError, match=text):
        make_data(20, 4).train(**options)


def test_lengths_that_differ_are_refused() -> None:
    given = make_data(20, 4)
    with pytest.raises(SurgeryError, match=r"states of shape \[20, 3, 4\] do not fit 20 refused, 19 groups, 20 cells"):
        dataclasses.replace(given, groups=given.groups[1:]).train()


def test_transfer_measures_the_probes_on_other_data() -> None:
    given, other = make_data(), make_data(40, seed=8)
    probes = given.train(shuffles=0)
    metrics = evaluate_transfer(probes, other.states, other.refused, groups=other.groups, cells=other.cells)
    scores = probes.scores(other.states)
    assert metrics[2].auroc == auroc(scores[:, 2], other.refused) > 0.97
    assert metrics[2].accuracy == ((scores[:, 2] >= 0.5).numpy() == np.array(other.refused)).mean()
    assert metrics[2].selectivity is None
    with pytest.raises(SurgeryError, match=r"probes are for 3 layers of 20 numbers, the states have the shape \[40, 2"):
        evaluate_transfer(probes, other.states[:, :2], other.refused, groups=other.groups, cells=other.cells)


def test_confounds_are_named() -> None:
    every = [REFUSED, ANSWERED, "harmless/refused", COMPLIED]
    assert find_confounds(every) == []
    assert find_confounds([REFUSED] * 3 + [COMPLIED] * 4) == [
        "Topic and refusal coincide: all 3 harmful examples are refused and all 4 harmless ones complied with. The "
        "probe may read the topic instead of the refusal; add harmful requests that are answered, or harmless ones "
        "that are refused."
    ]
    assert find_confounds([*every[:2], COMPLIED]) == [
        "No example is harmless/refused: the probe has not seen refusal apart from a harmful topic."
    ]
    assert find_confounds([*every, "unknown/refused", "harmful/unknown"]) == [
        "2 of 6 examples lack a topic or a verdict, so that it is not known whether the probe reads refusal or topic "
        "in them."
    ]
