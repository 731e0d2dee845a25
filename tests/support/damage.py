"""Damage JSON files at every place in turn, by values that no such place should hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError

NESTED: Any = json.loads("[" * 90 + "]" * 90)
ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 10**9, 2**63, 2**80, float("inf"), float("nan")),
    *("", "many", "../x", "\x1b[31m", "x" * 5_000),
    *([], [None], [[1]], ["x", -1], {}, {"a": {"b": None}}, NESTED),
)
# Whole files: cut short, empty, of another kind, or of values that JSON texts can hold and few expect.
TEXTS = (
    *(b"", b"{", b"null", b"[]", b'"x"', b"1", b"\xff\xfe", b"\x00" * 10, b"[" * 5_000),
    *(b'{"a": 1e309}', b'{"a": "\\ud800"}', b'{"\\ud800": 1}', b'{"a": ' + b"9" * 5_000 + b"}"),
    b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}",
)
MOST_ENTRIES = 2  # of a list or table, of which each is damaged: the rest are of the same kind


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside of `value`, itself included."""
    yield path
    if isinstance(value, dict):
        for key in list(value)[:MOST_ENTRIES] if path else list(value):
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(min(len(value), MOST_ENTRIES)):
            yield from places(value[i], (*path, i))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """`value` with `new` at `path`; what is not on the path is shared."""
    if not path:
        return new
    step, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[step] = replaced(value[step], tuple(rest), new)
    return copy


def without(value: Any, path: tuple[Any, ...]) -> Any:
    """`value` without the entry at `path`."""
    step, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        copy[step] = without(value[step], tuple(rest))
    else:
        del copy[step]
    return copy


def damages(content: bytes) -> Iterator[tuple[str, bytes]]:
    """(what was done, the damaged file) for a JSON file."""
    for text in TEXTS:
        yield f"the file is {text[:20]!r}", text
    value = json.loads(content)
    for path in places(value):
        where = ".".join(map(str, path))
        if path:
            yield f"without {where}", json.dumps(without(value, path)).encode()
        for odd in ODD:
            yield f"{where} is {str(odd)[:20]!r}", json.dumps(replaced(value, path, odd)).encode()


def failures_of(path: Path, use: Callable[[], object]) -> list[str]:
    """What ends in anything but a result or a SurgeryError when `use` meets `path` damaged in each way in turn."""
    content = path.read_bytes()
    failures = []
    try:
        for what, damaged in damages(content):
            path.write_bytes(damaged)
            try:
                use()
            except SurgeryError as error:
                str(error).encode()  # it can be printed
                if len(str(error)) > 5_000:
                    failures.append(f"{what}: an error of {len(str(error)):,} characters")
            except Exception as error:
                failures.append(f"{what}: {type(error).__name__}: {str(error)[:100]}")
    finally:
        path.write_bytes(content)
    return failures
