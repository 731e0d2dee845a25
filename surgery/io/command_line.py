"""Write options and arguments as the words of a command line, so that they are read back as they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def option_text(flag: str, text: str) -> list[str]:
    """Return the words that give the option `flag` the value `text`."""
    # As one word where it begins with a dash: else a value such as -0.5 would be taken for an option.
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def command_words(command: str, arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return the words of a command (`vector apply`) with its arguments, and the words of its options behind them."""
    # After `--` nothing is an option, so that an argument may begin with a dash.
    if any(text.startswith("-") for text in arguments):
        return [*command.split(), *options, "--", *arguments]
    return [*command.split(), *arguments, *options]


def option_flag(name: str) -> str:
    """Return the option of the parameter `name`: `filter_wise` → `--filter-wise`."""
    return f"--{name.replace('_', '-')}"


def option_words(options: Mapping[str, Any]) -> list[str]:
    """Return the words that give `options`: a flag for true or false, one option for each item of a list or mapping.

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
