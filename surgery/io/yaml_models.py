"""Validate YAML texts against pydantic models; report every error with file, line, key and the nearest known name.

The model alone defines what a text may contain; its JSON Schema, for editors, is derived from it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from surgery.errors import SurgeryError, closest, usage_error
from surgery.io.input_files import MB, read_utf8
from surgery.io.yaml_nodes import YamlErrors, YamlNode, read_documents

M = TypeVar("M", bound=BaseModel)
# Configs, plans and recipes have some kB. PyYAML, without libyaml, takes a second or two for this.
MAX_YAML_BYTES = MB // 4
# Decimal, as reports write sizes.
_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# pydantic's names of the errors for which the nearest known word is looked up.
_UNKNOWN = "extra_forbidden"
_LITERAL = "literal_error"


def read_text(path: Path) -> str:
    """Return the text of a YAML file. Raises SurgeryError if it cannot be read, or is too large."""
    try:
        # Without the byte order mark of Windows editors: the text also goes into model cards.
        return read_utf8(path, limit=MAX_YAML_BYTES)
    except SurgeryError as error:
        # It is the user's own request that names the file.
        raise usage_error(error.what, where=path, hint=error.hint) from error


def parse_model(text: str, where: str, kind: type[M]) -> M:
    """Parse `text`, one document, as a `kind`.

    Raises:
        SurgeryError: it is not YAML, has no document or several, or is not a valid `kind`; every error has a line of
            its own, `FILE:LINE: KEY: what`.
    """
    nodes, errors = read_documents(text, where)
    if not nodes:
        raise usage_error("is empty", where=where)
    if len(nodes) > 1:
        raise usage_error(f"holds {len(nodes)} documents, expected one", where=where)
    errors.raise_if_any()
    return validate_node(nodes[0], errors, kind)


def validate_node(root: YamlNode, errors: YamlErrors, kind: type[M]) -> M:
    """Validate a tree of nodes as a `kind`. Raises SurgeryError with every error."""
    try:
        return kind.model_validate(root.plain)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            node, rest = node_at(root, detail["loc"])
            errors.add(node, ": ".join(part for part in (rest, _sentence(detail, kind)) if part))
        errors.raise_if_any()
        # Never reached, as there is at least one detail; it tells the type checker that nothing is returned here.
        raise


def n_bytes(text: str) -> int:
    """Return a number of bytes: `2 GB` → 2,000,000,000. Raises ValueError."""
    number, _, unit = text.strip().partition(" ")
    try:
        return int(float(number) * _UNITS[unit.strip()])
    except (KeyError, ValueError, OverflowError) as error:
        raise ValueError(f"got {text!r}, expected a number of bytes, or such as 2 GB") from error


def dump_yaml(value: object) -> str:
    """Return a plain value as YAML text that reads back the same, whatever characters it contains."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        """Write an object that occurs several times out each time, not as an anchor and aliases."""
        return True


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # By default PyYAML writes some characters, such as U+0085, in a form that it cannot read back.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _quoted)


def node_at(root: YamlNode, location: Sequence[int | str]) -> tuple[YamlNode, str]:
    """Return the deepest node on the path `location`, and the key beyond it if that is missing."""
    node = root
    for depth, step in enumerate(location):
        value = node.value
        if isinstance(value, dict) and step in value:
            node = value[str(step)]
        elif isinstance(value, tuple) and isinstance(step, int) and step < len(value):
            node = value[step]
        elif depth == len(location) - 1 and isinstance(value, dict):
            return node, str(step)
        # Else a step that pydantic adds for one type of a union: it is in no file.
    return node, ""


def _sentence(detail: ErrorDetails, kind: type[BaseModel]) -> str:
    location = detail["loc"]
    if detail["type"] == _UNKNOWN:
        known = sorted(_known(kind, location[:-1]))
        near = closest(str(location[-1]), known)
        return f"is not known here; did you mean {near}?" if near else f"is not known here; known: {', '.join(known)}"
    if detail["type"] == "missing":
        return "is missing"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    # pydantic writes "Input should be a valid number, unable to parse …"; our errors say "expected a valid number".
    message = detail["msg"].removeprefix("Input should be ").partition(", unable")[0]
    got = detail["input"]
    got_text = "a mapping" if isinstance(got, dict) else "a list" if isinstance(got, list) else repr(got)
    if detail["type"] in ("model_type", "dict_type"):
        return f"got {got_text}, expected a mapping"
    if detail["type"] == _LITERAL and isinstance(got, str):
        # pydantic gives the choices only as a sentence: "'a', 'b' or 'c'".
        allowed = [word.strip("'") for word in str(detail["ctx"]["expected"]).replace(" or ", ", ").split(", ")]
        near = closest(got, allowed)
        return f"got {got_text}, expected {message}" + (f"; did you mean {near}?" if near else "")
    return f"got {got_text}, expected {message}"


def _known(kind: type[BaseModel], location: Sequence[int | str]) -> Iterator[str]:
    """Yield the keys that a mapping at `location` may have."""
    for model in _models(kind, location):
        for name, field in model.model_fields.items():
            yield field.alias or name


def _models(kind: Any, location: Sequence[int | str]) -> list[type[BaseModel]]:
    models = list(_inside(kind))
    for step in location:
        if isinstance(step, int):
            continue
        # A step that is no field (a key of a mapping, the tag of a union) leaves the models as they are.
        models = [
            inner
            for model in models
            for name, field in model.model_fields.items()
            if step in (name, field.alias)
            for inner in _inside(field.annotation)
        ] or models
    return models


def _inside(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that a type contains."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _inside(part)
