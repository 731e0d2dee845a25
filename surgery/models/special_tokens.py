"""Read texts from data files as text: what looks like a special token in them is none, or is told.

A data file that holds `</think>` or `<|im_start|>` could close a model's thinking, or open a turn of the system's.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from surgery.errors import SurgeryWarning, listing, usage_error

_SHOWN = 3


def backend_copy(tokenizer: Any, *, parse_special: bool = True) -> Any:
    """Return a copy of the `tokenizers.Tokenizer` inside, without truncation and padding.

    Args:
        parse_special: whether the text of a special token, or of a marker such as `<think>`, becomes that token.
            Otherwise it is cut like any other text; texts without such tokens have the same ids either way.

    Raises:
        SurgeryError: it is no fast tokenizer; its vocabulary takes a special token's text for a word all the same.
    """
    from tokenizers import Tokenizer

    where = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise usage_error("is no fast tokenizer", where=where, hint="Give one that has a tokenizer.json.")
    rules = json.loads(backend.to_str())
    special = {each["content"]: each["id"] for each in rules["added_tokens"] if _is_marker(each)}
    if not parse_special:
        rules["added_tokens"] = [each for each in rules["added_tokens"] if not _is_marker(each)]
    copy = Tokenizer.from_str(json.dumps(rules))
    copy.no_truncation()
    copy.no_padding()
    if not parse_special:
        # A vocabulary of whole words has them among its words.
        unknown = rules["model"].get("unk_token")
        kept = [
            text
            for text, number in special.items()
            if text != unknown and number in copy.encode(text, add_special_tokens=False).ids
        ]
        if kept:
            raise usage_error(
                f"cannot read special tokens as text: {listing(kept, _SHOWN)} are words of its vocabulary",
                where=where,
                hint="Add `special_tokens: parse`, for texts that you trust.",
            )
    return copy


def warn_of_special_tokens(tokenizer: Any, texts: Iterable[str], *, where: object) -> None:
    """Emit a `SurgeryWarning` with counts where `texts`, from the file `where`, hold special tokens of `tokenizer`."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = [token.content for token in added if _is_marker({"content": token.content, "special": token.special})]
    special = sorted(filter(None, tokens), key=len, reverse=True)
    if not special:
        return
    pattern = re.compile("|".join(map(re.escape, special)))
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
