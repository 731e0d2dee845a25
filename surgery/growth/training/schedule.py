"""Training schedule of a stage: step counts, micro-batches, learning rate, plateau detection, seeding.

Nothing here knows of models.
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


class WindowSource(Protocol):
    """A source of token windows, such as `surgery.growth.data.token_store.TokenStore`.

    A window has an index in the source. Training draws windows at positions 0, 1, 2, …; `window_at` maps a position to
    an index, so that a source may repeat or reorder its windows.
    """

    @property
    def identity(self) -> str:
        """A hash of everything that the tokens depend on."""

    def require(self, n_windows: int) -> None:
        """Make sure that the first `n_windows` windows can be drawn; all processes call it."""

    def window_at(self, position: int) -> int:
        """Return the index of the window that is drawn at `position`, counted from 0."""

    def windows(self, indices: Sequence[int]) -> Tensor:
        """Return the windows with these indices: (n, sequence + 1) int64."""


@dataclass(frozen=True)
class TrainingSchedule:
    """The sizes of a stage's training.

    first_window: windows drawn before this stage. sequence: tokens that a window predicts. batch: windows in an
    optimizer step, over all processes.
    """

    stage: GrowthStage
    training: StageTraining
    first_window: int
    sequence: int
    batch: int
    seed: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens in an optimizer step, over all processes."""
        return self.batch * self.sequence

    @property
    def steps(self) -> int:
        """The smallest number of steps that covers the stage's tokens."""
        return math.ceil(self.stage.tokens / self.tokens_per_step)

    @property
    def windows_per_process(self) -> int:
        """Windows of a batch that one process computes."""
        return self.batch // n_processes()

    @property
    def micro_batch(self) -> int:
        """Windows that one process computes at a time."""
        return self.windows_per_process // self.training.accumulate

    def windows_until(self, step: int) -> int:
        """Return how many windows are drawn before `step` (or the stage's end), including those before the stage."""
        return self.first_window + min(step, self.steps) * self.batch

    def micro_batches(self, step: int, store: WindowSource) -> list[list[int]]:
        """Return the window indices that this process computes in `step`, one list per micro-batch."""
        # Processes take consecutive parts of a batch, so that the batch is the same for any number of them.
        begin = self.first_window + step * self.batch + rank() * self.windows_per_process
        indices = [store.window_at(position) for position in range(begin, begin + self.windows_per_process)]
        return [indices[at : at + self.micro_batch] for at in range(0, self.windows_per_process, self.micro_batch)]


def learning_rate(step: int, steps: int, training: StageTraining) -> float:
    """Return the learning rate of step 0 ≤ `step` < `steps`.

    It rises linearly over the first ⌈warmup · steps⌉ steps, to the peak in the last of them, and then follows
    `training.decay` down to final_rate · peak in the last step of all.
    """
    # A warmup of 1 covers all steps, and leaves none for the decay.
    warmup_steps = min(math.ceil(training.warmup * steps), steps)
    if step < warmup_steps:
        return training.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps + 1) / (steps - warmup_steps)
    decay = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[training.decay]
    final = 1.0 if training.decay == "constant" else training.final_rate
    return training.learning_rate * (final + (1 - final) * decay)


def has_plateaued(losses: Sequence[float], plateau: Plateau | None, tokens_per_step: int) -> bool:
    """Return whether the loss has stopped falling.

    That is the case once the mean over the last `plateau.tokens` is not at least `plateau.by` below the mean over as
    many tokens before them.
    """
    if plateau is None:
        return False
    n = math.ceil(plateau.tokens / tokens_per_step)
    # Two full spans are needed to compare.
    if len(losses) < 2 * n:
        return False
    last, before = math.fsum(losses[-n:]) / n, math.fsum(losses[-2 * n : -n]) / n
    return not last <= before - plateau.by


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of torch's generators for one step on one process.

    Seeding every step anew means that a saved state need not hold the generators' own states.
    """
    # Not hash(), which Python salts per process.
    return zlib.crc32(f"{seed} {step} {rank}".encode())


_FILL = "fill_uninitialized_memory"


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Make CPU results bitwise reproducible in the block (for a fixed number of threads).

    Afterwards torch's settings and generators are what they were.
    """
    strict, fill = torch.are_deterministic_algorithms_enabled(), getattr(deterministic, _FILL)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if device.type == "cpu":
            torch.use_deterministic_algorithms(True)
            setattr(deterministic, _FILL, False)  # it would cost a pass over every allocation
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(strict)
            setattr(deterministic, _FILL, fill)
