"""Scores of experts: the published formula to the last digit, and ranks that chance does not give."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.experts.association import npmi
from probes.experts.scoring import (
    ExpertScores,
    Support,
    check_markers,
    ranking_overlap,
    score_experts,
)
from probes.model.routing import Marker, RoutingCounts
from surgery.checkpoint.selectors import Expert
from surgery.errors import SurgeryError

THINK = Marker("<think>", 1.0, ((1,),))
CLOSE = Marker("</think>", -1.0, ((2,),))
ALTERNATIVELY = Marker("Alternatively", -1.0, ((3,),))
MARKERS = (THINK, CLOSE, ALTERNATIVELY)
ANY = Support(fires=0, at_marker=0, blocks=0, rate=1.0)


def counts_of(table: np.ndarray, positions: np.ndarray, experts: Sequence[int] | None = None) -> RoutingCounts:
    """Counts from hits (G, L, E, C) and positions (G, C), all of them in the thinking; layers 1, 3, 5 …"""
    blocks, layers, widest, classes = table.shape
    hits = torch.zeros(blocks, layers, widest, 3, classes, dtype=torch.int64)
    hits[:, :, :, 1] = torch.from_numpy(table)
    where = torch.zeros(blocks, 3, classes, dtype=torch.int64)
    where[:, 1] = torch.from_numpy(positions)
    numbers = tuple(range(1, 2 * layers, 2))
    return RoutingCounts(hits, where, numbers, tuple(experts or (widest,) * layers), (2,) * layers, blocks)


def drawn(
    rates: np.ndarray, at_think: np.ndarray | None = None, *, seed: int = 0, blocks: int = 20, rest: int = 3000
) -> RoutingCounts:
    """Experts (L, E) that fire at these rates, and at `<think>` at others: 20 markers of each kind in each block."""
    generator = np.random.default_rng(seed)
    sizes = [rest, 20, 20, 20]
    chances = [rates, rates if at_think is None else at_think, rates, rates]
    parts = [generator.binomial(n, p, (blocks, *rates.shape)) for n, p in zip(sizes, chances, strict=True)]
    table = np.stack([sum(parts), *parts[1:]], axis=-1)
    return counts_of(table, np.tile([sum(sizes), *sizes[1:]], (blocks, 1)))


def by_hand(k: int, m: int, fires: int, total: int) -> float:
    """The formula with exact fractions under its logarithms."""
    if not fires:
        return 0.0
    if not k:
        return -1.0
    if k == total:
        return 0.0
    pmi = math.log2(Fraction(k, m) / Fraction(fires, total))
    return pmi / -math.log2(Fraction(k, total))


def numbers_of(row: ExpertScores) -> list[float]:
    """All that is said of an expert, but for its name and the words; −1 for no rank."""
    ranks = [-1 if rank is None else rank for rank in (row.rank, row.rank_low, row.rank_high)]
    scores = [row.npmi, *row.by_marker, row.smoothed, row.low, row.high, row.difference, row.rate, row.q]
    return [*scores, row.fires, row.at_marker, *ranks, row.published_rank]


@st.composite
def quadruples(draw: st.DrawFn) -> tuple[int, int, int, int]:
    total = draw(st.integers(1, 10**9))
    m, fires = draw(st.integers(1, total)), draw(st.integers(0, total))
    return draw(st.integers(max(0, m + fires - total), min(m, fires))), m, fires, total


@given(quadruples())
def test_npmi_is_the_published_formula(numbers: tuple[int, int, int, int]) -> None:
    k, m, fires, total = numbers
    found = float(npmi(k, m, fires, total))
    # Where k is nearly T the formula divides two small numbers.
    within = 1e-12 if k in (0, total) else 1e-12 + 5e-14 / math.log2(Fraction(total, k))
    assert found == pytest.approx(by_hand(k, m, fires, total), abs=within)
    assert -1 - within <= found <= 1 + within


def test_npmi_at_its_edges() -> None:
    assert npmi(0, 10, 10, 100) == -1  # never together
    assert npmi(100, 100, 100, 100) == 0  # everywhere
    assert npmi(10, 10, 10, 100) == 1  # there and nowhere else
    assert npmi(0, 10, 0, 100) == 0  # never fires
    assert npmi(0, 0, 10, 100) == 0  # no marker
    assert npmi(5, 10, 50, 100) == pytest.approx(0, abs=1e-15)  # independent


def test_published_scores_risk_differences_and_counts_are_those_of_brute_force() -> None:
    generator = np.random.default_rng(3)
    at = generator.integers(0, 6, (5, 2, 4, 3))
    table = np.concatenate([at.sum(-1, keepdims=True) + generator.integers(0, 30, (5, 2, 4, 1)), at], axis=-1)
    table[:, 0, 2] = 0
    positions = np.tile([60, 7, 6, 5], (5, 1))
    rows = {row.name: row for row in score_experts(counts_of(table, positions, [4, 3]), MARKERS, resamples=10)}
    assert sorted(rows) == [Expert(1, e) for e in range(4)] + [Expert(3, e) for e in range(3)]
    for name, row in rows.items():
        fires, *ks = (int(n) for n in table[:, (name.layer - 1) // 2, row.expert].sum(0))
        expected = [by_hand(k, m, fires, 300) for k, m in zip(ks, (35, 30, 25), strict=True)]
        assert row.by_marker == pytest.approx(expected, abs=1e-14)
        assert row.npmi == pytest.approx(expected[0] - expected[1] - expected[2], abs=1e-14)
        gaps = [k / m - (fires - k) / (300 - m) for k, m in zip(ks, (35, 30, 25), strict=True)]
        assert row.difference == pytest.approx(gaps[0] - gaps[1] - gaps[2], abs=1e-14)
        assert (row.fires, row.at_marker, row.rate) == (fires, ks[0], fires / 300)
        assert row.published_rank == 1 + sum(other.npmi > row.npmi for other in rows.values())


def test_one_activation_on_one_marker_scores_high_as_published_and_is_not_ranked() -> None:
    """30 `<think>` in 277,000 positions: the expert that fires at one of them and never else."""
    table, positions = np.zeros((20, 1, 3, 2), np.int64), np.zeros((20, 2), np.int64)
    positions[:] = 13_850, 1
    positions[:10, 1] = 2
    table[0, 0, 0] = 1, 1
    table[:, 0, 1] = np.stack([np.full(20, 1500), positions[:, 1]], axis=-1)  # at every marker, and at 11 % of all
    table[:, 0, 2] = 1500, 0
    true, artefact, never = score_experts(counts_of(table, positions), [THINK])
    assert artefact.name == Expert(1, 0)
    assert artefact.npmi == pytest.approx(0.729, abs=0.001) and artefact.published_rank == 1
    assert artefact.rank is None and artefact.why == "fires at 1 positions, fewer than 50"
    assert true.name == Expert(1, 1) and (true.rank, true.published_rank, true.why) == (1, 2, None)
    assert true.npmi == pytest.approx(by_hand(30, 30, 30_000, 277_000), abs=1e-14)
    assert never.why == "fires at 0 positions of '<think>', fewer than 10" and never.npmi == -1

    # Without any minimum of support the tests alone hold it back.
    unsupported = score_experts(counts_of(table, positions), [THINK], support=Support(0, 0, 0))
    assert [row.name for row in unsupported if row.rank is not None] == [Expert(1, 1)]


def test_an_expert_that_fires_at_no_marker_gains_nothing_by_negative_weights() -> None:
    """−1 at each of three markers makes +1 in all, as published."""
    rates = np.full((1, 12), 0.1)
    counts = drawn(rates)
    counts.hits[:, 0, 5, 1, 0] = 40
    counts.hits[:, 0, 5, 1, 1:] = 0
    row = next(row for row in score_experts(counts, MARKERS, support=ANY, resamples=50) if row.expert == 5)
    assert row.npmi == 1 and row.published_rank == 1
    assert row.q == 1
    assert next(row for row in score_experts(counts, MARKERS, resamples=50) if row.expert == 5).rank is None


def test_a_planted_expert_comes_first_with_its_rank_known() -> None:
    rates = np.full((4, 8), 0.1)
    at_think = rates.copy()
    at_think[2, 5], at_think[1, 3] = 1.0, 0.4
    first, second, *others = score_experts(drawn(rates, at_think), MARKERS)
    assert (first.name, first.rank, first.rank_low, first.rank_high) == (Expert(5, 5), 1, 1, 1)
    assert (second.name, second.rank, second.rank_low, second.rank_high) == (Expert(3, 3), 2, 2, 2)
    assert first.low < first.smoothed < first.high and second.high < first.low
    assert first.q < 1e-6 and first.published_rank == 1
    assert [row.rank for row in others] == [None] * 30
    assert [row.npmi for row in others] == sorted((row.npmi for row in others), reverse=True)
    assert all("false-discovery rate" in str(row.why) for row in others)


def test_the_interval_of_a_rank_is_wide_among_equals() -> None:
    at_think = np.full((1, 10), 0.3)
    rows = score_experts(drawn(np.full((1, 10), 0.1), at_think), MARKERS)
    assert [row.rank for row in rows] == list(range(1, 11))
    assert [row.smoothed for row in rows] == sorted((row.smoothed for row in rows), reverse=True)
    for row in rows:
        assert row.rank_low is not None and row.rank_high is not None
        assert 1 <= row.rank_low <= row.rank_high <= 10 and row.rank_high - row.rank_low >= 3


@pytest.mark.parametrize("low", [0.0005, 0.05])
def test_chance_is_ranked_no_more_often_than_said(low: float) -> None:
    """Independent experts, rare ones or not, with the support that they have: any ranked is a false discovery."""
    generator = np.random.default_rng(1)
    runs = 40
    falsely = 0
    for seed in range(runs):
        counts = drawn(generator.uniform(low, 2 * low, (2, 32)), seed=seed, rest=500)
        rows = score_experts(counts, MARKERS, support=Support(0, 0, 0), resamples=2)
        falsely += any(row.rank is not None for row in rows)
    assert falsely <= 0.05 * runs + 3 * math.sqrt(0.05 * 0.95 * runs)


def test_an_expert_of_a_few_documents_is_not_taken_for_one_of_many() -> None:
    """All 40 of its hits at the marker lie in two of twenty blocks: by counts alone that would be overwhelming."""
    counts = drawn(np.full((1, 16), 0.02))
    counts.hits[:, 0, 7, 1, 1] = 0
    counts.hits[:2, 0, 7, 1, 1] = 20
    row = next(row for row in score_experts(counts, MARKERS) if row.expert == 7)
    assert row.rank is None and row.why == "fires at '<think>' in 2 blocks of texts, fewer than 3"


@given(extra=st.integers(0, 5), factor=st.integers(2, 50), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_published_scores_depend_on_shares_and_nothing_on_order(extra: int, factor: int, seed: int) -> None:
    rates = np.random.default_rng(seed).uniform(0.02, 0.5, (2, 6))
    counts = drawn(rates, seed=seed, blocks=6, rest=200)
    rows = {row.name: row for row in score_experts(counts, MARKERS, support=ANY, resamples=20)}

    order = np.random.default_rng(seed).permutation(6)
    permuted = score_experts(replace(counts, hits=counts.hits[:, :, order]), MARKERS, support=ANY, resamples=20)
    for row in permuted:
        one = rows[Expert(row.layer, int(order[row.expert]))]
        assert numbers_of(row) == pytest.approx(numbers_of(one), abs=1e-12)

    # Every count so many times as large: p(E | x), p(E) stay, and so do the joint probabilities.
    larger = replace(counts, hits=counts.hits * factor, positions=counts.positions * factor)
    for row in score_experts(larger, MARKERS, support=ANY, resamples=20):
        assert row.by_marker == pytest.approx(rows[row.name].by_marker, abs=1e-12)
        assert row.difference == pytest.approx(rows[row.name].difference, abs=1e-12)

    # Documents in which no expert fires and no marker stands: K, M and k stay, T grows.
    more = counts.positions.clone()
    more[0, 1, 0] += 500 * extra
    total = int(more[:, 1, 0].sum())
    for row in score_experts(replace(counts, positions=more), MARKERS, support=ANY, resamples=20):
        k = counts.hits[:, (row.layer - 1) // 2, row.expert, 1].sum(0).tolist()
        assert row.by_marker == pytest.approx([by_hand(n, 120, k[0], total) for n in k[1:]], abs=1e-12)
        assert row.fires == k[0] and row.rate == k[0] / total


def test_smoothing_draws_towards_independence_and_never_lifts_what_is_rare() -> None:
    """20 markers in 277,000 positions; one expert fires at 50 positions, of which none is a marker's."""
    table, positions = np.zeros((10, 1, 2, 2), np.int64), np.tile([27_700, 2], (10, 1))
    table[:, 0] = [[5, 0], [3000, 2]]
    scores = [
        {row.expert: row for row in score_experts(counts_of(table, positions), [THINK], smoothing=s, resamples=2)}
        for s in (0.0, 0.5, 5.0)
    ]
    assert [rows[0].npmi for rows in scores] == [-1] * 3
    assert scores[0][0].smoothed == -1 < scores[1][0].smoothed < scores[2][0].smoothed < 0
    assert scores[0][1].smoothed == pytest.approx(scores[0][1].npmi, abs=1e-14)
    assert scores[0][1].smoothed > scores[1][1].smoothed > scores[2][1].smoothed > 0


