"""Find the files of a model that belong to its tokenizer, by the names that transformers reads and writes.

Chat templates and a tokenizer's own code are among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from surgery.checkpoint.vocabulary import CONFIG, OTHER_FORMATS, SENTENCEPIECE, TOKENIZER
from surgery.hub import file_selection
from surgery.io.safe_paths import check_contained, list_folder

SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"
CHAT_TEMPLATES = file_selection.CHAT_TEMPLATES
LEGACY_CHAT_TEMPLATE = "chat_template.json"
# Patterns of paths in the folder: settings of a tokenizer, and tables of its tokens.
SETTINGS = (CONFIG, SPECIAL_TOKENS, CHAT_TEMPLATE, LEGACY_CHAT_TEMPLATE, f"{CHAT_TEMPLATES}/*.jinja")
TABLES = (TOKENIZER, ADDED_TOKENS, "vocab.json", "merges.txt", "vocab.txt", *SENTENCEPIECE, *OTHER_FORMATS)
PATTERNS = (*SETTINGS, *TABLES, "tokenization_*.py")
# Without any of these there is no tokenizer that transformers could read.
TOKENIZER_FILES = (TOKENIZER, CONFIG, "vocab.json", "vocab.txt", "tekken.json", *SENTENCEPIECE)


def is_tokenizer_file(name: str) -> bool:
    """Return whether a file, by its path in the model's folder, belongs to the tokenizer (chat templates do)."""
    return matches(name, PATTERNS)


def list_tokenizer_files(folder: Path) -> list[Path]:
    """Return the files in `folder` that belong to a tokenizer, sorted.

    Raises:
        SurgeryError: one is a link that leads out of `folder`, or no regular file.
    """
    templates = folder / CHAT_TEMPLATES
    inside = [*list_folder(folder), *(list_folder(templates) if templates.is_dir() else ())]
    paths = sorted(path for path in inside if is_tokenizer_file(path.relative_to(folder).as_posix()))
    for path in paths:
        check_contained(folder, path)
    return paths


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether one of `patterns` matches the whole path `name`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
