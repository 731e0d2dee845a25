"""Many faults, one error: everything that is wrong with a user's data is reported at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from surgery.errors import SurgeryError, usage_error

MOST_SHOWN = 20


class Faults:
    """Collects faults, each with the place it was found in, until `settle` raises them as one error."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, what: str, *, where: object) -> None:
        """One more fault."""
        self.lines.append(str(SurgeryError(what, where=where)))

    @contextmanager
    def collect(self, where: object) -> Iterator[None]:
        """Takes down a `SurgeryError` of the block as a fault found in `where`."""
        try:
            yield
        except SurgeryError as error:
            self.lines.append(f"{where}: {error}")

    def settle(self) -> None:
        """Raises SurgeryError with the first 20 faults, one a line, if there are any."""
        if self.lines:
            raise usage_error("\n  ".join(_first(self.lines)))


def keys(names: Iterable[str]) -> str:
    """Examples by their keys, for an error: `example 3` or `examples 3, 4, 7 and 12 more`."""
    every = list(names)
    shown, more = ", ".join(every[:5]), len(every) - 5
    return f"example{'s' * (len(every) > 1)} {shown}" + (f" and {more} more" if more > 0 else "")


def _first(lines: Sequence[str]) -> list[str]:
    more = len(lines) - MOST_SHOWN
    return [*lines[:MOST_SHOWN], *([f"… and {more} more."] if more > 0 else [])]
