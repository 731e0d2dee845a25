"""The lab's task: sums modulo 7, answered at once (`0`) or after thinking (`<think>3+5=1:1+6=0</think>0`)."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MODULUS = 7

Format = Literal["plain", "sft", "instruct"]

END = "<|end|>"
QUESTION, ANSWER = "<|question|>", "<|answer|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
MARKERS = (END, QUESTION, ANSWER, USER, ASSISTANT)
# Ordinary tokens, not special ones: they stay readable in decoded answers.
THINK, THOUGHT = "<think>", "</think>"
CHARACTERS = "0123456789+=:"

# What stands before and after the question in each format.
SURFACES: dict[Format, tuple[str, str]] = {
    "plain": ("", ""),
    "sft": (QUESTION, ANSWER),
    "instruct": (USER, END + ASSISTANT),
}

# Problems that people are tested on are drawn with a seed of their own, apart from every training seed.
TEST_SEED = "lab_sums/test"
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

    def prompt(self, form: Format) -> str:
        """The question as a model that speaks `form` is asked it."""
        before, after = SURFACES[form]
        return before + self.question + after

    def completion(self, *, direct: bool) -> str:
        """The right answer, written at once or after the chain, and the end marker."""
        thought = "" if direct else THINK + self.chain + THOUGHT
        return f"{thought}{self.answer}{END}"

    def is_solved_by(self, text: str) -> bool:
        """Whether `text` ends with the sum."""
        return final_answer(text) == self.answer


def draw(rng: random.Random, terms: Sequence[int]) -> Problem:
    """A random problem whose number of terms is one of `terms`."""
    return Problem(tuple(rng.randrange(MODULUS) for _ in range(rng.choice(terms))))


def final_answer(text: str) -> int | None:
    """The digit that `text` ends with; None where it ends otherwise."""
    found = re.search(r"(\d)\s*$", text)
    return int(found[1]) if found else None


def test_problems(terms: Sequence[int], count: int = TEST_PROBLEMS) -> list[Problem]:
    """The same `count` problems every time; they may, like any random draw, also occur in training."""
    rng = random.Random(TEST_SEED)
    return [draw(rng, terms) for _ in range(count)]
