"""Attention heads by name: `L12H7` is query head 7 of layer 12, both counted from 0.

In come texts as people type them, out come `Head`s, and how strongly each is to be scaled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from surgery.errors import usage_error

_HEAD = re.compile(r"L([0-9]{1,6})H([0-9]{1,6})", re.ASCII)
EXPECTED = "expected LAYER and HEAD such as L12H7"


@dataclass(frozen=True, order=True)
class Head:
    """One query head; heads are ordered by layer, then index."""

    layer: int
    index: int

    @classmethod
    def parse(cls, text: str) -> Head:
        """`L12H7` → Head(12, 7). Raises SurgeryError for anything else."""
        match = _HEAD.fullmatch(text)
        if match is None:
            raise usage_error(f"got {text!r}, {EXPECTED}", where="head")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"L{self.layer}H{self.index}"


def parse_scales(texts: Sequence[str], *, scale: float = 0.0) -> dict[Head, float]:
    """`L12H7` or `L12H7=γ` for each of `texts` → head → γ, in the order given; `scale` where a text names no γ.

    Raises:
        SurgeryError: a text is of another form, or a head is given twice with different γ; every fault is named.
    """
    scales: dict[Head, float] = {}
    faults = []
    for text in texts:
        name, separator, number = text.partition("=")
        match = _HEAD.fullmatch(name)
        try:
            factor = float(number) if separator else scale
        except ValueError:
            match = None
        if match is None:
            faults.append(f"got {text!r}, {EXPECTED} or L12H7=0.5")
            continue
        head = Head(int(match[1]), int(match[2]))
        earlier = scales.setdefault(head, factor)
        if earlier != factor and not (math.isnan(earlier) and math.isnan(factor)):
            faults.append(f"{head} is given twice, with γ {earlier:g} and {factor:g}")
    if faults:
        raise usage_error("\n  ".join(faults), where="--head")
    return scales


def by_layer(heads: Iterable[Head]) -> dict[int, tuple[int, ...]]:
    """Layer → the indices of its heads, both ascending."""
    found: dict[int, list[int]] = {}
    for head in sorted(set(heads)):
        found.setdefault(head.layer, []).append(head.index)
    return {layer: tuple(indices) for layer, indices in found.items()}
