"""The one exception type that users see: what went wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

FAILED = 1
WRONG_USAGE = 2


class SurgeryError(Exception):
    """A fault that the user can mend.

    Args:
        what: what is wrong, with the value found and the rule it breaks.
        where: the file, tensor, key or option it was found in.
        hint: the next step, as a sentence.
        exit_code: 1 when the job failed, 2 when the request itself was wrong.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object | None = None,
        hint: str | None = None,
        exit_code: int = FAILED,
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.hint = hint
        self.exit_code = exit_code
        super().__init__(str(self))

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are pickled by their positional arguments alone, which would lose all but the text.
        return _rebuilt, (self.what, self.where, self.hint, self.exit_code)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        stop = "" if self.what.endswith((".", "!", "?")) else "."
        return f"{place}{self.what}{stop} {self.hint}" if self.hint else f"{place}{self.what}"


def _rebuilt(what: str, where: str | None, hint: str | None, exit_code: int) -> SurgeryError:
    return SurgeryError(what, where=where, hint=hint, exit_code=exit_code)


def usage_error(what: str, *, where: object | None = None, hint: str | None = None) -> SurgeryError:
    """A `SurgeryError` for a request that is wrong in itself (exit code 2)."""
    return SurgeryError(what, where=where, hint=hint, exit_code=WRONG_USAGE)


def listing(names: Iterable[str], limit: int = 20) -> str:
    """`names` as one line: at most `limit` of them, then how many more there are."""
    every = list(names)
    shown = ", ".join(every[:limit])
    return shown if len(every) <= limit else f"{shown} and {len(every) - limit} more"
