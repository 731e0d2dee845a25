"""The literal string of every token of a tokenizer, as it looks in text.

A token of byte-level BPE is decoded (`Ġpainted` is " painted"), and SentencePiece's ▁ is a space. Bytes that are not a
whole character keep a literal of their own (`<0xE2>`), as special tokens and unused ids do: no string is empty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.checkpoint import existing_path
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.tokenizer_files import SETTINGS, TABLES, list_tokenizer_files
from surgery.checkpoint.vocabulary import CONVERT, TOKENIZER, Vocabulary, read_vocabulary
from surgery.errors import SurgeryError, usage_error
from surgery.hub import download as hub
from surgery.models.loading import load_tokenizer

# Files to download of a model on the Hub; its config says which tokenizer it has if the tokenizer's files do not.
FETCHED = (*SETTINGS, *TABLES, "config.json")
SPACE = "▁"
_LONE_BYTE = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class OpenTokenizer:
    """A tokenizer in a folder: transformers' object, and the vocabulary read from its files.

    repo_id, revision: its origin on the Hub, if any.
    """

    ref: str
    folder: Path
    tokenizer: Any
    vocabulary: Vocabulary
    repo_id: str | None = None
    revision: str | None = None

    @property
    def files(self) -> list[Path]:
        """The tokenizer's files, sorted."""
        return list_tokenizer_files(self.folder)


def open_tokenizer(ref: str | Path) -> OpenTokenizer:
    """Load the tokenizer in the folder `ref`, or of the model that `ref` names (see `surgery.checkpoint.resolve`).

    Raises:
        SurgeryError: there is none, its files are damaged, it needs remote code, or it has no tokenizer.json and none
            can be created.
    """
    folder, repo_id, revision = _locate(str(ref))
    vocabulary = read_vocabulary(folder)
    if vocabulary is None:
        raise usage_error(
            "holds no tokenizer",
            where=ref,
            hint=f"Give the folder that has {TOKENIZER}; `surgery grow tokenizer` writes one.",
        )
    tokenizer = load_tokenizer(folder, str(ref))
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise SurgeryError(f"has no {TOKENIZER}, and none was made of its files", where=ref, hint=CONVERT)
    return OpenTokenizer(str(ref), folder, tokenizer, vocabulary, repo_id, revision)


def token_strings(tokenizer: Any, *, rows: int | None = None, where: object = "the tokenizer") -> list[str]:
    """Return the literal string of every id from 0 to V − 1; none is empty, but two may be equal.

    Args:
        tokenizer: a fast tokenizer of transformers.
        rows: V; by default as many as the ids need. Ids without a token are `<unused N>`.
        where: what errors call the tokenizer.

    Raises:
        SurgeryError: there is no token, or `rows` are too few for the ids.
    """
    backend = tokenizer.backend_tokenizer
    ids: Mapping[str, int] = backend.get_vocab(with_added_tokens=True)
    # Ids may have gaps, and added tokens may lie beyond the base vocabulary.
    needed = max(max(ids.values(), default=-1) + 1, len(tokenizer))
    if not needed:
        raise SurgeryError("has no tokens", where=where)
    if rows is not None and rows < needed:
        raise usage_error(f"got {rows:,} rows, expected {needed:,} or more: as many as {where} has", where="--rows")
    strings = [f"<unused {index}>" for index in range(needed if rows is None else rows)]
    added = backend.get_added_tokens_decoder()
    decode = _token_decoder(json.loads(backend.to_str()))
    for token, index in ids.items():
        entry = added.get(index)
        # Added tokens are matched in the text itself, so that they are not spelled in the alphabet of bytes.
        literal = entry is not None and (entry.special or decode is _from_bytes)
        strings[index] = (token if literal else decode(token)) or f"<empty {index}>"
    return strings


def _locate(ref: str) -> tuple[Path, str | None, str | None]:
    """Return the folder of the tokenizer `ref`, and its repository and commit if it is from the Hub."""
    path = existing_path(ref)
    if path is not None and path.is_file():
        raise usage_error("is a file, expected the folder of a tokenizer", where=ref)
    if path is not None:
        return path, None, None
    if hub.is_repo_id(ref):
        fetched = hub.fetch(*hub.parse_repo_ref(ref), patterns=FETCHED)
        return fetched.folder, fetched.repo_id, fetched.revision
    model = open_checkpoint(ref)
    if model.folder is None:
        raise usage_error("no such tokenizer folder", where=ref)
    return model.folder, model.repo_id, model.revision


def _token_decoder(spec: Mapping[str, Any]) -> Any:
    """Return the function that turns a token of the tokenizer.json `spec` into text."""
    # Either part names the alphabet of the tokens; some files have only one of them.
    kinds = {kind for part in ("decoder", "pre_tokenizer") for kind in _kinds(spec.get(part))}
    if "ByteLevel" in kinds:
        return _from_bytes
    if "Metaspace" in kinds or ("Replace", SPACE) in kinds:
        return _from_pieces
    return str


def _kinds(part: Any) -> Iterator[object]:
    """Yield the types in a part of a tokenizer.json, at any depth; for replacements also (type, replaced string)."""
    if isinstance(part, Mapping):
        yield part.get("type")
        pattern = part.get("pattern")
        if isinstance(pattern, Mapping):
            yield part.get("type"), pattern.get("String")
        for value in part.values():
            yield from _kinds(value)
    elif isinstance(part, list):
        for value in part:
            yield from _kinds(value)


def _byte_alphabet() -> dict[str, int]:
    """Return character → byte of byte-level BPE: printable Latin-1 is itself, the other bytes follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _from_bytes(token: str) -> str:
    """Return a token of byte-level BPE as text; one with other characters is returned as it is."""
    try:
        data = bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        return token
    # Each undecodable byte becomes one surrogate, which the pattern below finds.
    text = data.decode("utf-8", errors="surrogateescape")
    return _LONE_BYTE.sub(lambda match: f"<0x{ord(match[0]) - 0xDC00:02X}>", text)


def _from_pieces(token: str) -> str:
    return token.replace(SPACE, " ")
