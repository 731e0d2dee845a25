"""Read the files of a tokenizer and extend them with tokens, as JSON.

No tokenizer is run, and transformers is not needed. A tokenizer is extended in its tokenizer.json:

- A token that another model keeps among its added tokens (`<|im_start|>`) becomes an added token, found in any text.
- An ordinary one becomes part of the tokenizer's model, without a merge or a score that would let it win. It has its
  row, and it is decoded, but text is cut as before: mergekit 0.1.5 makes these added tokens as well, and "hello", once
  "hell o", becomes "h ello" where another model knows "ello". Text changes only where it holds what the tokenizer did
  not know (a word of WordLevel, a single character), for WordPiece also where a new word is the longest match, and in
  BPE with `ignore_merges` where a whole word is new. To cut text as another model does, name it as the source.
- All tokens then stand in the tokenizer's model, so that no reader counts ids of its own for the added ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.checkpoint.tokenizer_files import (
    ADDED_TOKENS,
    SPECIAL_TOKENS,
    TABLES,
    list_tokenizer_files,
    matches,
)
from surgery.checkpoint.vocabulary import CONFIG, CONVERT, FETCH_AGAIN, TOKENIZER
from surgery.errors import SurgeryError, listing
from surgery.io.input_files import read_bytes
from surgery.io.json_io import read_json

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
EXAMPLES = 3

Entry = Mapping[str, bool]


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Return the tokenizer's files in `folder`: path → content, sorted. Raises SurgeryError if one is unreadable."""
    files = {}
    for path in list_tokenizer_files(folder):
        files[path.relative_to(folder).as_posix()] = read_bytes(path)
    return files


def added_tokens(folder: Path) -> dict[str, Entry]:
    """Return the added tokens of the tokenizer in `folder`, which `read_vocabulary` could read: token → its flags.

    Flags that no file gives are absent. Those of tokenizer.json win over those of tokenizer_config.json. Where only
    added_tokens.json lists a token, it is special if the settings name it.
    """
    settings = read_json(folder / CONFIG, missing={})
    named = _special_tokens({**settings, **read_json(folder / SPECIAL_TOKENS, missing={})})
    tokens: dict[str, Entry] = {
        token: {"special": token in named} for token in read_json(folder / ADDED_TOKENS, missing={})
    }
    decoder = settings.get("added_tokens_decoder") or {}
    listed = read_json(folder / TOKENIZER, missing={}).get("added_tokens") or []
    # tokenizer.json last, as it wins.
    for entry in [*decoder.values(), *listed]:
        values: dict[str, Any] = {"content": entry} if isinstance(entry, str) else entry
        tokens[values["content"]] = {flag: values[flag] for flag in FLAGS if isinstance(values.get(flag), bool)}
    return tokens


def extend_tokenizer(
    files: Mapping[str, bytes],
    ids: Mapping[str, int],
    new: Sequence[str],
    added: Mapping[str, Entry],
    *,
    where: Path,
) -> dict[str, bytes]:
    """Return tokenizer `files` with more tokens, without tables beside tokenizer.json, which would contradict it.

    Args:
        ids: every token of the result; those of `files` keep theirs.
        new: the tokens that `files` do not hold.
        added: those of `new` that become added tokens, with what is known of their flags; the rest become ordinary.
        where: the folder that `files` come from, for errors.

    Raises:
        SurgeryError: there is no tokenizer.json, or it numbers its tokens in a way that leaves no place for more.
    """
    if TOKENIZER not in files:
        raise SurgeryError(
            f"has no {TOKENIZER} to add {len(new):,} tokens to ({listing(map(repr, new), EXAMPLES)})",
            where=where,
            hint=CONVERT,
        )
    tokenizer = json.loads(files[TOKENIZER])
    entries = [{"id": ids[token], "content": token, **dict.fromkeys(FLAGS, False), **added[token]} for token in added]
    tokenizer["added_tokens"] = [*(tokenizer.get("added_tokens") or []), *entries]
    model = tokenizer["model"]
    if isinstance(model["vocab"], dict):
        # By id, added tokens among them: readers that count on would otherwise give these ids of their own.
        model["vocab"] = dict(sorted(ids.items(), key=lambda item: item[1]))
    else:
        ordinary = [token for token in new if token not in added]
        model["vocab"] = [*model["vocab"], *_more_pieces(model["vocab"], ids, ordinary, where / TOKENIZER)]
    out = {name: data for name, data in files.items() if not matches(name, TABLES)}
    out[TOKENIZER] = dump(tokenizer)
    settings = json.loads(files.get(CONFIG, b"{}"))
    # A second list of the added tokens: without the new ones it would contradict tokenizer.json.
    if settings.get("added_tokens_decoder"):
        more = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in entries}
        out[CONFIG] = dump({**settings, "added_tokens_decoder": {**settings["added_tokens_decoder"], **more}})
    return dict(sorted(out.items()))


def _more_pieces(
    pieces: Sequence[Sequence[Any]], ids: Mapping[str, int], ordinary: Sequence[str], where: Path
) -> list[tuple[str, float]]:
    """Return the pieces to append to a Unigram model, in which ids are positions, for it to have all of `ids`.

    Added tokens need no piece where no ordinary token is new. The score is so low that a new piece never beats a
    segmentation into old ones, which costs at most the lowest score for each character of the piece, and of one more
    piece at either end.
    """
    tokens = {row: token for token, row in ids.items()}
    appended = range(len(pieces), max(tokens) + 1)
    # A Unigram model has no ids of its own: a gap would move every later token by one.
    if empty := [row for row in appended if row not in tokens]:
        raise SurgeryError(
            f"leaves id {empty[0]} without a token, so that no more tokens can follow",
            where=where,
            hint="Take this tokenizer as it is: tokenizer_source: base, or MODEL.",
        )
    if not ordinary:
        return []
    # `type … in`, since isinstance would accept true and false as numbers.
    if not all(len(piece) == 2 and type(piece[1]) in (int, float) for piece in pieces):
        raise SurgeryError('"model.vocab" holds a piece without its score', where=where, hint=FETCH_AGAIN)
    lowest = min([-1.0, *(score for _, score in pieces)])
    reach = max(map(len, ordinary)) + 2 * max((len(piece) for piece, _ in pieces), default=0)
    return [(tokens[row], lowest * reach - 1) for row in appended]


def _special_tokens(settings: Mapping[str, Any]) -> set[str]:
    """Return the special tokens of tokenizer_config.json and special_tokens_map.json: texts, lists or entries."""
    named: set[str] = set()
    # Releases of transformers differ in how they write a special token: as text, as an entry with flags, or in a list.
    values = [value for key, value in settings.items() if key.endswith(("_token", "special_tokens"))]
    while values:
        value = values.pop()
        if isinstance(value, str):
            named.add(value)
        elif isinstance(value, list):
            values.extend(value)
        elif isinstance(value, dict):
            values.extend([value["content"]] if "content" in value else value.values())
    return named


def dump(value: object) -> bytes:
    """Return `value` as the bytes of a JSON file."""
    return (json.dumps(value, indent=2) + "\n").encode()  # ASCII: a lone surrogate, too, survives
