"""The catalogue: published cache keys, and modules that import each other in one direction only."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from surgery import lab
from surgery.lab.catalogue import MODELS, lineage

# People's caches have these folders: another key would train all models of a family again.
FOLDERS = {
    "base": "e00b8b5f0ab4",
    "sft": "e00b8b5f0ab4",
    "grpo": "e00b8b5f0ab4",
    "instruct": "e00b8b5f0ab4",
    "substrate": "6951e01a83ac",
    "adder": "6951e01a83ac",
    "sorter": "6951e01a83ac",
    "cliff-parent": "16ea42b6b1a2",
    "cliff": "16ea42b6b1a2",
    "cliff-partial": "16ea42b6b1a2",
    "cliff-many-parent": "9c8273a970d2",
    "cliff-many": "9c8273a970d2",
    "cliff-weak-parent": "8cc948447843",
    "cliff-weak": "8cc948447843",
    "cliff-gqa-parent": "7edcbd6499e9",
    "cliff-gqa": "7edcbd6499e9",
    "moe": "2a62c99a3cf2",
}
FOLDER = Path(lab.__file__).parent


def test_every_model_stays_in_the_folder_that_published_caches_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_CACHE", "/cache")
    expected = {name: Path("/cache/lab", key, name) for name, key in FOLDERS.items()}
    assert {name: lab.path_of(name) for name in lab.names()} == expected


def test_ancestors_are_of_the_same_family_and_listed_before_their_children() -> None:
    position = {name: number for number, name in enumerate(lab.names())}
    for name, model in MODELS.items():
        assert lineage(name)[-1] == name
        for ancestor in lineage(name)[:-1]:
            assert position[ancestor] < position[name] and MODELS[ancestor].recipe is model.recipe


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """The lab's modules that the file imports, also inside functions and for type checking alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            # `from surgery.lab import moe` imports the module; other names come out of the package itself.
            found |= submodules if len(submodules) == len(node.names) else submodules | {node.module}
    return found & modules


def test_no_import_closes_a_circle_inside_functions_either() -> None:
    paths = {
        ".".join(path.relative_to(FOLDER.parent.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in FOLDER.rglob("*.py")
    }
    graph = {name: imports_of(path, set(paths)) for name, path in paths.items()}
    assert graph["surgery.lab.builder"] >= {"surgery.lab.moe", "surgery.lab.catalogue"}
    TopologicalSorter(graph).prepare()  # raises CycleError
