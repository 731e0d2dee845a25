"""The lab's first task: sums modulo 7, answered at once (`0`) or after thinking (`<think>3+5=1:1+6=0</think>0`)."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Below ten, so that every intermediate result is one digit, and thereby one token.
MODULUS = 7

PromptFormat = Literal["plain", "sft", "instruct"]

END = "<|end|>"
QUESTION, ANSWER = "<|question|>", "<|answer|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
MARKERS = (END, QUESTION, ANSWER, USER, ASSISTANT)
# Ordinary tokens, not special ones: they stay readable in decoded answers.
THINK, END_THINK = "<think>", "</think>"
CHARACTERS = "0123456789+=:"

# The text before and after the question in each format.
PROMPT_AFFIXES: dict[PromptFormat, tuple[str, str]] = {
    "plain": ("", ""),
    "sft": (QUESTION, ANSWER),
    "instruct": (USER, END + ASSISTANT),
}

# Test problems are drawn with a seed of their own, apart from every training seed.
TEST_SEED = "lab_sums/test"
# So many that the 95 % interval of a share is at most five points to either side.
TEST_PROBLEMS = 400


@dataclass(frozen=True)
class Problem:
    """A sum of two or more digits below 7."""

    terms: tuple[int, ...]

    @property
    def question(self) -> str:
        """`3+5+6=`"""
        return "+".join(map(str, self.terms)) + "="

    @property
    def answer(self) -> int:
        """The sum modulo 7."""
        return sum(self.terms) % MODULUS

    @property
    def chain(self) -> str:
        """`3+5=1:1+6=0`: one addition at a time, each starting from the last one's result."""
        steps: list[str] = []
        total = self.terms[0]
        for term in self.terms[1:]:
            result = (total + term) % MODULUS
            steps.append(f"{total}+{term}={result}")
            total = result
        return ":".join(steps)

    def prompt(self, prompt_format: PromptFormat) -> str:
        """Return the question as a model of `prompt_format` is asked it."""
        before, after = PROMPT_AFFIXES[prompt_format]
        return before + self.question + after

    def completion(self, *, direct: bool) -> str:
        """Return the right answer with the end marker, at once or after the chain."""
        thinking = "" if direct else THINK + self.chain + END_THINK
        return f"{thinking}{self.answer}{END}"

    def is_solved_by(self, text: str) -> bool:
        """Whether `text` ends with the sum."""
        return final_answer(text) == self.answer


def draw(rng: random.Random, terms: Sequence[int]) -> Problem:
    """Draw a random problem whose number of terms is one of `terms`."""
    return Problem(tuple(rng.randrange(MODULUS) for _ in range(rng.choice(terms))))


def final_answer(text: str) -> int | None:
    """Return the digit that `text` ends with; None if it ends otherwise."""
    # Only the last digit counts: a thinking before it is full of digits.
    match = re.search(r"(\d)\s*$", text)
    return int(match[1]) if match else None


def evaluation_problems(terms: Sequence[int], count: int = TEST_PROBLEMS) -> list[Problem]:
    """Return the same `count` problems every time; like any random draw, they may also occur in training."""
    rng = random.Random(TEST_SEED)
    return [draw(rng, terms) for _ in range(count)]
