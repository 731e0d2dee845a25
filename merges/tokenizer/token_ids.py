"""Renumber token ids in config.json and generation_config.json for another tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.checkpoint.vocabulary import Vocabulary

BOUNDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SUFFIXES = ("_token_id", "_token_ids", "_token_index")
LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")


def remap_ids(
    config: Mapping[str, Any], *, before: Vocabulary, after: Vocabulary, donor: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return `config` with the ids that the same tokens have in `after`; and warnings, ready to print.

    Which tokens begin, end and pad a text is up to the tokenizer: where `donor` has a value for one of these, it is
    taken as it is. The id of a token that `after` lacks becomes null, or is removed from its list, with a warning. A
    number that is no token's id in `before` is kept (−1, say).

    Args:
        config: config.json or generation_config.json.
        before: the vocabulary that the ids in `config` are of.
        after: the output's vocabulary.
        donor: the same file of the model whose tokenizer the output has, where `config` is another model's.
    """
    from_donor = {key: donor[key] for key in BOUNDS if key in donor} if donor else {}
    renumber = _Renumber(before, after)
    out = {**renumber.within({key: value for key, value in config.items() if key not in from_donor}), **from_donor}
    warnings = [
        f"{place}: the output has no token {token!r}, so it stands there no more" for place, token in renumber.lost
    ]
    # In the order of the file, so that a diff of the two configs shows only what changed.
    in_order = {key: out[key] for key in (*config, *from_donor)}
    return in_order, tuple(warnings)


class _Renumber:
    """Walks a config. `lost`: the places of ids whose token the new vocabulary lacks, with the token."""

    def __init__(self, before: Vocabulary, after: Vocabulary) -> None:
        self._tokens = {row: token for token, row in before.ids.items()}
        self._ids = after.ids
        self.lost: list[tuple[str, str]] = []

    def within(self, config: Mapping[str, Any], place: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in config.items():
            if key.endswith(SUFFIXES) or key in LISTS:
                out[key] = self._list(value, place + key) if isinstance(value, list) else self._id(value, place + key)
            else:
                out[key] = self.within(value, f"{place}{key}.") if isinstance(value, dict) else value
        return out

    def _list(self, values: list[Any], place: str) -> list[Any] | None:
        """Renumber ids, or lists of ids; a list inside that lost an id would mean something else, and is removed."""
        renumbered = []
        for value in values:
            new = self._list(value, place) if isinstance(value, list) else self._id(value, place)
            # Of `bad_words_ids` a phrase that lost a token would forbid another phrase.
            if new is not None and (not isinstance(value, list) or len(value) == len(new)):
                renumbered.append(new)
        return renumbered if renumbered or not values else None

    def _id(self, value: Any, place: str) -> Any:
        # `type`, not isinstance: True is an int, and no token id.
        token = self._tokens.get(value) if type(value) is int else None
        if token is None:
            return value
        if token not in self._ids:
            self.lost.append((place, token))
        return self._ids.get(token)
