"""Closed choices of the merging commands, as `Literal` types; imports nothing heavy, so that `--help` is fast."""

from __future__ import annotations

from typing import Literal

Compat = Literal["mergekit", "paper"]
"""Whose arithmetic a merge follows where mergekit and a method's paper differ."""

AveragingMode = Literal["logits", "logprobs", "probs"]
"""What a logit ensemble averages."""

TuneWhat = Literal["weights", "head"]
"""What is fitted to text: one weight per member, or a matrix on all hidden states."""
