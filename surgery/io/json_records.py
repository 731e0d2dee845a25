"""Versioned JSON records: pydantic models stored under a `schema` number and a `kind`, validated when read."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from surgery.errors import SurgeryError, usage_error
from surgery.io.json_fields import shown
from surgery.io.json_io import read_json, to_json

HEADER = ("schema", "kind")  # the fields of every record that are not the model's
# Far beyond all that is measured. Sums and axes of a plot stay finite up to it.
LARGEST_NUMBER = 1e100


class Strict(BaseModel):
    """Base of every record read from outside: frozen, and unknown fields are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


R = TypeVar("R", bound=Strict)


def record_text(kind: str, schema: int, record: BaseModel) -> str:
    """Return the text of the file that holds `record`."""
    return to_json({"schema": schema, "kind": kind} | record.model_dump(mode="json"))


def read_record(path: Path, kind: str, schema: int, record: type[R], *, again: str) -> R:
    """Read and validate the record in the file `path`.

    Args:
        again: how to create the file again, used as a hint.

    Raises:
        SurgeryError: the file cannot be read, holds another kind or version, or a field is invalid.
    """
    fields = read_json(path)
    # Checked first: of another kind every field would be wrong, and the list would hide the reason.
    if fields.get("kind") != kind or fields.get("schema") != schema:
        raise usage_error(
            f"holds {shown(fields.get('kind'))} of schema {shown(fields.get('schema'))}, expected {kind!r} of schema "
            f"{schema}",
            where=path,
            hint=f"{again} with this version.",
        )
    _check_numbers(fields, path, hint=f"{again}.")
    try:
        return record.model_validate({name: value for name, value in fields.items() if name not in HEADER})
    except ValidationError as error:
        raise invalid_record(error, path, hint=f"{again}.") from error


def _check_numbers(value: object, path: Path, *, hint: str, key: str = "") -> None:
    """Raise SurgeryError where a number is NaN, or larger than `LARGEST_NUMBER`."""
    if isinstance(value, dict | list):
        # `read_json` has bounded the depth.
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_numbers(inner, path, hint=hint, key=f"{key}.{name}" if key else str(name))
    elif isinstance(value, int | float) and not abs(value) <= LARGEST_NUMBER:
        expected = f"expected a number of at most {LARGEST_NUMBER:g}"
        raise SurgeryError(f"{shown(key)[1:-1]}: got {shown(value)}, {expected}", where=path, hint=hint)


def invalid_record(error: ValidationError, where: object, *, hint: str) -> SurgeryError:
    """Return the first of pydantic's errors as a `SurgeryError`: file, key, what it holds, what was expected.

    One is enough: nobody writes these files by hand, and the remedy is the same for all.
    """
    first = error.errors(include_url=False)[0]
    # Cut: a key may be a name from a stranger's file.
    location = ".".join(shown(part).strip("'") for part in first["loc"]) or "it"
    return SurgeryError(f"{location}: {_sentence(first)}", where=where, hint=hint)


def _sentence(detail: ErrorDetails) -> str:
    if detail["type"] == "missing":
        return "is missing"
    if detail["type"] == "extra_forbidden":
        return "is not known here"
    # pydantic writes "Input should be a valid integer"; our errors say "expected a valid integer".
    expected = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"got {shown(detail['input'])}, expected {expected[0].lower()}{expected[1:]}"
