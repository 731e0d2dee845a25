"""Report of a new frozen embedding: its properties, and the tokens that share a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from surgery.growth.embedding.tables import Groups
from surgery.reporting.report import Column, Table

LARGEST_GROUPS = 10  # groups of colliding tokens in the manifest
GROUP_EXAMPLES = 8  # tokens of each


@dataclass(frozen=True)
class Collisions:
    """Rows that are equal to the bit. largest: strings of the first tokens in the largest groups."""

    rows: int
    groups: int
    largest: tuple[tuple[str, ...], ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, groups: Groups, strings: Sequence[str]) -> Collisions:
        """Count the rows in `groups` of equal rows; `strings` are those of all tokens."""
        largest = tuple(tuple(strings[index] for index in group[:GROUP_EXAMPLES]) for group in groups[:LARGEST_GROUPS])
        return cls(sum(map(len, groups)), len(groups), largest)


@dataclass(frozen=True)
class EmbeddingReport:
    """The result of `make_embedding`.

    hash: of the tensor. normalised: whether rows have norm 1. collisions: in the written table. before: in the table
    before duplicates were separated. zero_rows: rows of zeros. details: of one kind only (font, kept variance).
    """

    out: Path
    kind: str
    vocab_size: int
    width: int
    hash: str
    normalised: bool
    collisions: Collisions
    before: Collisions | None
    zero_rows: int
    details: Mapping[str, Any]

    def summary(self) -> dict[str, Any]:
        """Return the manifest's report."""
        return {name: value for name, value in asdict(self).items() if name != "out"}

    def table(self) -> Table:
        """Return a table of the report."""
        facts = [
            ("tokens", self.vocab_size),
            ("width", self.width),
            ("norm of rows", "1" if self.normalised else "as made"),
            *((name.replace("_", " "), value) for name, value in self.details.items() if name != "font_hash"),
            *([("rows of zeros", self.zero_rows)] if self.zero_rows else []),
            *([("tokens that shared a row", self.before.rows)] if self.before else []),
            ("tokens that share a row", self.collisions.rows),
            ("groups that they form", self.collisions.groups),
            ("hash", self.hash),
        ]
        return Table(f"Frozen embedding: {self.kind}", [Column(""), Column("")], facts)
