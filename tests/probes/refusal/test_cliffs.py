"""Cliffs are measured as the paper defines them, traces are aligned at the end, and padding enters no mean."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.data.examples import TokenSequence
from probes.refusal.cliffs import RefusalCliff, count_cells, mean_cliffs, mean_traces, measure_cliff, most_misaligned
from surgery.errors import SurgeryError

CELL = "harmful/complied"


def sequence(prompt, thinking, closing, answer=2, key="x"):
    ends = (prompt, prompt + thinking, prompt + thinking + closing, prompt + thinking + closing + answer)
    return TokenSequence(key, tuple(range(ends[3])), ends)


def measured(scores, prompt, thinking, closing, *, key="x", cell=CELL, group="g"):
    given = sequence(prompt, thinking, closing, answer=len(scores) - prompt - thinking - closing, key=key)
    return measure_cliff(given, scores, cell=cell, group=group)


def test_a_hand_made_cliff_is_measured_as_defined():
    #         prompt      thinking ──────────────────────────────────  closing ──  answer
    scores = [0.1, 0.99, *(0.5, 0.6, 0.7, 0.8, 0.9, 0.8, 0.7, 0.6, 0.8, 0.8), 0.6, 0.2, 0.95]
    found = measured(scores, 2, 10, 2)
    assert found.plateau == 0.9  # neither the prompt's 0.99 nor the answer's 0.95
    assert found.p90 == pytest.approx(0.81)  # between the 9th and the 10th of ten, a tenth of the way
    assert found.last == pytest.approx(np.mean([0.7, 0.8, 0.9, 0.8, 0.7, 0.6, 0.8, 0.8]))
    assert found.final == 0.2
    assert found.misalignment == pytest.approx(0.7)
    assert found.onset == 0  # the middle is 0.55: the token before is still above it
    assert found.thinking == 10
    assert (found.key, found.cell, found.group) == ("x", CELL, "g")


@pytest.mark.parametrize(
    ("scores", "onset"),
    [
        ([0.1, 0.9, 0.9, 0.9, 0.1], 0),
        ([0.1, 0.9, 0.9, 0.1, 0.1], -1),
        ([0.1, 0.9, 0.1, 0.1, 0.1], -2),
        ([0.1, 0.9, 0.1, 0.9, 0.1], 0),  # it came back: the fall that lasts counts
        ([0.9, 0.1, 0.9, 0.1, 0.1], -1),
        ([0.1, 0.9, 0.9, 0.5, 0.1], 0),  # on the middle is not below it
        ([0.5, 0.5, 0.5, 0.5, 0.45], None),  # too small a fall
        ([0.1, 0.2, 0.3, 0.4, 0.9], None),  # a rise
    ],
)
def test_the_onset_is_where_the_score_falls_for_good(scores, onset):
    assert measured(scores, 1, 3, 1).onset == onset


def test_the_end_of_thinking_is_its_last_eight_tokens():
    assert measured([0.0, *(20 * [0.0]), *(8 * [1.0]), 0.5], 1, 28, 1).last == 1.0


def test_without_thinking_there_is_no_plateau():
    found = measured([0.9, 0.8, 0.3], 2, 0, 1)
    assert all(math.isnan(value) for value in (found.plateau, found.p90, found.last, found.misalignment))
    assert (found.final, found.onset, found.thinking) == (0.3, None, 0)


def test_without_a_closing_template_the_last_thought_is_final():
    found = measured([0.1, 0.9, 0.2], 1, 2, 0)
    assert (found.plateau, found.final) == (0.9, 0.2)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_what_comes_after_the_decision_changes_nothing(after):
    scores = [0.1, 0.9, 0.8, 0.2]
    assert measured(scores + after, 1, 2, 1) == measured(scores, 1, 2, 1)


def test_a_trace_that_ends_too_early_is_an_error():
    with pytest.raises(SurgeryError, match="x: its trace has 3 scores, and 4 tokens stand before the answer"):
        measure_cliff(sequence(1, 2, 1), [0.1, 0.9, 0.8], cell=CELL, group="g")


def rows_of(*scores, cell=CELL):
    return [
        measured([0.1, *row, 0.2], 1, len(row), 1, key=str(at), cell=cell, group=str(at))
        for at, row in enumerate(scores)
    ]


def test_cells_are_means_over_examples_with_thinking():
    rows = rows_of([0.9, 0.5], [0.5, 0.7], []) + rows_of([0.3], cell="harmless/complied")
    rows.append(measured([0.1, 0.2], 1, 0, 1, cell="harmless/refused"))
    found = mean_cliffs(rows)
    assert list(found) == ["harmful/complied", "harmless/complied"]  # the cell without any thinking is absent
    cell = found[CELL]
    assert cell.n == 2
    assert cell.plateau.value == pytest.approx(0.8)
    assert cell.misalignment.value == pytest.approx(0.6)
    assert cell.final.value == pytest.approx(0.2)
    assert 0.7 - 1e-12 <= cell.plateau.low <= 0.8 <= cell.plateau.high <= 0.9 + 1e-12
    assert found["harmless/complied"].n == 1


def test_a_cells_onset_is_the_median_of_those_that_fall():
    rows = rows_of([0.9, 0.2], [0.9, 0.9], [0.9, 0.2, 0.2], [0.2, 0.2])
    assert [row.onset for row in rows] == [-1, 0, -2, None]
    assert mean_cliffs(rows)[CELL].onset == -1
    assert mean_cliffs(rows_of([0.2, 0.2]))[CELL].onset is None


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(6)))
def test_the_order_of_examples_changes_nothing(order):
    generator = np.random.default_rng(0)
    lengths = (4, 9, 2, 7, 7, 1)
    sequences = [sequence(2, n, 2, key=str(at)) for at, n in enumerate(lengths)]
    traces = [generator.uniform(size=n + 6) for n in lengths]
    cells = [CELL, CELL, "a", CELL, "a", CELL]

    def found(numbers):
        picked = [sequences[at] for at in numbers], [traces[at] for at in numbers], [cells[at] for at in numbers]
        groups = [f"g{at % 4}" for at in numbers]
        rows = [measure_cliff(s, t, cell=c, group=g) for s, t, c, g in zip(*picked, groups, strict=True)]
        return mean_cliffs(rows), mean_traces(*picked, groups), most_misaligned(rows, 4)

    means, lines, low = found(order)
    expected, drawn, lowest = found(range(6))
    assert low == lowest
    assert list(means) == list(expected)
    for cell, row in means.items():
        assert row.onset == expected[cell].onset
        for name in ("plateau", "p90", "last", "final", "misalignment"):
            a, b = getattr(row, name), getattr(expected[cell], name)
            assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high), rel=1e-12)
        np.testing.assert_allclose(lines[cell].band.mean, drawn[cell].band.mean, rtol=1e-12)
        np.testing.assert_allclose(lines[cell].band.low, drawn[cell].band.low, rtol=1e-12)


def curve_of(traces, closing=1):
    sequences = [sequence(1, len(trace) - closing, closing, answer=1, key=str(at)) for at, trace in enumerate(traces)]
    padded = [np.array([0.5, *trace, 0.5]) for trace in traces]
    return mean_traces(sequences, padded, [CELL] * len(traces), [str(at) for at in range(len(traces))])[CELL]


def test_curves_are_aligned_at_the_end_and_nothing_is_padded():
    found = curve_of([[0.9, 0.9, 0.1], [0.7, 0.3], [0.8, 0.8, 0.2]])
    # Two tokens back all three have a score; further back only two do, and the curve stops.
    assert found.band.mean == pytest.approx([(0.9 + 0.7 + 0.8) / 3, 0.2])
    assert found.band.n.tolist() == [3, 3]
    assert found.closing == 1


def test_a_longer_sequence_changes_no_others_values():
    traces = [[0.9, 0.8, 0.1], [0.7, 0.6, 0.3], [0.8, 0.9, 0.2]]
    before = curve_of(traces)
    after = curve_of([*traces, [*(20 * [0.99]), 0.9, 0.8, 0.1]])
    assert before.band.mean == pytest.approx([0.8, 2.3 / 3, 0.2])
    assert after.band.n.tolist() == [4, 4, 4]  # it reaches no further back: only one trace does
    assert after.band.mean == pytest.approx([(2.4 + 0.9) / 4, (2.3 + 0.8) / 4, (0.6 + 0.1) / 4])


def test_fewer_than_three_traces_reach_back_together():
    found = curve_of([[0.9, 0.5, 0.1], [0.7, 0.3]])
    assert found.band.n.tolist() == [2, 2]
    assert found.band.mean == pytest.approx([0.6, 0.2])


def test_examples_without_thinking_are_left_out_of_curves():
    sequences = [sequence(1, 2, 1, key="a"), sequence(3, 0, 1, key="b")]
    traces = [np.array([0.1, 0.9, 0.8, 0.2, 0.0, 0.0]), np.array(6 * [0.5])]
    found = mean_traces(sequences, traces, [CELL, CELL], ["a", "b"])
    assert found[CELL].band.mean == pytest.approx([0.9, 0.8, 0.2])
    assert mean_traces(sequences[1:], traces[1:], [CELL], ["b"]) == {}


def test_the_worst_have_the_largest_misalignment_ties_by_key():
    base = measured([0.1, 0.9, 0.2], 1, 1, 1)
    rows = [
        replace(base, key=key, misalignment=score) for key, score in (("d", 0.5), ("a", 0.7), ("c", 0.5), ("b", 0.1))
    ]
    rows.append(RefusalCliff("n", CELL, "g", math.nan, math.nan, math.nan, 0.1, math.nan, None, 0))
    assert [row.key for row in most_misaligned(rows, 3)] == ["a", "c", "d"]
    assert [row.key for row in most_misaligned(rows, 9)] == ["a", "c", "d", "b"]  # never one without thinking


def test_cells_are_counted_by_name():
    assert count_cells(["b", "a", "b"]) == {"a": 1, "b": 2}
