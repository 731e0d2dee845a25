"""Text that every machine has: the running Python's standard library, its code and its documentation as two domains.

Out come four JSONL files with a document (`name`, `text`) in each line. `code`: the library's source files, without
their docstrings. `docs`: the docstrings of the same files, one document per module, and the topics of the language
reference that `help()` shows. `code-held` and `docs-held` hold those modules and topics, one in sixteen, whose hashed
names say so; the other two hold the rest.
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
HELD = "-held"
# The domains, and the file of each.
KINDS = {kind: f"{kind}.jsonl" for kind in (CODE, DOCS, f"{CODE}{HELD}", f"{DOCS}{HELD}")}

# Raised when the same library gives other text than before.
VERSION = 1
# A docstring of fewer characters is a label rather than text.
SHORTEST = 200
# No code of the library's: packages that were installed into it, its tests, and tables of character sets and of HTML's
# entities, which are data.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
_TABLES = ("_sysconfigdata", "html/entities")
TOPICS = "topics"


def key() -> str:
    """What tells one Python's text from another's."""
    return f"{NAME}-{platform.python_implementation().lower()}-{platform.python_version()}-{VERSION}"


def write(folder: Path) -> None:
    """Writes the files of `KINDS` into `folder`, in the order of the documents' names.

    Raises:
        SurgeryError: this Python has no source files of its standard library.
    """
    library = Path(os.__file__).parent
    documents: dict[str, list[tuple[str, str]]] = {kind: [] for kind in KINDS}
    for path in _modules(library):
        name = path.relative_to(library).with_suffix("").as_posix()
        try:
            source = path.read_text(encoding="utf-8")
            code, docstrings = split(source)
        except (ValueError, SyntaxError):
            continue  # written for another Python, or in another encoding
        found = {CODE: code, DOCS: "\n\n".join(text for text in docstrings if len(text) >= SHORTEST)}
        for kind, text in found.items():
            if text.strip():
                documents[kind + held(name)].append((name, text))
    if not documents[CODE]:
        raise SurgeryError("this Python has no source files of its standard library", where=library)
    for topic, text in sorted(import_module("pydoc_data.topics").topics.items()):
        name = f"{TOPICS}/{topic}"
        documents[DOCS + held(name)].append((name, text.strip() + "\n"))
    for kind, file in KINDS.items():
        lines = [json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n" for name, text in documents[kind]]
        # Half a surrogate pair, which a docstring may spell out, is no text.
        (folder / file).write_text("".join(lines), encoding="utf-8", errors="replace", newline="\n")


def held(name: str) -> str:
    """What the domains that the module or topic `name` is in are called beyond code and docs."""
    return HELD if hash_text(name).endswith("0") else ""


def split(source: str) -> tuple[str, list[str]]:
    """A source file → the same code without docstrings, and its docstrings without their indentation, in order.

    Where a docstring is all that a body has, `pass` takes its place.

    Raises:
        SyntaxError, ValueError: it is no code of this Python.
    """
    lines = source.encode().splitlines(keepends=True)  # columns of the tree count bytes
    docstrings = []
    # From the last one up, so that the lines above keep their numbers.
    for statement, text, is_alone in sorted(_docstrings(source), key=lambda found: -found[0].lineno):
        docstrings.append(inspect.cleandoc(text))
        first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
        before, after = lines[first][: statement.col_offset], lines[last][statement.end_col_offset :]
        if is_alone or before.strip() or after.strip().startswith(b";"):
            lines[first : last + 1] = [before + b"pass" + after]
        elif after.strip():
            lines[first : last + 1] = [before + after.lstrip()]
        else:
            while last + 1 < len(lines) and not lines[last + 1].strip():
                last += 1
            del lines[first : last + 1]
    return b"".join(lines).decode(), docstrings[::-1]


def _docstrings(source: str) -> Iterator[tuple[ast.Expr, str, bool]]:
    """Every docstring's statement, its text, and whether it is all that its body has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own old habits
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(value=ast.Constant(value=str(text))) as statement, *rest]:
                    yield statement, text, not rest


def _modules(library: Path) -> list[Path]:
    found = []
    for folder, folders, files in os.walk(library):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT)
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    inside = {path: path.relative_to(library).as_posix() for path in found}
    return sorted((path for path in found if not inside[path].startswith(_TABLES)), key=inside.__getitem__)
