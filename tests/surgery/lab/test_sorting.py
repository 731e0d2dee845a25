from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.lab.sorting import SORTING_CHARACTERS, SortingProblem, sorting_evaluation_problems
from surgery.lab.sums import END
from surgery.lab.tokenizer import make_tokenizer

jumbles = st.builds(SortingProblem, st.lists(st.integers(0, 9), min_size=2, max_size=6).map(tuple))


def test_an_example():
    jumble = SortingProblem((7, 2, 9, 2))
    assert (jumble.question, jumble.answer, jumble.completion()) == ("7,2,9,2>", "2279", f"2279{END}")
    assert jumble.prompt("plain") == "7,2,9,2>"
    assert jumble.prompt("instruct") == "<|user|>7,2,9,2><|end|><|assistant|>"


@given(jumbles)
def test_the_tokenizer_gives_back_every_prompt_and_completion(jumble):
    tokenizer = make_tokenizer("plain", positions=128, extra=SORTING_CHARACTERS)
    text = jumble.prompt("plain") + jumble.completion()
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


@given(jumbles)
def test_a_right_completion_is_judged_right(jumble):
    assert jumble.is_solved_by(jumble.completion().removesuffix(END))


@pytest.mark.parametrize("text", ["", "0123", "12", "2,1", "12>", "<think>12</think>", "012"])
def test_anything_else_is_wrong(text):
    assert not SortingProblem((2, 1, 3)).is_solved_by(text)


def test_the_test_problems_are_always_the_same():
    drawn = sorting_evaluation_problems((4, 5))
    assert len(drawn) == 400
    assert drawn == sorting_evaluation_problems((4, 5))
    assert {len(jumble.digits) for jumble in drawn} == {4, 5}
