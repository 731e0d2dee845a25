"""Tokenise texts by the rules of a tokenizer's backend."""

from __future__ import annotations

from typing import Any

from surgery.errors import usage_error


def backend_copy(tokenizer: Any) -> Any:
    """Return a copy of the `tokenizers.Tokenizer` inside, without truncation and padding.

    Raises:
        SurgeryError: it is no fast tokenizer.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise usage_error(
            "is no fast tokenizer",
            where=getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__,
            hint="Give one that has a tokenizer.json.",
        )
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy
