"""Promises of surgery.lab.python_text: two domains that every machine has, which share no text, and parts held out."""

from __future__ import annotations

import ast
import json
import os
import platform
from pathlib import Path

import pytest

from surgery import lab
from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.lab import python_text
from surgery.lab.python_text import FILES, MIN_DOCSTRING, TOPICS, cache_key, held_out_suffix, split_docstrings

LIBRARY = Path(os.__file__).parent
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Kind → name → text, as the lab gives them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURGERY_CACHE", str(tmp_path_factory.mktemp("cache")))
        paths = {kind: lab.data_path("python", kind) for kind in FILES}
        assert len({path.parent for path in paths.values()}) == 1
    rows = {kind: [json.loads(line) for line in path.read_bytes().splitlines()] for kind, path in paths.items()}
    for kind in FILES:
        names = [row["name"] for row in rows[kind]]
        assert len(set(names)) == len(names)
    return {kind: {row["name"]: row["text"] for row in rows[kind]} for kind in FILES}


def without_docstrings(source: str) -> str:
    """The reference: the tree, with every docstring taken out of its body."""

    class Remove(ast.NodeTransformer):
        def generic_visit(self, node: ast.AST) -> ast.AST:
            super().generic_visit(node)
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
            return node

    return ast.dump(Remove().visit(ast.parse(source)))


def docstrings(source: str) -> list[str]:
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED)]
    return [text for node in nodes if (text := ast.get_docstring(node))]


def test_code_is_the_librarys_without_its_docstrings(texts):
    code = texts["code"] | texts["code-held"]
    assert {"argparse", "json/decoder", "asyncio/base_events"} <= set(code)
    for name in sorted(code)[::9]:
        source = (LIBRARY / f"{name}.py").read_text(encoding="utf-8")
        assert ast.dump(ast.parse(code[name])) == without_docstrings(source), name


def test_documentation_is_the_docstrings_of_the_same_modules_and_the_language_reference(texts):
    code, docs = texts["code"] | texts["code-held"], texts["docs"] | texts["docs-held"]
    topics = {name for name in docs if name.startswith(f"{TOPICS}/")}
    assert f"{TOPICS}/assert" in topics and len(topics) > 70
    assert set(docs) - topics <= set(code)
    expected = [text for text in docstrings((LIBRARY / "textwrap.py").read_text()) if len(text) >= MIN_DOCSTRING]
    assert len(expected) > 3 and sorted(docs["textwrap"].split("\n\n")) == sorted("\n\n".join(expected).split("\n\n"))


def test_there_is_enough_of_both_to_train_on(texts):
    characters = {kind: sum(map(len, texts[kind].values())) for kind in FILES}
    assert characters["code"] > 4e6 and characters["docs"] > 1e6
    assert characters["code-held"] > 1e5 and characters["docs-held"] > 5e4


def test_about_one_in_sixteen_is_held_out_and_the_same_modules_of_both_domains(texts):
    for domain in ("code", "docs"):
        kept, out = set(texts[domain]), set(texts[f"{domain}-held"])
        assert not kept & out and 0.02 < len(out) / len(kept | out) < 0.12
    assert not set(texts["code"]) & set(texts["docs-held"]) and not set(texts["docs"]) & set(texts["code-held"])
    assert held_out_suffix("argparse") == "-held" and held_out_suffix("ast") == ""


def test_what_is_no_code_of_the_library_is_left_out(texts):
    parts = {part for name in texts["code"] | texts["code-held"] for part in name.split("/")}
    assert not parts & {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


def test_it_is_kept_by_version_of_python_and_made_once(tmp_path, monkeypatch):
    made = []

    def write(folder: Path) -> None:
        made.append(folder)
        for file in FILES.values():
            (folder / file).write_text("")

    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    monkeypatch.setattr(python_text, "write_texts", write)
    first = lab.data_path("python", "docs-held")
    assert first == lab.data_path("python", "docs-held") == tmp_path / "lab" / cache_key() / "docs-held.jsonl"
    assert len(made) == 1 and platform.python_version() in cache_key()
    assert {path.name for path in (tmp_path / "lab").iterdir()} == {cache_key(), ".lock"}


def test_a_library_without_sources_is_said_to_be_so(tmp_path, monkeypatch):
    monkeypatch.setattr(python_text, "EXCLUDED", {folder.name for folder in LIBRARY.iterdir()})
    monkeypatch.setattr(os, "__file__", str(tmp_path / "os.pyc"))
    with pytest.raises(SurgeryError, match="this Python has no source files of its standard library"):
        python_text.write_texts(tmp_path)


@pytest.mark.parametrize("kind", ["examples", "cod"])
def test_another_kind_is_answered_with_those_that_there_are(kind):
    with pytest.raises(SurgeryError) as caught:
        lab.data_path("python", kind)
    assert caught.value.exit_code == WRONG_USAGE
    assert str(caught.value) == (
        f"lab:python: the lab has no data called {kind!r}. There is code, docs, code-held, docs-held."
    )


@pytest.mark.parametrize(
    ("source", "code", "found"),
    [
        ('"""Of the module."""\n\n\nx = 1\n', "x = 1\n", ["Of the module."]),
        ('def f():\n    """Only."""\n', "def f():\n    pass\n", ["Only."]),
        ('def f(): "Only."\n', "def f(): pass\n", ["Only."]),
        ('def f(): "Of f."; return 1\n', "def f(): pass; return 1\n", ["Of f."]),
        ('def f():\n    "Of f."; return 1\n', "def f():\n    pass; return 1\n", ["Of f."]),
        ('def f():\n    """Of f."""  # why\n    return 1\n', "def f():\n    # why\n    return 1\n", ["Of f."]),
        ('class Ä:\n    """Ü.\n\n      a\n    b"""\n\n    x = "ä"\n', 'class Ä:\n    x = "ä"\n', ["Ü.\n\n  a\nb"]),
        ('async def f():\n    r"""a\\b"""\n    g()\n', "async def f():\n    g()\n", ["a\\b"]),
        ('def f():\n    x = """no"""\n    """no"""\n', 'def f():\n    x = """no"""\n    """no"""\n', []),
        ('def f():\n    b"no"\n    1\n', 'def f():\n    b"no"\n    1\n', []),
        ('class A:\n    "1"\n    def f(self):\n        "2"\n        def g(): "3"\n', None, ["1", "2", "3"]),
        ("", "", []),
    ],
)
def test_a_docstring_is_taken_out_and_nothing_else(source, code, found):
    left, docs = split_docstrings(source)
    assert docs == found
    assert code is None or left == code
    assert ast.dump(ast.parse(left)) == without_docstrings(source) or "; return" in source
