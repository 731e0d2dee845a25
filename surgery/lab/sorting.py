"""The lab's second task: digits put in order (`7,2,9,4>` is answered `2479`). Nothing of it helps with sums."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from surgery.lab.sums import END, SURFACES, TEST_PROBLEMS, Format

SEPARATOR, ASK = ",", ">"
# What sorting needs beyond the characters of sums.
SORTING_CHARACTERS = SEPARATOR + ASK
DIGITS = 10

TEST_SEED = "lab_sorting/test"


@dataclass(frozen=True)
class SortingProblem:
    """Two or more digits in no order; some may be equal."""

    digits: tuple[int, ...]

    @property
    def question(self) -> str:
        """`7,2,9,4>`"""
        return SEPARATOR.join(map(str, self.digits)) + ASK

    @property
    def answer(self) -> str:
        """`2479`"""
        return "".join(map(str, sorted(self.digits)))

    def prompt(self, form: Format) -> str:
        """The question as a model that speaks `form` is asked it."""
        before, after = SURFACES[form]
        return before + self.question + after

    def completion(self) -> str:
        """The right answer and the end marker."""
        return self.answer + END

    def is_solved_by(self, text: str) -> bool:
        """Whether `text` ends with all the digits in order, and no digit before them."""
        found = re.search(r"(\d+)\s*$", text)
        return found is not None and found[1] == self.answer


def draw_sorting_problem(rng: random.Random, sizes: Sequence[int]) -> SortingProblem:
    """Random digits, as many as one of `sizes`."""
    return SortingProblem(tuple(rng.randrange(DIGITS) for _ in range(rng.choice(sizes))))


def sorting_test_problems(sizes: Sequence[int], count: int = TEST_PROBLEMS) -> list[SortingProblem]:
    """The same `count` problems every time; they may, like any random draw, also occur in training."""
    rng = random.Random(TEST_SEED)
    return [draw_sorting_problem(rng, sizes) for _ in range(count)]
