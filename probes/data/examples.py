"""Examples that models are probed with, as text (`Example`) and as token ids cut into segments (`TokenSequence`).

An `Example` is a row of the user's data: a conversation up to its last question and, once known, the model's thinking
and response. A `TokenSequence` has four segments: prompt (opening marker included), thinking, closing template
(`"\\n</think>\\n\\n"`), answer. The last token before the answer is where refusal is decided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Topic = Literal["harmful", "harmless"]
LiteralText = Literal["messages", "thinking", "closing", "response"]
Segment = Literal["prompt", "thinking", "closing", "answer"]
# Errors about single examples that one message lists: the first few show what is wrong with the others.
MAX_REPORTED = 20

SEGMENTS: tuple[Segment, ...] = ("prompt", "thinking", "closing", "answer")


@dataclass(frozen=True)
class Example:
    """One row of data.

    key: stable and unique within its data set; caches and results refer to examples by it.
    messages: the conversation up to and including the last user message, as chat templates take it.
    thinking, closing, response: the model's own or the given text; None if not known yet. `closing` is the exact text
        between thinking and response; None stands for the model's closing template.
    topic: what is asked for. refused: whether the response refuses. Both None if not labelled yet.
    group: examples of one group are never on both sides of a train/test split.
    row: the record as it is in the file.
    literal: the texts in which special tokens are text like any other, as they come from a file. In others, such as the
        model's own, they are those tokens.
    """

    key: str
    messages: tuple[Mapping[str, Any], ...]
    group: str
    thinking: str | None = None
    closing: str | None = None
    response: str | None = None
    topic: Topic | None = None
    refused: bool | None = None
    row: Mapping[str, Any] = field(default_factory=dict, repr=False)
    literal: tuple[LiteralText, ...] = ()

    @property
    def prompt(self) -> str:
        """The last user message."""
        return str(self.messages[-1]["content"])

    @property
    def cell(self) -> str:
        """Topic and verdict, such as `harmful/refused`; `unknown` where there is no label."""
        verdict = "unknown" if self.refused is None else ("refused" if self.refused else "complied")
        return f"{self.topic or 'unknown'}/{verdict}"


@dataclass(frozen=True)
class DataSet:
    """Examples and their source; `revision` is the commit of a Hub data set, `digest` the hash of the rows."""

    ref: str
    examples: tuple[Example, ...]
    digest: str
    revision: str | None = None


@dataclass(frozen=True)
class TokenSequence:
    """An example as token ids, without a second BOS.

    ends: the ends of the segments prompt, thinking, closing and answer: 0 < ends[0] ≤ ends[1] ≤ ends[2] ≤ ends[3] =
        len(ids). Every segment but the prompt may be empty.
    """

    key: str
    ids: tuple[int, ...]
    ends: tuple[int, int, int, int]

    @property
    def decision(self) -> int:
        """The position of the last token before the answer."""
        return self.ends[2] - 1

    def span(self, segment: Segment) -> range:
        """The positions of `segment`."""
        index = SEGMENTS.index(segment)
        return range(self.ends[index - 1] if index else 0, self.ends[index])

    @property
    def before_answer(self) -> tuple[int, ...]:
        """The ids up to and including `decision`."""
        return self.ids[: self.ends[2]]
