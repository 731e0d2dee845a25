"""How a stage runs its course: its sizes, which windows a process takes, the learning rate of each step, when losses
have come to a plateau, and what makes runs repeatable and safe to interrupt. Nothing here knows of models.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils import deterministic  # its setting is a property of the module, which type checkers do not see

from surgery.growth.plan import GrowthStage, Plateau, StageTraining
from surgery.runtime.environment import n_processes, rank


class Windows(Protocol):
    """Where windows of tokens come from (`surgery.growth.data.token_store.TokenStore`)."""

    @property
    def identity(self) -> str:
        """A hash of all that the tokens follow from."""

    def require(self, n_windows: int) -> None:
        """Sees to it that so many windows can be drawn; all processes call it."""

    def number_of(self, drawn: int) -> int:
        """The number of the window that is drawn as the `drawn`-th of all, from 0."""

    def windows(self, numbers: Sequence[int]) -> Tensor:
        """(n, sequence + 1) int64."""


@dataclass(frozen=True)
class TrainingSchedule:
    """The sizes of a stage's training.

    first_window: how many windows were drawn before. sequence: tokens that a window predicts. batch: windows in a step.
    """

    stage: GrowthStage
    training: StageTraining
    first_window: int
    sequence: int
    batch: int
    seed: int

    @property
    def tokens_per_step(self) -> int:
        """Over all processes."""
        return self.batch * self.sequence

    @property
    def steps(self) -> int:
        """The fewest that see the stage's tokens."""
        return math.ceil(self.stage.tokens / self.tokens_per_step)

    @property
    def share(self) -> int:
        """How many windows of a batch this process takes."""
        return self.batch // n_processes()

    @property
    def part(self) -> int:
        """How many of them it computes at a time."""
        return self.share // self.training.accumulate

    def windows_until(self, step: int) -> int:
        """How many windows are drawn before a step, those before the stage included; its last step at most."""
        return self.first_window + min(step, self.steps) * self.batch

    def parts(self, step: int, store: Windows) -> list[list[int]]:
        """The numbers of the windows that this process computes in a step, part by part."""
        begin = self.first_window + step * self.batch + rank() * self.share
        drawn = range(begin, begin + self.share)
        return [[store.number_of(w) for w in drawn[at : at + self.part]] for at in range(0, self.share, self.part)]


_FILL = "fill_uninitialized_memory"


def learning_rate(step: int, steps: int, training: StageTraining) -> float:
    """The learning rate of step 0 ≤ `step` < `steps`.

    It rises in a line over the first ⌈warmup · steps⌉ steps, to the peak in the last of them, and then follows
    `training.decay` down to final_rate · peak in the last step of all.
    """
    rising = min(math.ceil(training.warmup * steps), steps)
    if step < rising:
        return training.learning_rate * (step + 1) / rising
    done = (step - rising + 1) / (steps - rising)
    shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[training.decay]
    final = 1.0 if training.decay == "constant" else training.final_rate
    return training.learning_rate * (final + (1 - final) * shape)


def has_plateaued(losses: Sequence[float], plateau: Plateau | None, tokens_per_step: int) -> bool:
    """Whether the mean of the last steps, of `plateau.tokens` together, is not `by` below that of as many before."""
    if plateau is None:
        return False
    n = math.ceil(plateau.tokens / tokens_per_step)
    if len(losses) < 2 * n:
        return False
    last, before = math.fsum(losses[-n:]) / n, math.fsum(losses[-2 * n : -n]) / n
    return not last <= before - plateau.by


def step_seed(seed: int, step: int, rank: int) -> int:
    """What torch's generators are seeded with for one step of one process: a state need not hold theirs."""
    return zlib.crc32(f"{seed} {step} {rank}".encode())


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Inside, a CPU computes the same bits each time with as many threads; afterwards torch draws as if nothing was."""
    strict, fill = torch.are_deterministic_algorithms_enabled(), getattr(deterministic, _FILL)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if device.type == "cpu":
            torch.use_deterministic_algorithms(True)
            setattr(deterministic, _FILL, False)  # it would cost a pass over all that is allocated
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(strict)
            setattr(deterministic, _FILL, fill)
