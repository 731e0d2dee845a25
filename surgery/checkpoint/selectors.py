"""Parts of layers by name: `L12H7` is head 7 of layer 12, `L12E45` its expert 45; everything is counted from 0.

In come texts as people type them, out come parts, and how strongly each is to be scaled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self, TypeVar

from surgery.errors import usage_error


@dataclass(frozen=True, order=True)
class Part:
    """One part of a layer, of the kind that a subclass names; parts are ordered by layer, then index.

    NOUN: what it is called. SYMBOL: what the factor that scales it is called. EXAMPLE: one of them, as it is typed.
    """

    NOUN: ClassVar[str]
    LETTER: ClassVar[str]
    SYMBOL: ClassVar[str]
    EXAMPLE: ClassVar[str]

    layer: int
    index: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """`L12H7` → Head(12, 7). Raises SurgeryError for anything else."""
        found = cls._read(text)
        if found is None:
            raise usage_error(f"got {text!r}, {cls._expected()}", where=cls.NOUN)
        return found

    @classmethod
    def _read(cls, text: str) -> Self | None:
        # Six digits at most: no model has more, and int() stays cheap.
        match = re.fullmatch(rf"L([0-9]{{1,6}}){cls.LETTER}([0-9]{{1,6}})", text, re.ASCII)
        return None if match is None else cls(int(match[1]), int(match[2]))

    @classmethod
    def _expected(cls) -> str:
        return f"expected LAYER and {cls.NOUN.upper()} such as {cls.EXAMPLE}"

    def __str__(self) -> str:
        return f"L{self.layer}{self.LETTER}{self.index}"


P = TypeVar("P", bound=Part)


def parse_factors(kind: type[P], texts: Sequence[str], *, scale: float) -> dict[P, float]:
    """`L12H7` or `L12H7=0.5` for each of `texts` → part → factor, in the order given; `scale` where a text names none.

    Raises:
        SurgeryError: a text is of another form, or a part is given twice with different factors; every fault is named.
    """
    scales: dict[P, float] = {}
    faults = []
    for text in texts:
        name, separator, number = text.partition("=")
        part = kind._read(name)
        try:
            factor = float(number) if separator else scale
        except ValueError:
            part = None
        if part is None:
            faults.append(f"got {text!r}, {kind._expected()} or {kind.EXAMPLE}=0.5")
            continue
        earlier = scales.setdefault(part, factor)
        if earlier != factor and not (math.isnan(earlier) and math.isnan(factor)):
            faults.append(f"{part} is given twice, with {kind.SYMBOL} {earlier:g} and {factor:g}")
    if faults:
        raise usage_error("\n  ".join(faults), where=f"--{kind.NOUN}")
    return scales


def by_layer(parts: Iterable[Part]) -> dict[int, tuple[int, ...]]:
    """Layer → the indices of its parts, both ascending."""
    found: dict[int, list[int]] = {}
    for part in sorted(set(parts)):
        found.setdefault(part.layer, []).append(part.index)
    return {layer: tuple(indices) for layer, indices in found.items()}


@dataclass(frozen=True, order=True)
class Head(Part):
    """One query head."""

    NOUN, LETTER, SYMBOL, EXAMPLE = "head", "H", "γ", "L12H7"


def parse_head_scales(texts: Sequence[str], *, scale: float = 0.0) -> dict[Head, float]:
    """`L12H7` or `L12H7=γ` for each of `texts` → head → γ, in the order given; `scale` where a text names no γ.

    Raises:
        SurgeryError: a text is of another form, or a head is given twice with different γ; every fault is named.
    """
    return parse_factors(Head, texts, scale=scale)


@dataclass(frozen=True, order=True)
class Expert(Part):
    """One routed expert."""

    NOUN, LETTER, SYMBOL, EXAMPLE = "expert", "E", "β", "L12E45"


def parse_expert_scales(texts: Sequence[str], *, scale: float) -> dict[Expert, float]:
    """`L12E45` or `L12E45=β` for each of `texts` → expert → β, in the order given; `scale` where a text names no β.

    Raises:
        SurgeryError: a text is of another form, or an expert is given twice with different β; every fault is named.
    """
    return parse_factors(Expert, texts, scale=scale)
