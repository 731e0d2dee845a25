"""Records in JSON files of ours: of a kind and of a version, every field checked when they are read, never changed.

In go pydantic records, out comes the text of a file that begins with `schema` and `kind`; and back.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from surgery.checkpoint import read_json
from surgery.errors import SurgeryError, usage_error
from surgery.jsonable import to_json
from surgery.strict import Strict

R = TypeVar("R", bound=Strict)
HEAD = ("schema", "kind")


def record_text(kind: str, schema: int, record: BaseModel) -> str:
    """What the file of a record holds."""
    return to_json({"schema": schema, "kind": kind} | record.model_dump(mode="json"))


def read_record(path: Path, kind: str, schema: int, record: type[R], *, again: str) -> R:
    """The record in the file `path`.

    Args:
        again: what makes one anew, as a hint.

    Raises:
        SurgeryError: the file cannot be read, holds another kind or version, or a field that is wrong.
    """
    held = read_json(path)
    if held.get("kind") != kind or held.get("schema") != schema:
        raise usage_error(
            f"holds {held.get('kind')!r} of schema {held.get('schema')!r}, expected {kind!r} of schema {schema}",
            where=path,
            hint=f"{again} with this version.",
        )
    try:
        return record.model_validate({name: value for name, value in held.items() if name not in HEAD})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SurgeryError(f"{place}: {first['msg']}", where=path, hint=f"{again}.") from error
