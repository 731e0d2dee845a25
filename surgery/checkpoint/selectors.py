"""Select heads and experts by name: `L12H7` is head 7 of layer 12, `L12E45` its expert 45; both counted from 0.

Parses names, and names with scale factors (`L12H7=0.5`), as users type them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self, TypeVar

from surgery.errors import indented, usage_error


@dataclass(frozen=True, order=True)
class Part:
    """One part of a layer, of a kind that a subclass defines; parts are ordered by layer, then index.

    NOUN: the name of the kind, and of its option.
    LETTER: what comes before the index in a name.
    SYMBOL: the Greek letter of the factor that scales it.
    EXAMPLE: a name, for error messages.
    """

    NOUN: ClassVar[str]
    LETTER: ClassVar[str]
    SYMBOL: ClassVar[str]
    EXAMPLE: ClassVar[str]

    layer: int
    index: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the part that a name stands for: `L12H7` → Head(12, 7). Raises SurgeryError if it is not a name."""
        part = cls._match(text)
        if part is None:
            raise usage_error(f"got {text!r}, {cls._expected()}", where=cls.NOUN)
        return part

    @classmethod
    def _match(cls, text: str) -> Self | None:
        # Six digits at most: no model has more, and int() stays cheap.
        match = re.fullmatch(rf"L([0-9]{{1,6}}){cls.LETTER}([0-9]{{1,6}})", text, re.ASCII)
        return None if match is None else cls(int(match[1]), int(match[2]))

    @classmethod
    def _expected(cls) -> str:
        return f"expected LAYER and {cls.NOUN.upper()} such as {cls.EXAMPLE}"

    def __str__(self) -> str:
        return f"L{self.layer}{self.LETTER}{self.index}"


@dataclass(frozen=True, order=True)
class Head(Part):
    """One query head."""

    NOUN, LETTER, SYMBOL, EXAMPLE = "head", "H", "γ", "L12H7"


@dataclass(frozen=True, order=True)
class Expert(Part):
    """One routed expert."""

    NOUN, LETTER, SYMBOL, EXAMPLE = "expert", "E", "β", "L12E45"


def parse_head_scales(texts: Sequence[str], *, scale: float = 0.0) -> dict[Head, float]:
    """Parse `L12H7` or `L12H7=γ` for each of `texts`; return head → γ, in that order; `scale` where no γ is given.

    Raises:
        SurgeryError: a text is of another form, or a head is given twice with different γ; every error is named.
    """
    return parse_factors(Head, texts, scale=scale)


def parse_expert_scales(texts: Sequence[str], *, scale: float) -> dict[Expert, float]:
    """Parse `L12E45` or `L12E45=β` for each of `texts`; return expert → β, in that order; `scale` where no β is given.

    Raises:
        SurgeryError: a text is of another form, or an expert is given twice with different β; every error is named.
    """
    return parse_factors(Expert, texts, scale=scale)


P = TypeVar("P", bound=Part)


def parse_factors(kind: type[P], texts: Sequence[str], *, scale: float) -> dict[P, float]:
    """Parse `L12H7` or `L12H7=0.5` for each of `texts`; return part → factor; `scale` where none is given.

    Raises:
        SurgeryError: a text is of another form, or a part is given twice with different factors; every error is named.
    """
    factors: dict[P, float] = {}
    errors = []
    for text in texts:
        name, separator, number = text.partition("=")
        part = kind._match(name)
        try:
            factor = float(number) if separator else scale
        except ValueError:
            part = None
        if part is None:
            errors.append(f"got {text!r}, {kind._expected()} or {kind.EXAMPLE}=0.5")
            continue
        earlier = factors.setdefault(part, factor)
        # NaN differs from itself, but the same text twice is no contradiction.
        if earlier != factor and not (math.isnan(earlier) and math.isnan(factor)):
            errors.append(f"{part} is given twice, with {kind.SYMBOL} {earlier:g} and {factor:g}")
    if errors:
        raise usage_error(indented(errors), where=f"--{kind.NOUN}")
    return factors


def by_layer(parts: Iterable[Part]) -> dict[int, tuple[int, ...]]:
    """Group parts by layer: layer → indices, both ascending."""
    indices: dict[int, list[int]] = {}
    for part in sorted(set(parts)):
        indices.setdefault(part.layer, []).append(part.index)
    return {layer: tuple(listed) for layer, listed in indices.items()}
