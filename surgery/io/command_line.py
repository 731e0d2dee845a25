"""How an option and its value are typed on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def option_flag(name: str) -> str:
    """The option of the parameter `name`: `filter_wise` → `--filter-wise`."""
    return f"--{name.replace('_', '-')}"


def option_words(options: Mapping[str, Any]) -> list[str]:
    """The words that give `options`: a flag for what is true or false, one option for each item of a list or mapping.

    What is None is left out.
    """
    words: list[str] = []
    for name, value in options.items():
        flag = option_flag(name)
        if isinstance(value, bool):
            words.append(flag if value else option_flag(f"no_{name}"))
        elif isinstance(value, Mapping):
            words += [word for glob, number in value.items() for word in (flag, f"{glob}={number!r}")]
        elif isinstance(value, (list, tuple)):
            words += [word for item in value for word in (flag, str(item))]
        elif value is not None:
            words += [flag, str(value)]
    return words
