"""Texts of the user's data in which special tokens are text: `Example.literal` names them.

A file that holds `</think>` or `<|im_start|>system` could close a model's thinking, or open a turn of the system's.
Before a chat template writes a conversation its special tokens are replaced by numbers that nobody can guess, and put
back where they have come to stand: so it is known which of the written ones are the template's own.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from probes.data.examples import Example, LiteralText
from probes.data.markers import Markers
from surgery.models.special_tokens import Span, special_pattern

DIGITS = 40
T = TypeVar("T")


class SpecialTokenMask:
    """Hides the special tokens in values, and finds them again in a text that was made of these values."""

    def __init__(self, tokenizer: Any) -> None:
        self._pattern = special_pattern(tokenizer)
        # Digits: templates change letters, by `upper` and the like.
        self._secret = str(secrets.randbelow(9 * 10 ** (DIGITS - 1)) + 10 ** (DIGITS - 1))
        self.hidden: list[str] = []

    def hide(self, value: Any) -> Any:
        """Return `value`, a text or what JSON can hold of texts, without special tokens."""
        if self._pattern is None:
            return value
        if isinstance(value, str):
            return self._pattern.sub(self._name, value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(each) for key, each in value.items()}
        return [self.hide(each) for each in value] if isinstance(value, (list, tuple)) else value

    def reveal(self, text: str) -> tuple[str, tuple[Span, ...]]:
        """Return `text` with all that was hidden, and where that is."""
        parts: list[str] = []
        spans: list[Span] = []
        length = position = 0
        for match in re.finditer(rf"{self._secret}(\d{{6}})", text):
            parts += [text[position : match.start()], self.hidden[int(match[1])]]
            length += match.start() - position
            spans.append((length, length + len(parts[-1])))
            length, position = spans[-1][1], match.end()
        return "".join([*parts, text[position:]]), tuple(spans)

    def _name(self, match: re.Match[str]) -> str:
        self.hidden.append(match[0])
        return f"{self._secret}{len(self.hidden) - 1:06d}"


def masked_messages(mask: SpecialTokenMask, example: Example) -> Sequence[Mapping[str, Any]]:
    """Return the messages of `example`, without special tokens where they are text."""
    return [mask.hide(message) for message in example.messages] if "messages" in example.literal else example.messages


def literal_spans(example: Example, closing: str, markers: Markers | None, *, start: int) -> tuple[Span, ...]:
    """Return where thinking, closing and response are text in the text that has them from `start` on."""
    texts: list[tuple[LiteralText, str]] = [
        ("thinking", example.thinking or ""),
        ("closing", closing),
        ("response", example.response or ""),
    ]
    spans: list[Span] = []
    for name, text in texts:
        if name in example.literal:
            own = _around_marker(text, markers) if name == "closing" else [(0, len(text))]
            spans += [(start + a, start + b) for a, b in own if a < b]
        start += len(text)
    return tuple(spans)


def without_idle_literals(tokenizer: Any, example: Example, markers: Markers | None) -> Example:
    """Return `example` without `literal` if none of its texts holds a special token, so that it says nothing."""
    mask = SpecialTokenMask(tokenizer)
    masked_messages(mask, example)
    closing = example.closing or ""
    around = [closing[a:b] for a, b in _around_marker(closing, markers)] if "closing" in example.literal else []
    for name, text in (("thinking", example.thinking), ("response", example.response)):
        if name in example.literal:
            mask.hide(text)
    # What stands around the closing marker may be half of a token, whose other half is in the response.
    return example if mask.hidden or any(each.strip() for each in around) else replace(example, literal=())


def _around_marker(closing: str, markers: Markers | None) -> list[Span]:
    """Return the spans of `closing` before and after the marker in it, which must act; all without markers."""
    if markers is None:
        return [(0, len(closing))]
    # Some models open their answer by a marker of its own, which follows.
    for marker in (markers.closing.strip(), markers.close):
        if (at := closing.find(marker)) >= 0:
            return [(0, at), (at + len(marker), len(closing))]
    return [(0, len(closing))]
