"""Read texts from data files as text: what looks like a special token in them is none, or is told.

A data file that holds `</think>` or `<|im_start|>` could close a model's thinking, or open a turn of the system's.
"""

from __future__ import annotations

import json
import re
import secrets
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from surgery.errors import SurgeryError, SurgeryWarning, listing, usage_error
from surgery.models.choices import SpecialTokens
from surgery.runtime.quiet_libraries import quiet

Span = tuple[int, int]  # of characters, the end excluded

_SHOWN = 3
_HINT = "Add --special-tokens parse (in a plan `special_tokens: parse`), for texts that you trust."


def backend_copy(tokenizer: Any, *, parse_special: bool = True) -> Any:
    """Return a copy of the `tokenizers.Tokenizer` inside, without truncation and padding.

    Args:
        parse_special: whether the text of a special token, or of a marker such as `<think>`, becomes that token.
            Otherwise it is cut like any other text; texts without such tokens have the same ids either way.

    Raises:
        SurgeryError: it is no fast tokenizer; its vocabulary takes a special token's text for a word all the same.
    """
    copy = _Renamed(tokenizer).backend if not parse_special else _load(_rules(tokenizer))
    copy.no_truncation()
    copy.no_padding()
    return copy


def special_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Return the pattern that finds the texts of special tokens and of markers; None for a tokenizer without any."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = [token.content for token in added if _is_marker({"content": token.content, "special": token.special})]
    # The longest first, as tokenizers take it where several begin at one place.
    special = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, special))) if special else None


def acts(tokenizer: Any, text: str, literal: Sequence[Span]) -> bool:
    """Return whether a special token of `text` has characters in the spans `literal`."""
    pattern = special_pattern(tokenizer) if literal else None
    return pattern is not None and any(
        start < match.end() and match.start() < end for match in pattern.finditer(text) for start, end in literal
    )


def without_special(tokenizer: Any, text: str) -> str:
    """Return `text` with a letter in place of each special token, which may hide what a tokenizer puts before it."""
    pattern = special_pattern(tokenizer)
    return text if pattern is None else pattern.sub("a", text)


def encode_literal(tokenizer: Any, text: str, literal: Sequence[Span]) -> tuple[list[int], list[Span]]:
    """Return the ids of `text` and their offsets, where special tokens within the spans `literal` are plain text.

    Those outside of them are real. Nothing is put before or behind.

    Args:
        literal: spans of characters that ascend and do not overlap.

    Raises:
        SurgeryError: the tokenizer cannot do that exactly.
    """
    renamed = _renamed.get(tokenizer)
    if renamed is None:
        renamed = _renamed[tokenizer] = _Renamed(tokenizer)
    with quiet():  # the tokenizer's warning of long texts
        expected = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    # Without literal spans both ways must agree: what they differ in would be wrong beside the spans, too.
    if renamed.encode(text, ())[0] != expected:
        raise usage_error("its special tokens cannot be told from its text", where=renamed.where, hint=_HINT)
    return renamed.encode(text, literal)


def encode_text(tokenizer: Any, text: str, special_tokens: SpecialTokens, *, add_special_tokens: bool) -> list[int]:
    """Return the ids that `tokenizer` gives `text`, in which special tokens are text, or those tokens (parse).

    Args:
        add_special_tokens: whether the tokenizer puts its own before and behind, which are tokens either way.

    Raises:
        SurgeryError: the tokenizer cannot do that exactly.
    """
    whole = ((0, len(text)),)
    if special_tokens == "parse" or not acts(tokenizer, text, whole):
        return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    ids = encode_literal(tokenizer, text, whole)[0]
    if not add_special_tokens:
        return ids
    harmless = without_special(tokenizer, text)
    bare = list(tokenizer(harmless, add_special_tokens=False)["input_ids"])
    framed = list(tokenizer(harmless)["input_ids"])
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return [*framed[:start], *ids, *framed[start + len(bare) :]]
    where = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    raise SurgeryError("cuts a text differently when it adds special tokens", where=where)


