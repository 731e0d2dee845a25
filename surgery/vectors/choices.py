"""Closed choices of the vector commands, as `Literal` types; imports nothing heavy, so that `--help` is fast."""

from __future__ import annotations

from typing import Literal

VocabPolicy = Literal["strict", "by-token", "skip-embeddings"]
"""Where tokenizers differ: refuse, align rows by token string, or leave the tensors with a row per token alone."""
