"""The lab's second task: sorting digits (`7,2,9,4>` is answered `2479`). Nothing of it helps with sums."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from surgery.lab.sums import END, PROMPT_AFFIXES, TEST_PROBLEMS, PromptFormat

SEPARATOR, ASK = ",", ">"
# Characters that sorting needs beyond those of sums.
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

    def prompt(self, prompt_format: PromptFormat) -> str:
        """Return the question as a model of `prompt_format` is asked it."""
        before, after = PROMPT_AFFIXES[prompt_format]
        return before + self.question + after

    def completion(self) -> str:
        """Return the right answer with the end marker."""
        return self.answer + END

    def is_solved_by(self, text: str) -> bool:
        """Whether `text` ends with all the digits in order, and no digit before them."""
        match = re.search(r"(\d+)\s*$", text)
        return match is not None and match[1] == self.answer


def draw_sorting_problem(rng: random.Random, sizes: Sequence[int]) -> SortingProblem:
    """Draw random digits, as many as one of `sizes`."""
    return SortingProblem(tuple(rng.randrange(DIGITS) for _ in range(rng.choice(sizes))))


def sorting_evaluation_problems(sizes: Sequence[int], count: int = TEST_PROBLEMS) -> list[SortingProblem]:
    """Return the same `count` problems every time; like any random draw, they may also occur in training."""
    rng = random.Random(TEST_SEED)
    return [draw_sorting_problem(rng, sizes) for _ in range(count)]