class _Renamed:
    """A copy of a tokenizer whose special tokens have names that nobody can guess, and so are in no text."""

    def __init__(self, tokenizer: Any) -> None:
        self.where = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        rules = _rules(tokenizer)
        vocabulary = rules["model"]["vocab"]
        words = set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
        markers = [each for each in rules["added_tokens"] if _is_marker(each)]
        # Lower-case letters and digits: no normaliser changes them.
        secret = secrets.token_hex(16)
        self.names = {each["content"]: f"x{secret}{number:05d}x" for number, each in enumerate(markers)}
        # Those among the vocabulary's own words would leave their word nameless: they get ids of their own. Others keep
        # their place, from which the ids of all that follow are counted.
        own = [each for each in markers if each["content"] in words]
        rules["added_tokens"] = [
            each | {"content": self.names.get(each["content"], each["content"])}
            for each in rules["added_tokens"]
            if each not in own
        ]
        self.backend = _load(rules)
        for each in rules["added_tokens"]:
            if self.backend.token_to_id(each["content"]) != each["id"]:
                raise self._refused(f"the ids of its added tokens, such as {each['id']}, are out of order")
        self._forbidden = self._words_of_their_own(own, rules["model"].get("unk_token"))
        self._ids = self._add(own)
        self._pattern = re.compile("|".join(map(re.escape, sorted(self.names, key=len, reverse=True))) or "(?!)")

    def encode(self, text: str, literal: Sequence[Span]) -> tuple[list[int], list[Span]]:
        """Return ids and offsets, see `encode_literal`."""
        parts: list[str] = []
        # Where a name ends in the text that is encoded, and in `text`.
        ends, origins, length = [0], [0], 0
        position = 0
        for start, end in (*literal, (len(text), len(text))):
            # Each stretch by itself: no token begins outside a span and ends within it.
            for match in self._pattern.finditer(text, position, start):
                parts += [text[position : match.start()], self.names[match[0]]]
                length += match.start() - position + len(parts[-1])
                position = match.end()
                ends.append(length)
                origins.append(position)
            parts.append(text[position:end])
            length += end - position
            position = end
        encoded = self.backend.encode("".join(parts), add_special_tokens=False)
        if found := self._forbidden.intersection(encoded.ids):
            raise self._refused(f"the ids {listing(map(str, sorted(found)), _SHOWN)} are words of its vocabulary")

        def origin(offset: int) -> int:
            index = bisect_right(ends, offset) - 1
            # A name's start is as far from the name before it as the token's is.
            return origins[index] + offset - ends[index]

        return [self._ids.get(each, each) for each in encoded.ids], [(origin(a), origin(b)) for a, b in encoded.offsets]

    def _words_of_their_own(self, own: Sequence[Mapping[str, Any]], unknown: object) -> set[int]:
        """Return the ids that no text may have. Raises SurgeryError where a text has them all the same."""
        numbers = {each["content"]: int(each["id"]) for each in own if each["content"] != unknown}
        # A vocabulary of whole words has them among its words.
        encode = self.backend.encode
        kept = [text for text, number in numbers.items() if number in encode(text, add_special_tokens=False).ids]
        if kept:
            raise self._refused(f"{listing(kept, _SHOWN)} are words of its vocabulary")
        return set(numbers.values())

    def _add(self, own: Sequence[Mapping[str, Any]]) -> dict[int, int]:
        """Add the tokens that are words of the vocabulary by their names; return their new ids → ids."""
        from tokenizers import AddedToken

        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        ids: dict[int, int] = {}
        for each in own:
            name = self.names[each["content"]]
            self.backend.add_tokens([AddedToken(name, **{flag: each[flag] for flag in flags})])
            ids[self.backend.token_to_id(name)] = int(each["id"])
        return ids

    def _refused(self, why: str) -> SurgeryError:
        return usage_error(f"cannot read special tokens as text: {why}", where=self.where, hint=_HINT)


_renamed: WeakKeyDictionary[Any, _Renamed] = WeakKeyDictionary()


def _rules(tokenizer: Any) -> dict[str, Any]:
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        where = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise usage_error("is no fast tokenizer", where=where, hint=f"Give one that has a tokenizer.json. {_HINT}")
    rules = json.loads(backend.to_str())
    assert isinstance(rules, dict)
    # The backend remembers those of the last call.
    return rules | {"truncation": None, "padding": None}


def _load(rules: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(rules))


def warn_of_special_tokens(tokenizer: Any, texts: Iterable[str], *, where: object) -> None:
    """Emit a `SurgeryWarning` with counts where `texts`, from the file `where`, hold special tokens of `tokenizer`."""
    pattern = special_pattern(tokenizer)
    if pattern is None:
        return
    counts = Counter[str]()
    for text in texts:
        counts.update(pattern.findall(text))
    if counts:
        found = listing((f"{token} {count:,}×" for token, count in counts.most_common()), _SHOWN)
        warnings.warn(
            f"{where}: its texts hold special tokens, which act as such: {found}", SurgeryWarning, stacklevel=2
        )


def _is_marker(token: Mapping[str, Any]) -> bool:
    """Return whether an added token steers: it is special, or written as markers are. Others are words or spaces."""
    text = str(token["content"])
    return bool(token["special"]) or (text[:1] in ("<", "[") and text[-1:] in (">", "]") and len(text) > 2)
