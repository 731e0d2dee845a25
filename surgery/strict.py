"""The base of everything that comes from outside: fields that are checked, and nothing that is not known."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """What a file may say: it does not change, and knows only its own fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")
