"""Read what transformers' config classes fill in: `config_defaults.json`, by `tests/support/config_defaults.py`.

The file is data instead of an import of transformers, which takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

DEFAULTS = Path(__file__).with_name("config_defaults.json")


@dataclass(frozen=True)
class NestedConfig:
    """A config inside another.

    any_class: whether its own `model_type` may name another class. content: defaults of this place; None if there is
    no such config where the file has none.
    """

    class_name: str
    any_class: bool = False
    content: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ConfigClass:
    """What transformers knows of one `model_type`.

    defaults: key → value, for what a file leaves out. aliases: other names of keys. nested: the configs inside.
    forced: rules of `config_rules` for keys that follow from others whatever the file says. derived: those for keys
    that do so where the file says nothing. rope: how rotary embeddings are spelled and what is left out, see
    `config_rope`; None without them. unknown: keys whose default no rule describes.
    """

    defaults: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)
    nested: Mapping[str, NestedConfig] = field(default_factory=dict)
    forced: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    derived: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    rope: Mapping[str, Any] | None = None
    unknown: frozenset[str] = frozenset()


@cache
def _read() -> dict[str, Any]:
    classes: dict[str, Any] = json.loads(DEFAULTS.read_text(encoding="utf-8"))["classes"]
    return classes


@cache
def config_class(model_type: str) -> ConfigClass | None:
    """Return what transformers fills in for `model_type`, or None for one that it does not know."""
    entry = _read().get(model_type)
    if entry is None:
        return None
    nested = {key: NestedConfig(*spec) for key, spec in entry.get("nested", {}).items()}
    rest = {key: value for key, value in entry.items() if key not in ("nested", "unknown")}
    return ConfigClass(**rest, nested=nested, unknown=frozenset(entry.get("unknown", ())))
