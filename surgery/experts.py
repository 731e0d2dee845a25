"""Routed experts by name: `L12E45` is expert 45 of layer 12, both counted from 0.

In come texts as people type them, out come `Expert`s, and how strongly each is to be scaled. An expert's number is that
of its row in the router. Shared experts, which every token passes, have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgery.parts import Part, by_layer, parse_factors

__all__ = ["Expert", "by_layer", "parse_scales"]


@dataclass(frozen=True, order=True)
class Expert(Part):
    """One routed expert."""

    NOUN, LETTER, SYMBOL, EXAMPLE = "expert", "E", "β", "L12E45"


def parse_scales(texts: Sequence[str], *, scale: float) -> dict[Expert, float]:
    """`L12E45` or `L12E45=β` for each of `texts` → expert → β, in the order given; `scale` where a text names no β.

    Raises:
        SurgeryError: a text is of another form, or an expert is given twice with different β; every fault is named.
    """
    return parse_factors(Expert, texts, scale=scale)
