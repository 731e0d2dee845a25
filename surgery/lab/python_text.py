"""Text corpora that every machine has: the code and the documentation of the running Python's standard library.

There are four JSONL files, with one document (`name`, `text`) per line. `code`: the library's source files, without
their docstrings. `docs`: the docstrings of the same files, one document per module, and the topics of the language
reference that `help()` shows. `code-held` and `docs-held` are the held-out parts: one module or topic in sixteen,
chosen by the hash of its name, so that a document is in the same part on every machine.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import platform
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from surgery.errors import SurgeryError
from surgery.io.hashing import hash_text

NAME = "python"
CODE, DOCS = "code", "docs"
HELD_OUT = "-held"  # suffix of the held-out part of a domain
# Domain → file.
FILES = {kind: f"{kind}.jsonl" for kind in (CODE, DOCS, f"{CODE}{HELD_OUT}", f"{DOCS}{HELD_OUT}")}

# To be raised when the same library gives other text than before.
VERSION = 1
# A docstring of fewer characters is a label rather than text.
MIN_DOCSTRING = 200
# Folders that are no code of the library: packages installed into it, its tests, and data such as character sets.
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
_TABLES = ("_sysconfigdata", "html/entities")
TOPICS = "topics"


def cache_key() -> str:
    """Return the name of the cache folder: other Python versions have other text."""
    return f"{NAME}-{platform.python_implementation().lower()}-{platform.python_version()}-{VERSION}"


def write_texts(folder: Path) -> None:
    """Write the `FILES` into `folder`, with documents sorted by name.

    Raises:
        SurgeryError: this Python has no source files of its standard library.
    """
    library = Path(os.__file__).parent
    documents: dict[str, list[tuple[str, str]]] = {kind: [] for kind in FILES}
    for path in _modules(library):
        name = path.relative_to(library).with_suffix("").as_posix()
        try:
            source = path.read_text(encoding="utf-8")
            code, docstrings = split_docstrings(source)
        except (ValueError, SyntaxError):
            continue  # written for another Python, or in another encoding
        parts = {CODE: code, DOCS: "\n\n".join(text for text in docstrings if len(text) >= MIN_DOCSTRING)}
        for kind, text in parts.items():
            if text.strip():
                documents[kind + held_out_suffix(name)].append((name, text))
    if not documents[CODE]:
        raise SurgeryError("this Python has no source files of its standard library", where=library)
    for topic, text in sorted(import_module("pydoc_data.topics").topics.items()):
        name = f"{TOPICS}/{topic}"
        documents[DOCS + held_out_suffix(name)].append((name, text.strip() + "\n"))
    for kind, file in FILES.items():
        lines = [json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n" for name, text in documents[kind]]
        # A docstring may contain half a surrogate pair, which UTF-8 cannot encode.
        (folder / file).write_text("".join(lines), encoding="utf-8", errors="replace", newline="\n")


def held_out_suffix(name: str) -> str:
    """Return `HELD_OUT` for the modules and topics, one in sixteen, that belong to the held-out part; else nothing."""
    return HELD_OUT if hash_text(name).endswith("0") else ""


def split_docstrings(source: str) -> tuple[str, list[str]]:
    """Split a source file into the code without docstrings, and the docstrings, dedented and in order.

    A docstring that is all of a body is replaced by `pass`.

    Raises:
        SyntaxError, ValueError: it is not code of this Python.
    """
    # Bytes are split at line breaks alone, as Python counts lines; a text would be split at form feeds too.
    lines = source.encode().splitlines(keepends=True)  # columns of the tree count bytes
    docstrings = []
    # From the last one up, so that the lines above keep their numbers.
    for statement, text, is_alone in sorted(_docstrings(source), key=lambda entry: -entry[0].lineno):
        docstrings.append(inspect.cleandoc(text))
        first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
        before, after = lines[first][: statement.col_offset], lines[last][statement.end_col_offset :]
        # A statement must stand where the body has no other, or where more code is in the same line.
        if is_alone or before.strip() or after.strip().startswith(b";"):
            lines[first : last + 1] = [before + b"pass" + after]
        elif after.strip():
            lines[first : last + 1] = [before + after.lstrip()]
        else:
            # The blank lines go as well, which set the docstring apart from the code below.
            while last + 1 < len(lines) and not lines[last + 1].strip():
                last += 1
            del lines[first : last + 1]
    return b"".join(lines).decode(), docstrings[::-1]


def _docstrings(source: str) -> Iterator[tuple[ast.Expr, str, bool]]:
    """Yield every docstring's statement, its text, and whether it is all that its body has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own code has some, such as invalid escapes
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(value=ast.Constant(value=str(text))) as statement, *rest]:
                    yield statement, text, not rest


def _modules(library: Path) -> list[Path]:
    paths = []
    for folder, folders, files in os.walk(library):
        # In place: `os.walk` goes on into what is left in this list.
        folders[:] = sorted(name for name in folders if name not in EXCLUDED)
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    names = {path: path.relative_to(library).as_posix() for path in paths}
    return sorted((path for path in paths if not names[path].startswith(_TABLES)), key=names.__getitem__)
