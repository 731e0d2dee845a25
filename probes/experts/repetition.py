"""Text that has collapsed into repetition: what too strong a reinforcement does to a model.

In come token ids, out comes whether they end in a loop.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_PERIOD = 64  # tokens that a loop may be long
TURNS = 4  # a phrase that is said three times may be rhetoric
LEAST_TOKENS = 16  # of looping text, so that a row of equal digits is none


def is_repetitive(ids: Sequence[int]) -> bool:
    """Whether `ids` end in a passage of at least 16 tokens that repeats itself at least four times."""
    for period in range(1, min(LONGEST_PERIOD, len(ids) // TURNS) + 1):
        length = max(TURNS * period, LEAST_TOKENS)
        if length > len(ids):
            continue
        tail = ids[len(ids) - length :]
        if all(tail[at] == tail[at - period] for at in range(period, length)):
            return True
    return False
