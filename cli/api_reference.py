"""The Python API as one Markdown page, from the packages' `__all__` and docstrings.

`python -m cli.api_reference docs/api.md` writes it; a test compares the file with what the code says.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES = ("surgery", "merges", "probes")
LONGEST_LINE = 100  # of a signature that is written in one line
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
    if isinstance(value, str):  # the version, which changes more often than this page
        return f"### {package.__name__}.{name}\n\nThe version of the installed distribution."
    if not callable(value):
        return f"### {package.__name__}.{name}\n\n{_constant(value)}"
    doc = inspect.getdoc(value) or ""
    return f"### {package.__name__}.{name}\n\n```python\n{_signature(name, value)}\n```\n\n```text\n{doc}\n```"


def _constant(value: Any) -> str:
    """Describe a registry by its keys."""
    return f"A `{type(value).__name__}` of {len(value)}: {', '.join(f'`{key}`' for key in value)}."


def _signature(name: str, value: Any) -> str:
    """Return the signature as it is written in the source, with one parameter per line where it is long."""
    parameters = list(inspect.signature(value).parameters.values())
    texts = [_parameter(parameter) for parameter in parameters]
    kinds = [parameter.kind for parameter in parameters]
    if inspect.Parameter.KEYWORD_ONLY in kinds:
        texts.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    is_class = inspect.isclass(value)
    start = f"{'class' if is_class else 'def'} {name}("
    end = ")" if is_class else f") -> {inspect.signature(value).return_annotation}"
    line = f"{start}{', '.join(texts)}{end}"
    return line if len(line) <= LONGEST_LINE else "\n".join([start, *(f"    {text}," for text in texts), end])


def _parameter(parameter: inspect.Parameter) -> str:
    text = f"{parameter.name}: {parameter.annotation}"
    default = parameter.default
    if default is inspect.Parameter.empty:
        return text
    if is_dataclass(default):  # settings with their own defaults; what these are stands at their class
        return f"{text} = {type(default).__name__}()"
    return f"{text} = {default.__name__ if inspect.isfunction(default) else repr(default)}"


def main(path: Path) -> None:
    """Write the page to `path`."""
    from surgery.io.atomic import write_file

    write_file(path, page())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
