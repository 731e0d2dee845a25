"""Values that programs handle badly, and texts that JSON parsers, YAML parsers and paths handle badly.

Work folders of the fuzzer are beside a folder `outside` and a folder `home` (see `support.fuzzing`): paths here lead
there, so that whoever follows one is seen.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

# Integers beyond it cannot become a float.
LARGEST_FLOAT = 1e308
MOST_REPEATED = 1_000  # values of a list that is repeated: a tree of such lists would not fit into memory


class Raw(str):
    """JSON text that is written as it is, for numbers and trees that Python's parser would not give back."""


class Pairs(list[tuple[str, Any]]):
    """A mapping as pairs, in which a key may be there twice."""


PATHS = (
    "../outside/secret.txt",
    "../outside",
    "../outside/model",
    "../outside/model/model.safetensors",
    "../../../../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/environ",
    "~",
    "~/secret.txt",
    "~nobody/.bashrc",
    "$HOME/secret.txt",
    ".",
    "..",
    "",
    "/",
    "a/../../outside/secret.txt",
    "a\\..\\..\\outside",
    "C:\\windows",
    "file:///etc/passwd",
    "http://127.0.0.1:9/x",
    "-o",
    "--out=/tmp/x",
    "--overwrite",
    "org/name",
    "org/name@main",
    "lab:",
    "lab:nothing",
    "lab:../../outside",
    "a+b",
    ".git/config",
    "CON",
    "a\x00b",
    "a\nb",
    "x" * 300,
    "x/" * 600,
)
TEXTS = (
    "",
    " ",
    "\x00",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\u202etxt.exe",
    "\u2066\u2069",
    "\u200b",
    "\ufeff",
    "\r\n",
    "line\nline",
    "\ud800",
    "\udcff",
    "é",
    "e\u0301",
    "\U0001f600",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "`code` | cell | {{ 7*7 }} {% for i in range(9) %}",
    "{{ ''.__class__.__mro__ }}",
    "%s%n%d{0}{x.__class__}",
    "'; DROP TABLE x; --",
    "$(touch ../outside/x)",
    "`touch ../outside/x`",
    "!!python/object/apply:os.system ['touch ../outside/x']",
    "null",
    "true",
    "NaN",
    "1e309",
    "0x10",
    "١٢٣",
    "F32",
    "(a+)+$",
    "(.*)*(.*)*(.*)*x",
    "[",
    "*" * 50,
    "**/**/**/*",
    "a.b.c",
    "__class__",
    "0",
    "-1",
)
NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    1,
    2,
    3,
    7,
    255,
    65536,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    -(2**63),
    -(2**64),
    0.5,
    -0.0,
    1.0,
    1.5,
    1e-320,
    1e308,
    -1e308,
    Raw("1e309"),
    Raw("-1e309"),
    Raw("NaN"),
    Raw("Infinity"),
    Raw("-Infinity"),
    Raw("-0"),
    Raw("1E400"),
    Raw("9" * 400),
    Raw("0." + "3" * 400),
)
# Each over the limit of Python's own conversion of decimals, or of its recursion.
_EXTREME = (
    lambda: Raw("9" * 5_000),
    lambda: Raw("[" * 1_000 + "]" * 1_000),
    lambda: Raw('{"a":' * 1_000 + "1" + "}" * 1_000),
    lambda: Raw("[" * 30_000),
    lambda: "x" * 1_000_000,
    lambda: "\u202e" * 100_000,
    lambda: ["a"] * 20_000,
    lambda: list(range(20_000)),
    lambda: [[]] * 20_000,
    lambda: {f"k{i}": i for i in range(20_000)},
    lambda: {"a" * 100_000: 1},
)
_CONTAINERS: tuple[Any, ...] = (
    [],
    {},
    [[]],
    [None],
    [{}],
    {"": None},
    {"a": {}},
    {"a": 1, "b": [1, 2]},
    [0, "x"],
    ["x"],
    [1, 2, 3],
    [[0, 1], [2, 3]],
)


def odd_text(draw: random.Random) -> str:
    """Return a text that something may take for a path, an option, markup or code."""
    return draw.choice(PATHS if draw.random() < 0.4 else TEXTS)


def odd_value(draw: random.Random) -> Any:
    """Return any value: a scalar, a container, or one in twenty times a huge or deep one."""
    kind = draw.random()
    if kind < 0.05:
        return draw.choice(_EXTREME)()
    if kind < 0.3:
        return draw.choice(NUMBERS)
    if kind < 0.6:
        return odd_text(draw)
    if kind < 0.8:
        # A copy: trees are changed in place, and an input may depend on its number alone.
        return deepcopy(draw.choice(_CONTAINERS))
    return draw.choice((None, True, False))


def near_value(value: Any, draw: random.Random) -> Any:
    """Return another value of the same kind, which a check of the type alone lets pass."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)) and not isinstance(value, Raw):
        # A number of more digits than a float can have has no neighbours of other kinds.
        others = (float(value), str(value)) if abs(value) < LARGEST_FLOAT else ()
        small = (value + 1, value - 1, -value, value * 2, 0, value * 1000, *others)
        return draw.choice(small) if draw.random() < 0.6 else draw.choice(NUMBERS)
    if isinstance(value, str):
        changed = (value.upper(), value + "x", value[:-1], value[1:], value * 2, f" {value}", value[::-1], [value])
        return draw.choice(changed) if draw.random() < 0.5 else odd_text(draw)
    if isinstance(value, list):
        many = value * 100 if len(value) <= MOST_REPEATED else value[:-1]
        return draw.choice((value[:-1], value[1:], value * 2, value[::-1], [*value, odd_value(draw)], many, value[:1]))
    if isinstance(value, dict):
        return {**value, odd_text(draw): odd_value(draw)}
    return odd_value(draw)


def to_text(value: Any) -> str:
    """Return the tree as JSON, `Raw` and `Pairs` as they are; lone surrogates as escapes."""
    # Without recursion: a tree of trees may be deeper than Python can call.
    pieces: list[str] = []
    open_containers = [iter([value])]
    while open_containers:
        for item in open_containers[-1]:
            if isinstance(item, Raw):
                pieces.append(item)
            elif isinstance(item, (dict, list, tuple)):
                open_containers.append(_parts(item))
                break
            else:
                pieces.append(json.dumps(item))
        else:
            open_containers.pop()
    return "".join(pieces)


def _parts(container: Any) -> Iterator[Any]:
    """Yield the values of a container, and the `Raw` texts before, between and behind them."""
    if isinstance(container, (dict, Pairs)):
        yield Raw("{")
        for at, (key, value) in enumerate(container.items() if isinstance(container, dict) else container):
            yield Raw(f"{', ' if at else ''}{json.dumps(str(key))}: ")
            yield value
        yield Raw("}")
        return
    yield Raw("[")
    for at, value in enumerate(container):
        if at:
            yield Raw(", ")
        yield value
    yield Raw("]")
