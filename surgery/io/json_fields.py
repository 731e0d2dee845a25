"""Check the types of a JSON object's fields, where it comes from outside and has more fields than we read.

Configs of models, adapters and tokenizers have hundreds of keys, of which a few are read here. Those are checked once,
when the file is read, so that whatever reads them later can rely on them. `null` stands for a field that is not given.
Records of our own, whose every field is known, are pydantic models instead: see `surgery.io.json_records`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.errors import SurgeryError
from surgery.io.json_io import FETCH_AGAIN

MAX_COUNT = 2**31 - 1  # of layers, heads, tokens: what transformers' tensors of ids hold
MAX_SHOWN = 60  # characters of a wrong value in a message


@dataclass(frozen=True)
class FieldKind:
    """What a field may hold: in words, and as a test."""

    expected: str
    accepts: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    if type(value) not in (int, float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond 1.8e308
        return False


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def whole_number(most: int, *, or_several: bool = False) -> FieldKind:
    """Return the kind of whole numbers from 0 to `most`; `or_several`: or a list or table, which is not looked into."""

    def accepts(value: Any) -> bool:
        # `type … is`, since isinstance would accept true and false as numbers.
        return (type(value) is int and 0 <= value <= most) or (or_several and isinstance(value, list | dict))

    return FieldKind(f"a whole number from 0 to {most:,}" + (", or several" if or_several else ""), accepts)


COUNT = whole_number(MAX_COUNT)
NUMBER = FieldKind("a finite number", _is_number)
FLAG = FieldKind("true or false", lambda value: isinstance(value, bool))
TEXT = FieldKind("text", lambda value: isinstance(value, str))
TEXTS = FieldKind("a list of texts", _texts)
LIST = FieldKind("a list", lambda value: isinstance(value, list))
TABLE = FieldKind("a table of keys and values", lambda value: isinstance(value, dict))
TABLES = FieldKind(
    "a list of tables", lambda value: isinstance(value, list) and all(isinstance(item, dict) for item in value)
)
TEXT_TABLE = FieldKind(
    "a table of texts", lambda value: isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
)


def check_fields(
    record: Mapping[str, Any],
    kinds: Mapping[str, FieldKind],
    *,
    where: object,
    inside: str = "",
    hint: str = FETCH_AGAIN,
) -> None:
    """Raise SurgeryError for the first field of `record` that is given and is not of its kind.

    Args:
        where: the file, for the error.
        inside: the key of the table that `record` is, where it is one inside of the file's.
    """
    for key, kind in kinds.items():
        value = record.get(key)
        if value is not None and not kind.accepts(value):
            raise wrong_value(f"{inside}.{key}" if inside else key, value, kind.expected, where=where, hint=hint)


def wrong_value(key: str, value: object, expected: str, *, where: object, hint: str = FETCH_AGAIN) -> SurgeryError:
    """Return the error of a field that holds something else than it may."""
    return SurgeryError(f'"{key}": got {shown(value)}, expected {expected}', where=where, hint=hint)


def shown(value: object) -> str:
    """Return a value from a file as a message shows it: one line, cut where it is long."""
    if isinstance(value, dict):
        return f"a table of {len(value):,}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value):,}"
    if value is None or isinstance(value, bool):
        return "nothing" if value is None else str(value).lower()
    if isinstance(value, str):
        # Cut before it is quoted: it may have millions of characters.
        cut = value[:MAX_SHOWN]
        text = repr(cut) if cut.isprintable() else ascii(cut)
        return text if len(value) <= MAX_SHOWN else f"{text}… of {len(value):,} characters"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a whole number of {value.bit_length():,} bits"
    return f"{value!r:.{MAX_SHOWN}}"
