"""Closed choices about texts and models; imports nothing heavy, so that `--help` is fast."""

from __future__ import annotations

from typing import Literal

SpecialTokens = Literal["text", "parse"]
"""What the text of a special token in data is: text like any other, or that token."""
