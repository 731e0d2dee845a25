from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.lab.sums import END, END_THINK, PROMPT_AFFIXES, THINK, Problem, evaluation_problems, final_answer
from surgery.lab.tokenizer import make_tokenizer

problems = st.builds(Problem, st.lists(st.integers(0, 6), min_size=2, max_size=5).map(tuple))


def test_the_chain_of_an_example():
    assert Problem((3, 5, 6)).chain == "3+5=1:1+6=0"


@given(problems)
def test_every_step_of_a_chain_is_right_and_it_ends_in_the_answer(problem):
    steps = [tuple(map(int, re.split(r"[+=]", step))) for step in problem.chain.split(":")]
    assert all((left + right) % 7 == result for left, right, result in steps)
    assert steps[-1][2] == problem.answer == sum(problem.terms) % 7


@given(problems, st.booleans(), st.sampled_from(sorted(PROMPT_AFFIXES)))
def test_the_tokenizer_gives_back_every_prompt_and_completion(problem, direct, prompt_format):
    tokenizer = make_tokenizer(prompt_format, positions=128)
    text = problem.prompt(prompt_format) + problem.completion(direct=direct)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


@given(problems, st.booleans())
def test_a_right_completion_is_judged_right(problem, direct):
    assert final_answer(problem.completion(direct=direct).removesuffix(END)) == problem.answer


@pytest.mark.parametrize("text", ["", f"{THINK}3+", f"{THINK}3+5=1{END_THINK}", "1:"])
def test_an_answer_that_does_not_end_in_a_digit_is_none(text):
    assert final_answer(text) is None


def test_the_test_problems_are_always_the_same():
    drawn = evaluation_problems((4, 5))
    assert len(drawn) == 400
    assert drawn == evaluation_problems((4, 5))
    assert drawn[:20] == evaluation_problems((4, 5), 20)
    assert {len(problem.terms) for problem in drawn} == {4, 5}
