"""Versioned JSON records: pydantic models stored under a `schema` number and a `kind`, validated when read."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from surgery.errors import SurgeryError, usage_error
from surgery.io.json_io import read_json, to_json

HEADER = ("schema", "kind")  # the fields of every record that are not the model's


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
            f"holds {fields.get('kind')!r} of schema {fields.get('schema')!r}, expected {kind!r} of schema {schema}",
            where=path,
            hint=f"{again} with this version.",
        )
    try:
        return record.model_validate({name: value for name, value in fields.items() if name not in HEADER})
    except ValidationError as error:
        # One error is enough: nobody writes these files by hand, and the remedy is the same for all.
        first = error.errors()[0]
        location = ".".join(map(str, first["loc"]))
        raise SurgeryError(f"{location}: {first['msg']}", where=path, hint=f"{again}.") from error
