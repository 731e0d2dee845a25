"""Random numbers that belong to an element of a tensor, not to the order of the work.

A stream is named by (seed, tensor, model), and any part of it can be drawn on its own: a merge is the same on any
number of threads, devices and ranks. PCG64 (O'Neill 2014), whose numpy implementation is stable across versions, is
advanced to the element's place.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from surgery.hashing import hash_text

LEVELS = 1 << 16  # a uniform number is one of so many: a probability is met to 1 / 131,072
_PER_WORD = 4  # 16-bit numbers in what the generator makes at once


def uniforms(seed: int, tensor: str, model: int, begin: int, end: int) -> npt.NDArray[np.uint16]:
    """Independent uniform numbers from {0, …, LEVELS − 1} for the elements [begin, end) of a tensor: (end − begin,)."""
    generator = np.random.PCG64(int(hash_text(f"{seed}/{model}/{tensor}"), 16))
    first = begin // _PER_WORD
    generator.advance(first)
    words = generator.random_raw(-(-end // _PER_WORD) - first)
    # Little-endian on every machine, or the same seed would mean another mask.
    return words.astype("<u8", copy=False).view("<u2")[begin - first * _PER_WORD : end - first * _PER_WORD]
