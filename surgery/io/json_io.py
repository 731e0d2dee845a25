"""Read JSON objects, and convert results to JSON for `--json`, manifests and results.json."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.io.escaping import json_text
from surgery.io.input_files import MAX_TEXT_BYTES, read_bytes

# Values of a parsed text, its keys among them: Python takes up to 72 bytes for each, so that a text of MAX_TEXT_BYTES
# of nothing but brackets would take gigabytes. The tokenizer.json with most of them has about 3 million.
MAX_VALUES = 4_000_000
MAX_DEPTH = 100  # of lists and objects inside each other; what is written for such files reaches 10
FETCH_AGAIN = "Fetch the file again."
# Digits of a whole number that may not be a float: sums, plots and sizes would fail on it wherever it is used.
_LONG_NUMBER = re.compile(rb"[0-9]{309}")


def to_json(value: Any, *, indent: int = 1) -> str:
    """Return `value` as JSON text with a final line break; NaN and infinities, which JSON lacks, become null.

    Invisible characters are escaped: the text may be printed, and of lone surrogates there is no UTF-8.
    """
    # `jsonable` has replaced every NaN; if it ever misses one, an error is better than a file that other parsers
    # refuse.
    return json_text(json.dumps(jsonable(value), indent=indent, ensure_ascii=False, allow_nan=False)) + "\n"


def jsonable(value: Any) -> Any:
    """Return `value` with dataclasses and mappings as dicts, sequences as lists, paths as text, NaN and ±∞ as None."""
    # Not by `dataclasses.asdict`, which copies every value deeply and leaves paths and NaN inside as they are.
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_key(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        # Sets have no order of their own: sorted, or the same result would give other bytes in another run.
        return [jsonable(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _key(key: Any) -> str:
    # JSON has only text as keys: a tuple such as (3, 7) becomes `3/7`.
    return "/".join(map(str, key)) if isinstance(key, tuple) else str(key)


def read_json(
    path: Path, *, missing: dict[str, Any] | None = None, limit: int = MAX_TEXT_BYTES, max_values: int = MAX_VALUES
) -> dict[str, Any]:
    """Return the JSON object in `path`, or `missing` if there is no such file.

    Raises:
        SurgeryError: it cannot be read, is no regular file, has more than `limit` bytes or `max_values` values, or is
            no JSON object.
    """
    # A link to nowhere is not missing, but damaged: `exists` follows it, `is_symlink` does not.
    if missing is not None and not path.exists() and not path.is_symlink():
        return missing
    value = parse_json(read_bytes(path, limit=limit), where=path, max_values=max_values)
    if not isinstance(value, dict):
        raise SurgeryError("is not a JSON object", where=path, hint=FETCH_AGAIN)
    return value


def parse_json(content: bytes, *, where: object, max_values: int = MAX_VALUES) -> Any:
    """Return the JSON value in `content`, UTF-8 with or without a byte order mark.

    Raises:
        SurgeryError: it is not JSON, is nested too deeply, has more than `max_values` values, or half of a surrogate
            pair, which is no character.
    """
    check_json_size(content, where=where, max_values=max_values)
    try:
        has_long = _LONG_NUMBER.search(content) is not None
        value = json.loads(content.decode("utf-8-sig"), parse_int=_bounded_int if has_long else None)
        check_depth(value, where=where)
        # UTF-8 has no halves of characters, but a JSON text may name them by their number; nothing could be written of
        # them again. Emoji are written as two halves, so that these alone say nothing.
        if b"\\ud" in content or b"\\uD" in content:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise too_deep(where) from error
    except UnicodeEncodeError as error:
        raise SurgeryError(
            f"holds {error.object[error.start]!a}, half of a character", where=where, hint=FETCH_AGAIN
        ) from error
    except OverflowError as error:
        raise SurgeryError(
            f"holds a whole number that is larger than {sys.float_info.max:.1e}", where=where, hint=FETCH_AGAIN
        ) from error
    except ValueError as error:  # not UTF-8, not JSON, or a number that is too long
        raise SurgeryError(f"is not valid JSON ({error})", where=where, hint=FETCH_AGAIN) from error
    return value


def _bounded_int(text: str) -> int:
    number = int(text)
    float(number)
    return number


def texts_in(value: Any) -> Iterator[str]:
    """Yield every text among the values of `value`, as deep as lists and tables go; keys are not among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts_in(item)


def check_depth(value: Any, *, where: object) -> None:
    """Raise SurgeryError where lists and objects in `value` are nested more than `MAX_DEPTH` deep.

    What walks through such a value later, one call a level, then never reaches Python's limit of calls.
    """
    # Level by level, not by recursion, which is what could not be done.
    level = [value] if isinstance(value, dict | list) else []
    depth = 0
    while level:
        if depth == MAX_DEPTH:
            raise too_deep(where)
        depth += 1
        level = [
            child
            for container in level
            for child in (container.values() if type(container) is dict else container)
            if type(child) is dict or type(child) is list
        ]


def too_deep(where: object) -> SurgeryError:
    """Return the error of a value that is nested more than `MAX_DEPTH` deep."""
    return SurgeryError(f"is nested more than {MAX_DEPTH} levels deep", where=where, hint=FETCH_AGAIN)


def check_json_size(content: bytes, *, where: object, max_values: int = MAX_VALUES) -> None:
    """Raise SurgeryError where the JSON text `content` may have more than `max_values` values; nothing is parsed."""
    # Every value after the first of its container follows one of these characters. Those inside of strings are counted
    # too: texts are far below the bound, and nothing needs to be parsed to know.
    count = sum(content.count(character) for character in (b",", b":", b"[", b"{"))
    if count > max_values:
        raise SurgeryError(
            f"has about {count:,} values, more than the {max_values:,} that such a file may have",
            where=where,
            hint="It is damaged, or not what its name says.",
        )
