"""Find the texts in a config file that may name what is read: models of a merge, texts of a growth."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from surgery.errors import SurgeryError
from surgery.io.yaml_nodes import read_documents


# A run asks for the same few files again and again, and one of nothing but aliases takes a second to read.
@lru_cache(maxsize=16)
def config_texts(text: str, where: str) -> tuple[str, ...]:
    """Return every string of one line in a YAML or JSON text, each once; none where it cannot be read.

    Which of them name models or files, only the command knows that the config is for.
    """
    try:
        nodes, _ = read_documents(text, where)
    except SurgeryError:
        return ()  # the command itself says what is wrong with its file
    return tuple(dict.fromkeys(each for node in nodes for each in _strings(node.plain) if "\n" not in each))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
