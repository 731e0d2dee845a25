"""The public names are there, documented with an example, shown by Tab, and cost nothing until they are used."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import textwrap
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import merges
import probes
import surgery

PUBLIC = (surgery, merges, probes)
# Packages whose `__init__` says what is public in them.
PACKAGES = [
    *("surgery", "merges", "probes", "surgery.checkpoint", "surgery.edits", "surgery.engine", "surgery.evaluation"),
    *("surgery.growth", "surgery.hub", "surgery.models", "surgery.publish", "surgery.recipes", "surgery.reporting"),
    "surgery.vectors",
]
FUNCTIONS = [
    pytest.param(value, id=f"{package.__name__}.{name}")
    for package in PUBLIC
    for name in package.__all__
    if inspect.isfunction(value := getattr(package, name))
]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_one_import_away_documented_and_shown(package: str) -> None:
    module = import_module(package)
    assert set(module.__all__) <= set(dir(module))
    assert all(getattr(module, name).__doc__ for name in module.__all__)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_public_function_has_an_example_that_is_python(function: object) -> None:
    doc = inspect.getdoc(function)
    assert doc is not None
    _, _, after = doc.partition("Example:\n")
    lines = after.split("\n\n")[0]
    ast.parse(textwrap.dedent(lines))
    assert f"{function.__name__}(" in lines  # type: ignore[attr-defined]


@pytest.mark.parametrize("package", PUBLIC)
def test_a_name_that_is_none_is_said(package: object) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # type: ignore[attr-defined] # noqa: B018


def test_the_version_is_that_of_the_distribution() -> None:
    assert surgery.__version__ == version("model-surgery")


def test_importing_the_packages_brings_nothing_heavy_along() -> None:
    script = (
        "import sys, surgery, merges, probes\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'pydantic', 'typer'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_function_can_be_called_where_it_is_imported_from(tmp_path: Path) -> None:
    with pytest.raises(surgery.SurgeryError, match="no such"):
        surgery.transfer("./nowhere", "./nowhere", "./nowhere", tmp_path / "out")
