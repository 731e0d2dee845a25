"""The Python API as one Markdown page, from the packages' `__all__` and docstrings.

`python -m cli.api_reference docs/api.md` writes it; a test compares the file with what the code says.
"""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES = ("surgery", "merges", "probes")
HEADER = """# Python API

What a command does is one import away, and a command, a recipe's step and these functions are the same code. Names are
imported on first use: `import surgery` takes a few milliseconds and brings no torch along."""


def page() -> str:
    """Return the page: for each package its docstring, then every exported name with signature and docstring."""
    return "\n\n".join([HEADER, *(_package(import_module(name)) for name in PACKAGES)]) + "\n"


def _package(package: ModuleType) -> str:
    names = sorted(package.__all__, key=lambda name: (not callable(getattr(package, name)), name.lower()))
    entries = [_entry(package, name) for name in names]
    return "\n\n".join([f"## {package.__name__}", inspect.getdoc(package) or "", *entries])


def _entry(package: ModuleType, name: str) -> str:
    value = getattr(package, name)
    if not callable(value):
        return f"### {package.__name__}.{name}\n\n{_constant(value)}"
    doc = inspect.getdoc(value) or ""
    return f"### {package.__name__}.{name}\n\n```python\n{_signature(name, value)}\n```\n\n```text\n{doc}\n```"


def _constant(value: Any) -> str:
    """Describe a registry by its keys."""
    return f"A `{type(value).__name__}` of {len(value)}: {', '.join(f'`{key}`' for key in value)}."


def _signature(name: str, value: Any) -> str:
    """Return the signature with annotations as they are written, one parameter a line where it is long."""
    try:
        signature = inspect.signature(value)
    except ValueError:  # exception types with a C constructor
        return name
    keyword = "class " if inspect.isclass(value) else "def "
    parameters = [str(parameter).replace("'", "") for parameter in signature.parameters.values()]
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    result = "" if inspect.isclass(value) else f" -> {_annotation(signature.return_annotation)}"
    line = f"{keyword}{name}({', '.join(parameters)}){result}"
    if len(line) <= 100:
        return line
    return f"{keyword}{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){result}"


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def main(path: Path) -> None:
    """Write the page to `path`."""
    from surgery.io.atomic import write_file

    write_file(path, page())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
