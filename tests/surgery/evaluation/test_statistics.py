"""Statistics equal brute force, and intervals cover the truth about as often as they claim."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from surgery.errors import SurgeryError
from surgery.evaluation import statistics
from surgery.evaluation.statistics import (
    align_ends,
    auroc,
    bootstrap_auroc,
    bootstrap_mean,
    brier,
    ece,
    percentile_interval,
    spearman,
    wilson_interval,
)

labelled_scores = st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.integers(0, 3)), min_size=2, max_size=30)


def by_pairs(scores: list[int], positive: list[bool], weights: list[int]) -> float:
    above, below = ([at for at, truth in enumerate(positive) if truth == side] for side in (True, False))
    wins = pairs = 0.0
    for i, j in product(above, below):
        pairs += weights[i] * weights[j]
        wins += weights[i] * weights[j] * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
    return wins / pairs if pairs else math.nan


@given(labelled_scores)
def test_auroc_is_the_share_of_pairs_in_order_with_ties_as_halves(rows: list[tuple[int, bool, int]]) -> None:
    scores, positive, weights = map(list, zip(*rows, strict=True))
    expected = by_pairs(scores, positive, weights)
    if math.isnan(expected):
        with pytest.raises(SurgeryError, match="needs examples of both classes"):
            auroc(scores, positive, weights=weights)
    else:
        assert auroc(scores, positive, weights=weights) == pytest.approx(expected, abs=1e-12)


def test_auroc_refuses_nan_and_mismatched_lengths() -> None:
    with pytest.raises(SurgeryError, match="a score is NaN"):
        auroc([0.1, math.nan], [True, False])
    with pytest.raises(SurgeryError, match="got 2 scores for 1 verdicts"):
        auroc([0.1, 0.2], [True])


def test_the_bootstrap_draws_groups_and_does_not_look_at_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    groups = [f"g{at % 10}" for at in range(60)]
    truth = np.arange(60) % 10 < 5
    scores = generator.normal(size=10)[np.arange(60) % 10] + truth  # all of a group's examples score the same
    found = bootstrap_auroc(scores, truth, groups=groups, seed=3)
    order = generator.permutation(60)
    again = bootstrap_auroc(scores[order], truth[order], groups=[groups[at] for at in order], seed=3)
    assert again == found
    alone = bootstrap_auroc(scores, truth, groups=[str(at) for at in range(60)], seed=3)
    assert found.high - found.low > 1.5 * (alone.high - alone.low)
    monkeypatch.setattr(statistics, "MOST_NUMBERS", 600)
    assert bootstrap_auroc(scores, truth, groups=groups, seed=3) == found


def test_auroc_intervals_hold_the_truth() -> None:
    generator = np.random.default_rng(0)
    truth, names = np.arange(100) % 2 == 0, [str(at) for at in range(100)]
    held = 0
    for _ in range(100):
        estimate = bootstrap_auroc(generator.normal(size=100) + truth, truth, groups=names, resamples=200)
        held += estimate.low <= 0.7602 <= estimate.high  # Φ(1/√2)
    assert 88 <= held <= 100


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_agrees_with_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@settings(deadline=None)  # the first import of scipy.stats takes longer
@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys_and_contains_the_share(case: tuple[int, int]) -> None:
    from scipy.stats import binomtest

    successes, n = case
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert low < high
    expected = binomtest(successes, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-14)


def test_calibration_error_by_hand() -> None:
    # Bin [0, 0.1): mean 0.05, no positive. Bin [0.9, 1]: mean 0.95, one of two positive. 0.3 is a bin's lower end.
    probabilities, truth = [0.05, 0.9, 1.0, 0.3], [False, True, False, False]
    assert ece(probabilities, truth) == pytest.approx((0.05 + 2 * 0.45 + 0.3) / 4)
    assert ece(probabilities, truth, weights=[1, 2, 0, 1]) == pytest.approx((0.05 + 2 * 0.1 + 0.3) / 4)
    assert brier(probabilities, truth) == pytest.approx((0.05**2 + 0.1**2 + 1 + 0.09) / 4)
    assert brier(probabilities, truth, weights=[0, 1, 0, 0]) == pytest.approx(0.01)


@given(hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1)), st.integers(1, 12))
def test_calibration_error_is_what_a_loop_over_bins_finds(probabilities: np.ndarray, bins: int) -> None:
    truth = np.arange(len(probabilities)) % 3 == 0
    expected = 0.0
    for at in range(bins):
        inside = [min(int(p * bins), bins - 1) == at for p in probabilities]
        if any(inside):
            expected += abs(probabilities[inside].mean() - truth[inside].mean()) * sum(inside) / len(inside)
    assert ece(probabilities, truth, bins=bins) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=25))
def test_spearman_is_scipys(pairs: list[tuple[int, int]]) -> None:
    from scipy.stats import spearmanr

    x, y = (list(side) for side in zip(*pairs, strict=True))
    found = spearman(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(found.value)
    else:
        assert found.value == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
        assert math.isnan(found.low) == (len(x) < 4)
        if len(x) >= 4:
            assert -1 <= found.low <= found.value + 1e-9 and found.value - 1e-9 <= found.high <= 1


def test_spearman_intervals_hold_the_truth() -> None:
    generator = np.random.default_rng(0)
    rho, held = 0.6, 0
    truth = 6 / math.pi * math.asin(rho / 2)  # of a bivariate normal
    for _ in range(200):
        x, noise = generator.normal(size=(2, 50))
        estimate = spearman(x, rho * x + math.sqrt(1 - rho * rho) * noise)
        held += estimate.low <= truth <= estimate.high
    assert 183 <= held <= 199


def test_spearman_refuses_what_has_no_ranks() -> None:
    with pytest.raises(SurgeryError, match="as many numbers on both sides, and no NaN"):
        spearman([1.0, 2.0], [1.0])
    with pytest.raises(SurgeryError, match="no NaN"):
        spearman([1.0, math.nan], [1.0, 2.0])


def test_percentiles_interpolate_and_leave_nan_out() -> None:
    assert percentile_interval([*range(101), math.nan]) == pytest.approx((2.5, 97.5))
    assert percentile_interval([1.0, 3.0], level=0.5) == pytest.approx((1.5, 2.5))
    assert all(math.isnan(end) for end in percentile_interval([math.nan]))


def test_traces_end_together() -> None:
    values, mask = align_ends([[1.0], [2.0, 3.0, 4.0], []])
    assert values.tolist() == [[0, 0, 1], [2, 3, 4], [0, 0, 0]]
    assert mask.tolist() == [[False, False, True], [True, True, True], [False, False, False]]
    with pytest.raises(SurgeryError, match="no trace"):
        align_ends([])


def test_the_mean_is_over_what_is_there_and_never_over_padding() -> None:
    values, mask = align_ends([[0.5] * length for length in (2, 3, 5, 9)])
    band = bootstrap_mean(values, mask)
    assert band.n.tolist() == [1, 1, 1, 1, 2, 2, 3, 4, 4]
    assert band.mean.tolist() == [0.5] * 9  # zeros of padding would make it rise
    assert np.isnan(band.low[:4]).all() and np.isnan(band.high[:4]).all()
    assert band.low[4:].tolist() == band.high[4:].tolist() == [0.5] * 5


def test_the_band_is_that_of_drawing_traces_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(5)
    lengths = generator.integers(2, 12, size=40)
    values, mask = align_ends([generator.normal(size=length) for length in lengths])
    band = bootstrap_mean(values, mask, resamples=4000)
    column = values[:, -3][mask[:, -3]]
    means = [generator.choice(column, size=len(column)).mean() for _ in range(4000)]
    assert band.mean[-3] == pytest.approx(column.mean())
    assert (band.low[-3], band.high[-3]) == pytest.approx(percentile_interval(means), abs=0.03)
    monkeypatch.setattr(statistics, "MOST_NUMBERS", 12000)
    parts = bootstrap_mean(values, mask, resamples=4000)
    assert parts.low == pytest.approx(band.low, abs=1e-12)
    assert parts.high == pytest.approx(band.high, abs=1e-12)


def test_groups_widen_the_band_and_order_does_not_matter() -> None:
    generator = np.random.default_rng(6)
    values = np.repeat(generator.normal(size=(8, 1)), 5, axis=0)
    groups = [f"g{at // 5}" for at in range(40)]
    grouped, alone = bootstrap_mean(values, groups=groups), bootstrap_mean(values)
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)
    order = generator.permutation(40)
    again = bootstrap_mean(values[order], groups=[groups[at] for at in order])
    assert again.low == pytest.approx(grouped.low, abs=1e-12)
    one = bootstrap_mean(values, groups=["g"] * 40)
    assert math.isnan(one.low[0]) and one.n[0] == 40


def test_traces_that_cannot_be_averaged_are_refused() -> None:
    with pytest.raises(SurgeryError, match=r"shape \[2, 3\] under a mask of shape \[2, 2\]"):
        bootstrap_mean(np.zeros((2, 3)), np.ones((2, 2), dtype=bool))
    with pytest.raises(SurgeryError, match="in 1 groups"):
        bootstrap_mean(np.zeros((2, 3)), groups=["a"])
    with pytest.raises(SurgeryError, match="a trace holds NaN"):
        bootstrap_mean([[math.nan]])
    assert bootstrap_mean([[math.nan, 1.0]], [[False, True]]).mean.tolist()[1] == 1.0
