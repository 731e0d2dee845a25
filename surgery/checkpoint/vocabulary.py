"""Read vocabularies (token → row of the embedding) and align the rows of two of them.

Read from the files of a tokenizer (tokenizer.json, vocab.json, vocab.txt, sentencepiece's .model, and what
tokenizer_config.json adds); no tokenizer is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.checkpoint.sentencepiece_model import read_pieces
from surgery.errors import SurgeryError, listing
from surgery.io.input_files import MB, read_bytes
from surgery.io.json_fields import TABLE, TABLES, check_fields, shown, wrong_value
from surgery.io.json_io import read_json
from surgery.io.safe_paths import find_file, find_files

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
OTHER_FORMATS = ("tekken.json", "*.tiktoken")

MAX_SENTENCEPIECE_BYTES = 32 * MB  # a million pieces take 20 MB, and most models have 250,000 or fewer
MAX_ROWS = 50_000_000  # of an embedding; the largest in use has 1 million
MISSING = -1  # in aligned rows: the donor has no such token
MAX_ID = 2**31 - 1  # a larger one is no row of any matrix
EXAMPLES = 3  # of each difference, in a description
FETCH_AGAIN = "Fetch the tokenizer's files again."
CONVERT = 'Convert it: AutoTokenizer.from_pretrained("DIR").save_pretrained("DIR") writes tokenizer.json.'


@dataclass(frozen=True)
class Vocabulary:
    """Token → id (the row of the embedding). `source` is the file that most of it comes from."""

    ids: Mapping[str, int]
    source: Path

    @property
    def size(self) -> int:
        """The number of rows that the ids need: the largest id + 1; 0 without tokens."""
        return max(self.ids.values(), default=-1) + 1


@dataclass(frozen=True)
class VocabularyDifference:
    """The differences of two vocabularies a and b, with tokens in the order of their ids.

    moved: token → (id in a, id in b), for tokens that both have under different ids.
    """

    only_in_a: Sequence[str]
    only_in_b: Sequence[str]
    moved: Mapping[str, tuple[int, int]]

    @property
    def same(self) -> bool:
        """Whether there is no difference."""
        return not (self.only_in_a or self.only_in_b or self.moved)

    def describe(self, a: str = "the first", b: str = "the second") -> str:
        """Return one paragraph with counts and a few examples of each kind; `a` and `b` are what to call the two."""
        if self.same:
            return f"{a} and {b} give every token the same id."
        parts = []
        if self.moved:
            some = [f"{token!r} {old} → {new}" for token, (old, new) in self.moved.items()]
            parts.append(f"{len(some):,} tokens have another id in {b} than in {a} ({listing(some, EXAMPLES)})")
        for name, tokens in ((a, self.only_in_a), (b, self.only_in_b)):
            if tokens:
                some = [repr(token) for token in tokens]
                parts.append(f"{len(some):,} tokens are only in {name} ({listing(some, EXAMPLES)})")
        return "; ".join(parts) + "."


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """Return the vocabulary of the tokenizer in `folder`, or None if there is no tokenizer file.

    Raises:
        SurgeryError: a file is damaged or of a format not read here; an id is negative or has two tokens; two
            files give one token different ids.
    """
    for name, read in _READERS:
        source = find_file(folder, name)
        if source is not None:
            ids = read(source)
            break
    else:
        unread = [path for pattern in OTHER_FORMATS for path in find_files(folder, pattern)]
        if unread:
            raise SurgeryError("is a tokenizer of a format that is not read here", where=unread[0], hint=CONVERT)
        return None
    # tokenizer.json lists its added tokens itself.
    if source.name != TOKENIZER and (added := find_file(folder, "added_tokens.json")):
        _add(ids, _read_mapping(added), source, added)
    if settings := find_file(folder, CONFIG):
        _add(ids, _read_config(settings), source, settings)
    _check_unique(ids, source)
    return Vocabulary(ids, source)


def differences(a: Vocabulary, b: Vocabulary) -> VocabularyDifference:
    """Return the tokens that only one of the two has, and those with different ids."""
    return VocabularyDifference(
        only_in_a=sorted((token for token in a.ids if token not in b.ids), key=a.ids.__getitem__),
        only_in_b=sorted((token for token in b.ids if token not in a.ids), key=b.ids.__getitem__),
        moved={
            token: (row, b.ids[token])
            for token, row in sorted(a.ids.items(), key=lambda item: item[1])
            if b.ids.get(token, row) != row
        },
    )


def align_rows(target: Vocabulary, donor: Vocabulary, target_rows: int, donor_rows: int) -> npt.NDArray[np.int64]:
    """Return for each row of the target's embedding the row of the donor's for the same token.

    Matrices often have more rows than the tokenizer has tokens, and sometimes fewer; tokens beyond the end of a matrix
    have no row in it.

    Args:
        target_rows: rows of the target's matrix.
        donor_rows: rows of the donor's matrix.

    Returns:
        (target_rows,) int64: the donor's row, or −1 where the row is padding or the donor lacks the token.

    Raises:
        SurgeryError: the matrix has more than `MAX_ROWS` rows, so that it cannot be an embedding.
    """
    check_rows(target_rows, target.source.parent)
    n_tokens = len(target.ids)
    rows = np.fromiter(target.ids.values(), np.int64, n_tokens)
    sources = np.fromiter((donor.ids.get(token, MISSING) for token in target.ids), np.int64, n_tokens)
    # Tokens that were added to a tokenizer, but not to its model.
    sources[sources >= donor_rows] = MISSING
    inside = rows < target_rows
    aligned = np.full(target_rows, MISSING, np.int64)
    aligned[rows[inside]] = sources[inside]
    return aligned


def check_rows(count: int, where: object) -> None:
    """Raise SurgeryError where a matrix has too many rows for an embedding: a list of them would fill the memory."""
    if count > MAX_ROWS:
        raise SurgeryError(
            f"an embedding with {count:,} rows is more than the {MAX_ROWS:,} that one may have", where=where
        )


def _read_tokenizer(path: Path) -> dict[str, int]:
    tokenizer = read_json(path)
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # Unigram: [piece, score] in the order of ids; of two equal pieces the last counts
        ids = {piece: row for row, piece in enumerate(_pieces(vocab, path))}
    elif isinstance(vocab, dict):
        ids = _checked_ids(vocab, path)
    else:
        raise SurgeryError('has no "model.vocab" from tokens to ids', where=path, hint=FETCH_AGAIN)
    check_fields(tokenizer, {"added_tokens": TABLES}, where=path, hint=FETCH_AGAIN)
    added = tokenizer.get("added_tokens") or []
    for token, row in _checked_ids(_added_tokens(added, path), path).items():
        ids.setdefault(token, row)  # as the tokenizers library: a token of the model keeps the model's id
    return ids


def _pieces(vocab: Iterable[Any], path: Path) -> Iterator[str]:
    for entry in vocab:
        if not (isinstance(entry, list) and entry and isinstance(entry[0], str)):
            raise wrong_value("model.vocab", entry, "entries [piece, score]", where=path, hint=FETCH_AGAIN)
        yield entry[0]


def _added_tokens(added: Iterable[Any], path: Path) -> dict[str, Any]:
    ids = {}
    for entry in added:
        if not isinstance(entry.get("content"), str):
            raise wrong_value("added_tokens", entry, 'entries {"id", "content"}', where=path, hint=FETCH_AGAIN)
        ids[entry["content"]] = entry.get("id")
    return ids


def _read_mapping(path: Path) -> dict[str, int]:
    return _checked_ids(read_json(path), path)


def _read_config(path: Path) -> dict[str, int]:
    """Return the tokens of `added_tokens_decoder` in tokenizer_config.json: {"id": {"content": token}}."""
    settings = read_json(path)
    check_fields(settings, {"added_tokens_decoder": TABLE}, where=path, hint=FETCH_AGAIN)
    ids = {}
    for row, entry in (settings.get("added_tokens_decoder") or {}).items():
        content = entry.get("content") if isinstance(entry, dict) else entry
        if not (isinstance(content, str) and row.isascii() and row.removeprefix("-").isdigit()):
            raise SurgeryError(
                f'"added_tokens_decoder" holds {shown(row)}: {shown(entry)}, expected an id and {{"content"}}',
                where=path,
                hint=FETCH_AGAIN,
            )
        ids[content] = int(row[: len(str(MAX_ID)) + 2])  # enough digits to be refused as too large
    return _checked_ids(ids, path)


def _read_lines(path: Path) -> dict[str, int]:
    # Not splitlines(), which also splits at characters that may be in a token, such as U+2028.
    try:
        # A byte order mark stays, as in transformers: it is part of the first token.
        text = read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise SurgeryError(f"is not UTF-8 text ({error.reason})", where=path, hint=FETCH_AGAIN) from error
    lines = text.replace("\r\n", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise SurgeryError("holds no token", where=path, hint=FETCH_AGAIN)
    return {token: row for row, token in enumerate(lines)}


def _read_sentencepiece(path: Path) -> dict[str, int]:
    content = read_bytes(path, limit=MAX_SENTENCEPIECE_BYTES)
    try:
        pieces = read_pieces(content)
    except ValueError as error:
        raise SurgeryError(
            f"is no whole sentencepiece model ({error})",
            where=path,
            hint=f"{FETCH_AGAIN} If it is of another format: {CONVERT}",
        ) from error
    return {piece: row for row, piece in enumerate(pieces)}


# tokenizer.json first, as in transformers: it is complete, the files beside it may be left from a conversion.
_READERS = (
    (TOKENIZER, _read_tokenizer),
    ("vocab.json", _read_mapping),
    ("vocab.txt", _read_lines),
    *((name, _read_sentencepiece) for name in SENTENCEPIECE),
)


def _add(ids: dict[str, int], added: Mapping[str, int], source: Path, path: Path) -> None:
    for token, row in added.items():
        if ids.setdefault(token, row) != row:
            raise SurgeryError(
                f"gives {token!r} id {row}, and {source.name} gives it {ids[token]}",
                where=path,
                hint="Keep the files of one and the same tokenizer.",
            )


def _check_unique(ids: Mapping[str, int], source: Path) -> None:
    if len(set(ids.values())) == len(ids):
        return
    # Two tokens have one id: walk through all of them once more, to name these two.
    owner: dict[int, str] = {}
    for token, row in ids.items():
        if row in owner:
            raise SurgeryError(
                f"id {row} has two tokens, {owner[row]!r} and {token!r}",
                where=source,
                hint="Keep the files of one and the same tokenizer.",
            )
        owner[row] = token


def _checked_ids(ids: Mapping[str, Any], path: Path) -> dict[str, int]:
    for token, row in ids.items():
        # `type … is not`: true would pass for 1.
        if type(row) is not int or not 0 <= row <= MAX_ID:
            raise SurgeryError(
                f"{shown(token)} has id {shown(row)}, expected a whole number from 0", where=path, hint=FETCH_AGAIN
            )
    return dict(ids)