def test_an_expert_that_never_fires_scores_nothing() -> None:
    counts = drawn(np.full((1, 4), 0.2))
    counts.hits[:, :, 2] = 0
    row = next(row for row in score_experts(counts, MARKERS, resamples=20) if row.expert == 2)
    assert (row.npmi, row.by_marker, row.smoothed, row.low, row.high) == (0, (0, 0, 0), 0, 0, 0)
    assert (row.q, row.difference, row.rank) == (1, 0, None)


def test_only_the_chosen_parts_count() -> None:
    counts = drawn(np.full((1, 4), 0.2))
    whole = score_experts(counts, MARKERS, resamples=20)
    noisy = replace(counts, hits=counts.hits.clone(), positions=counts.positions.clone())
    noisy.hits[:, :, :, 0, 0], noisy.positions[:, 0, 0] = 70, 100
    assert score_experts(noisy, MARKERS, parts=["thinking"], resamples=20) == whole
    assert score_experts(noisy, MARKERS, resamples=20) != whole
    with pytest.raises(SurgeryError, match="--token: '<think>' never occurs in prompt, answer"):
        score_experts(noisy, MARKERS, parts=["prompt", "answer"])


def test_one_block_of_documents_gives_scores_without_intervals_or_ranks() -> None:
    rows = score_experts(drawn(np.full((1, 3), 0.2), np.full((1, 3), 0.9), blocks=1), MARKERS, support=ANY)
    assert [row.q for row in rows] == [1, 1, 1] and all(math.isnan(row.low) and math.isnan(row.high) for row in rows)
    assert [(row.rank, row.rank_low, row.rank_high) for row in rows] == [(at, None, None) for at in (1, 2, 3)]
    assert all(row.rank is None for row in score_experts(drawn(np.full((1, 3), 0.2), blocks=1), MARKERS))


