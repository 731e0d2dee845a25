"""Which of a model's files are its tokenizer's: by their names, as transformers reads and writes them.

In comes a folder or a file's path in one, out come the files that a tokenizer cannot do without and those that it may
have; chat templates and code of its own are among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from surgery.checkpoint.vocabulary import CONFIG, OTHER_FORMATS, SENTENCEPIECE, TOKENIZER
from surgery.hub import file_selection

SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"
CHAT_TEMPLATES = file_selection.CHAT_TEMPLATES
LEGACY_CHAT_TEMPLATE = "chat_template.json"
# Patterns of paths in the folder. What a tokenizer is to do, and what its tokens are.
SETTINGS = (CONFIG, SPECIAL_TOKENS, CHAT_TEMPLATE, LEGACY_CHAT_TEMPLATE, f"{CHAT_TEMPLATES}/*.jinja")
TABLES = (TOKENIZER, ADDED_TOKENS, "vocab.json", "merges.txt", "vocab.txt", *SENTENCEPIECE, *OTHER_FORMATS)
PATTERNS = (*SETTINGS, *TABLES, "tokenization_*.py")
# Where there is none of these, there is no tokenizer that transformers could read.
TOKENIZER_FILES = (TOKENIZER, CONFIG, "vocab.json", "vocab.txt", "tekken.json", *SENTENCEPIECE)


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of a checkpoint, by its path in the folder, belongs to the tokenizer (chat templates do)."""
    return matches(name, PATTERNS)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files in `folder` that belong to a tokenizer, sorted."""
    inside = [*folder.iterdir(), *(folder / CHAT_TEMPLATES).glob("*.jinja")]
    return sorted(path for path in inside if path.is_file() and is_tokenizer_file(path.relative_to(folder).as_posix()))


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of `patterns` matches the whole path `name`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
