"""Promises of probes.experts.repetition: loops are told from rhetoric, whatever comes before them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.experts.repetition import MAX_PERIOD, MIN_REPEATS, MIN_TOKENS, is_repetitive

TOKENS = st.integers(0, 50)


@given(st.lists(TOKENS, max_size=40), st.lists(TOKENS, min_size=4, max_size=MAX_PERIOD), st.integers(MIN_REPEATS, 9))
def test_what_ends_in_four_turns_of_a_phrase_loops(before: list[int], phrase: list[int], turns: int) -> None:
    assert is_repetitive([*before, *phrase * turns])
    assert is_repetitive((*before, *phrase * turns, *phrase[: len(phrase) // 2]))  # cut off within a turn


@given(st.lists(st.integers(0, 5), max_size=200))
def test_it_is_what_its_definition_says(ids: list[int]) -> None:
    def repeats(period: int) -> bool:
        tail = ids[-max(MIN_REPEATS * period, MIN_TOKENS) :]
        enough = len(tail) == max(MIN_REPEATS * period, MIN_TOKENS)
        return enough and all(tail[at] == tail[at % period] for at in range(len(tail)))

    assert is_repetitive(ids) == any(repeats(period) for period in range(1, MAX_PERIOD + 1))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], False),
        ([7] * (MIN_TOKENS - 1), False),
        ([7] * MIN_TOKENS, True),
        ([1, 2, 3, 4, 5] * (MIN_REPEATS - 1), False),
        ([*[1, 2, 3, 4, 5] * MIN_REPEATS, 9], False),  # it got out again
        (list(range(MAX_PERIOD)) * MIN_REPEATS, True),
        (list(range(MAX_PERIOD + 1)) * MIN_REPEATS, False),
        (list(range(1000)), False),
    ],
)
def test_the_edges(ids: list[int], expected: bool) -> None:
    assert is_repetitive(ids) is expected