def test_blocks_that_agree_to_the_last_digit_are_sure() -> None:
    table = np.zeros((4, 1, 2, 2), np.int64)
    table[:, 0] = [[100, 20], [100, 2]]
    first, second = score_experts(counts_of(table, np.tile([1000, 20], (4, 1))), [THINK])
    assert (first.rank, first.low, first.high) == (1, pytest.approx(first.smoothed), pytest.approx(first.smoothed))
    assert second.rank is None and second.q == 1  # at the marker as anywhere


def test_results_repeat_and_can_be_written_as_json() -> None:
    counts = drawn(np.full((2, 4), 0.1), np.full((2, 4), 0.3))
    rows = score_experts(counts, MARKERS, seed=5)
    assert rows == score_experts(counts, MARKERS, seed=5)
    assert [row.smoothed for row in rows] == [row.smoothed for row in score_experts(counts, MARKERS, seed=6)]
    assert json.loads(json.dumps([asdict(row) for row in rows], allow_nan=False))[0]["rank"] == 1
    json.dumps(asdict(ranking_overlap(rows, rows, 2)), allow_nan=False)


def test_wide_models_are_resampled_in_pieces_to_the_same_end(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = drawn(np.full((2, 8), 0.1), np.full((2, 8), 0.3))
    whole = score_experts(counts, MARKERS, resamples=100)
    monkeypatch.setattr("probes.experts.significance.MOST_NUMBERS", 3 * 100 * 3)
    for row, one in zip(score_experts(counts, MARKERS, resamples=100), whole, strict=True):
        assert (row.name, row.why) == (one.name, one.why) and numbers_of(row) == pytest.approx(
            numbers_of(one), abs=1e-12
        )


def test_overlap_of_two_data_sets() -> None:
    rates, at_think = np.full((1, 10), 0.1), np.full((1, 10), 0.1)
    at_think[0, [1, 4, 7]] = 0.9, 0.7, 0.5
    a = score_experts(drawn(rates, at_think, seed=1), MARKERS)
    at_think[0, [4, 9]] = 0.1, 0.8
    b = score_experts(drawn(rates, at_think, seed=2), MARKERS)
    found = ranking_overlap(a, b, 3)
    assert found.shared == (Expert(1, 1), Expert(1, 7)) and found.jaccard == 0.5 and found.top == 3
    assert 0 < found.spearman.value < 1
    same = ranking_overlap(a, a, 3)
    assert (same.jaccard, same.spearman.value) == (1, 1) and len(same.shared) == 3
    nothing = [replace(row, rank=None) for row in a]
    assert ranking_overlap(nothing, a, 3).jaccard == 0 == ranking_overlap(nothing, nothing, 3).jaccard
    with pytest.raises(SurgeryError, match="scores of 10 and 9 experts"):
        ranking_overlap(a, b[1:], 3)
    with pytest.raises(SurgeryError, match="--top: got 0, expected a number of experts from 1 on"):
        ranking_overlap(a, b, 0)


def scored(markers: Sequence[Marker] = MARKERS, **settings: object) -> list[ExpertScores]:
    return score_experts(drawn(np.full((1, 2), 0.2), blocks=3), markers, **settings)  # type: ignore[arg-type]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(SurgeryError, match="got 2 markers for counts of 3"):
        scored(MARKERS[:2])
    with pytest.raises(
        SurgeryError, match=r"--token: got -1\*</think>, -1\*Alternatively, expected finite weights, one"
    ):
        check_markers(MARKERS[1:])
    with pytest.raises(SurgeryError, match="got no marker, expected finite weights"):
        scored([])
    with pytest.raises(SurgeryError, match=r"got inf\*<think>"):
        scored([replace(THINK, weight=math.inf), *MARKERS[1:]])
    with pytest.raises(SurgeryError, match="parts: got thoughts, expected each once, of prompt, thinking, answer"):
        scored(parts=["thoughts"])
    with pytest.raises(SurgeryError, match="parts: got none"):
        scored(parts=[])
    with pytest.raises(SurgeryError, match="parts: got prompt, prompt"):
        scored(parts=["prompt", "prompt"])
    with pytest.raises(SurgeryError, match="smoothing: got -1, expected a finite number from 0 on"):
        scored(smoothing=-1)
    with pytest.raises(SurgeryError, match="resamples: got 0"):
        scored(resamples=0)
    with pytest.raises(SurgeryError, match=r"support: got Support.*rate=0"):
        scored(support=Support(rate=0))
