"""Read JSON objects, and convert results to JSON for `--json`, manifests and results.json."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError


def to_json(value: Any, *, indent: int = 1) -> str:
    """Return `value` as JSON text with a final line break; NaN and infinities, which JSON lacks, become null."""
    # `jsonable` has replaced every NaN; if it ever misses one, an error is better than a file that other parsers
    # refuse.
    return json.dumps(jsonable(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def jsonable(value: Any) -> Any:
    """Return `value` with dataclasses and mappings as dicts, sequences as lists, paths as text, NaN and ±∞ as None."""
    # Not by `dataclasses.asdict`, which copies every value deeply and leaves paths and NaN inside as they are.
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_key(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        # Sets have no order of their own: sorted, or the same result would give other bytes in another run.
        return [jsonable(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _key(key: Any) -> str:
    # JSON has only text as keys: a tuple such as (3, 7) becomes `3/7`.
    return "/".join(map(str, key)) if isinstance(key, tuple) else str(key)


def read_json(path: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the JSON object in `path`, or `missing` if there is no such file. Raises SurgeryError."""
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
