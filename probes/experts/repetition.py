"""Detect text that has degenerated into repetition, as too strong a scaling of experts makes a model write."""

from __future__ import annotations

from collections.abc import Sequence

MAX_PERIOD = 64  # tokens of the repeated passage
MIN_REPEATS = 4  # a phrase that occurs three times may be rhetoric
MIN_TOKENS = 16  # of repeated text in all, so that a number with equal digits is none


def is_repetitive(ids: Sequence[int]) -> bool:
    """Return whether token ids end in at least 16 tokens in which a passage is repeated at least four times."""
    # Only the end counts: a text that found its way out of a loop has not collapsed.
    for period in range(1, min(MAX_PERIOD, len(ids) // MIN_REPEATS) + 1):
        length = max(MIN_REPEATS * period, MIN_TOKENS)
        if length > len(ids):
            continue
        tail = ids[len(ids) - length :]
        if all(tail[index] == tail[index - period] for index in range(period, length)):
            return True
    return False
