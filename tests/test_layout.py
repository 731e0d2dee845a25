"""The layout of the code: which packages there are, how they import each other, and limits that keep it readable."""

from __future__ import annotations

import ast
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "surgery": {
        *("checkpoint", "edits", "engine", "evaluation", "growth", "hub", "io", "lab", "models", "publish"),
        *("recipes", "reporting", "runtime", "vectors"),
    },
    "probes": {"data", "experts", "model", "refusal", "side_effects"},
    "merges": {"config", "ensemble", "methods", "tokenizer"},
    "cli": {"commands"},
}
MOST_CONTRACTS, MOST_ROWS = 8, 45
LONG, LONGEST, MOST_LONG = 60, 90, 8  # lines of a function, and how many functions may be long
MOST_FMT_SKIPS = 10  # tables of numbers
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def module_name(path: Path) -> str:
    """`surgery/io/atomic.py` → `surgery.io.atomic`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every statement of a module that can run, those inside of functions too."""
    for child in ast.iter_child_nodes(node):
        if not is_type_checking(child):
            yield child
            yield from statements(child)


def imported(node: ast.AST) -> Iterator[str]:
    """The modules of ours that an import statement loads."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in MODULES)
    elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            yield submodule if submodule in MODULES else node.module


def public_definitions(kind: type[ast.stmt]) -> Iterator[tuple[str, str]]:
    """(name, module) of every public class or function at the top of a module."""
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, kind) and not node.name.startswith("_"):  # type: ignore[attr-defined]
                yield node.name, module_name(path)  # type: ignore[attr-defined]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_holds_its_subpackages_and_no_others(package: str) -> None:
    folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    assert folders == PACKAGES[package]


def test_surgery_itself_holds_errors_and_nothing_else() -> None:
    assert {path.name for path in (ROOT / "surgery").glob("*.py")} == {"__init__.py", "errors.py"}


def test_probes_and_commands_lie_in_subpackages() -> None:
    assert {path.name for path in (ROOT / "probes").glob("*.py")} == {"__init__.py"}
    names = {path.stem for path in (ROOT / "cli").glob("*.py")}
    assert names == {
        *("__init__", "api_reference", "app", "console", "main", "method_options", "options", "reference", "signatures")
    }


def test_import_contracts_are_few_and_short() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    rows = [
        row
        for contract in contracts
        for key in ("layers", "source_modules", "ignore_imports")
        for row in contract.get(key, ())
    ]
    assert len(contracts) <= MOST_CONTRACTS
    assert len(rows) <= MOST_ROWS


def test_no_modules_import_each_other_in_a_circle_not_even_lazily() -> None:
    graph = nx.DiGraph()
    for path, tree in TREES.items():
        name = module_name(path)
        graph.add_edges_from((name, other) for node in statements(tree) for other in imported(node) if other != name)
    assert [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1] == []


def test_no_two_public_classes_share_a_name() -> None:
    homes = defaultdict(list)
    for name, module in public_definitions(ast.ClassDef):
        homes[name].append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


@pytest.mark.parametrize("name", sorted(name for name, path in MODULES.items() if path.name == "__init__.py"))
def test_no_exported_name_is_a_module_too(name: str) -> None:
    package = import_module(name)
    submodules = {other.rpartition(".")[2] for other in MODULES if other.rpartition(".")[0] == name}
    assert submodules & set(getattr(package, "__all__", ())) == set()


def test_functions_are_short() -> None:
    lengths = {
        f"{module_name(path)}.{node.name}": node.end_lineno - node.lineno + 1
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    }
    long = {name: lines for name, lines in lengths.items() if lines > LONG}
    assert {name: lines for name, lines in long.items() if lines > LONGEST} == {}
    assert len(long) <= MOST_LONG, long


def test_the_formatter_formats() -> None:
    skips = [path.name for path in FILES for line in path.read_text(encoding="utf-8").splitlines() if "# fmt:" in line]
    assert len(skips) <= MOST_FMT_SKIPS


def test_docstrings_are_plain_sentences() -> None:
    odd = [
        f"{module_name(path)}: {phrase}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node))
        for phrase in ("In comes ", "In come ", "in comes ", "in come ", "out comes ", "out come ")
        if phrase in text
    ]
    assert odd == []


def test_tests_mirror_the_layout() -> None:
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    # The fuzzer runs all packages: its tests mirror none.
    assert {str(folder) for folder in folders if not (ROOT / folder).is_dir()} == {"fuzz"}
    assert {path.name for path in (ROOT / "tests").glob("*.py")} == {
        "conftest.py",
        "test_layout.py",
        "test_audit.py",
        "test_packaging.py",
    }
