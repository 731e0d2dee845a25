"""Attention heads by name: `L12H7` is query head 7 of layer 12, both counted from 0.

In come texts as people type them, out come `Head`s, and how strongly each is to be scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgery.parts import Part, by_layer, parse_factors

__all__ = ["Head", "by_layer", "parse_scales"]


@dataclass(frozen=True, order=True)
class Head(Part):
    """One query head."""

    NOUN, LETTER, SYMBOL, EXAMPLE = "head", "H", "γ", "L12H7"


def parse_scales(texts: Sequence[str], *, scale: float = 0.0) -> dict[Head, float]:
    """`L12H7` or `L12H7=γ` for each of `texts` → head → γ, in the order given; `scale` where a text names no γ.

    Raises:
        SurgeryError: a text is of another form, or a head is given twice with different γ; every fault is named.
    """
    return parse_factors(Head, texts, scale=scale)
