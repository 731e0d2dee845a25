"""Results as JSON's own types: what `--json`, manifests and results.json are written from."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError


def to_json(value: Any, *, indent: int = 1) -> str:
    """`value` as JSON text with a line break at its end; numbers that JSON lacks (NaN, infinities) become null."""
    return json.dumps(jsonable(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def jsonable(value: Any) -> Any:
    """`value` with dataclasses and mappings as objects, sequences as lists, paths as text, NaN and ±∞ as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_key(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _key(key: Any) -> str:
    return "/".join(map(str, key)) if isinstance(key, tuple) else str(key)


def read_json(path: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in `path`, or `missing` where there is no such file. Raises SurgeryError."""
    if missing is not None and not path.is_file():
        return missing
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SurgeryError(f"cannot be read ({error.strerror})", where=path) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a number of 5,000 digits
        raise SurgeryError(f"is not valid JSON ({error})", where=path, hint="Fetch the file again.") from error
    if not isinstance(value, dict):
        raise SurgeryError("is not a JSON object", where=path, hint="Fetch the file again.")
    return value
