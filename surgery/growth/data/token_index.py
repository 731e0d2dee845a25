"""Read and check `tokens.json`: what a folder's token stream is made of, and how much of it is committed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.io.json_io import read_json
from surgery.io.safe_paths import find_file


@dataclass(frozen=True)
class StreamState:
    """The committed part of the stream. last: hash of its last document. whole: there are no more documents."""

    documents: int = 0
    tokens: int = 0
    last: str = ""
    whole: bool = False


def read_index(index: Path) -> tuple[dict[str, Any], StreamState] | None:
    """Return what the stream is made of, and its committed state; None where there is no such file.

    Raises:
        SurgeryError: the file is damaged.
    """
    content = {} if find_file(index.parent, index.name) is None else read_json(index)
    if not content:
        return None
    try:
        made_of, state = dict(content["made_of"]), StreamState(**content["state"])
    except (KeyError, TypeError, ValueError) as error:
        raise no_index(index) from error
    kinds = (state.documents, int), (state.tokens, int), (state.last, str), (state.whole, bool)
    if not all(type(value) is kind for value, kind in kinds) or min(state.documents, state.tokens) < 0:
        raise no_index(index)
    return made_of, state


def check_size(tokens: Path, state: StreamState, width: int) -> None:
    """Raise SurgeryError where the file `tokens` has fewer than the committed tokens, of `width` bytes each."""
    size = tokens.stat().st_size if tokens.is_file() else 0
    if size < state.tokens * width:
        raise SurgeryError(
            f"holds {size:,} bytes, but tokens.json counts {state.tokens:,} tokens of {width} bytes",
            where=tokens,
            hint="Remove both, so that they are made again.",
        )


def no_index(index: Path) -> SurgeryError:
    """Return the error for a damaged index."""
    return SurgeryError("is no index of a token stream", where=index, hint="Remove its folder.")
