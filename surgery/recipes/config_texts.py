"""Find the texts in a config file that may name what is read: models of a merge, texts of a growth."""

from __future__ import annotations

from functools import lru_cache

from surgery.errors import SurgeryError
from surgery.io.json_io import texts_in
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
    return tuple(dict.fromkeys(each for node in nodes for each in texts_in(node.plain) if "\n" not in each))
