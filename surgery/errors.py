"""Errors and warnings that users see: `SurgeryError`, `ErrorList`, which raises many as one, and `SurgeryWarning`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

FAILED = 1
WRONG_USAGE = 2

# Of a stranger's file, names and what a parser says of them may be as long as the file.
MOST_CHARACTERS = 2_000  # of one line of a message
MOST_LINES = 1_000  # of a message
_MOST_COMPARED, _LONGEST_COMPARED = 10_000, 200  # known names, and characters of each, to find a near one among
_TAIL = 300  # characters from the end of a longer line that are shown too: what was expected stands there


class SurgeryError(Exception):
    """A fault that the user can mend.

    Line breaks in `what`, `where` and `hint` are written out as `\\n`, since names from files can have them and could
    look like lines of ours; and what is too long for a message is cut.

    Args:
        what: what is wrong, with the value found and the rule it breaks; or several lines.
        where: the file, tensor, key or option it was found in.
        hint: the next step, as a sentence.
        exit_code: 1 when the job failed, 2 when the request itself was wrong.
    """

    def __init__(
        self,
        what: str | Sequence[str],
        *,
        where: object | None = None,
        hint: str | None = None,
        exit_code: int = FAILED,
    ) -> None:
        self.what = "\n".join(_lines(what))
        self.where = None if where is None else _flat(str(where))
        self.hint = None if hint is None else _flat(hint)
        self.exit_code = exit_code
        super().__init__(str(self))

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are pickled by their positional arguments alone, which would lose all but the text.
        return _rebuilt, (tuple(self.what.split("\n")), self.where, self.hint, self.exit_code)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        stop = "" if self.what.endswith((".", "!", "?")) else "."
        return f"{place}{self.what}{stop} {self.hint}" if self.hint else f"{place}{self.what}"


class SurgeryWarning(UserWarning):
    """What a user should know, although nothing is wrong with the result; emitted by `warnings.warn`."""


def _rebuilt(what: tuple[str, ...], where: str | None, hint: str | None, exit_code: int) -> SurgeryError:
    return SurgeryError(what, where=where, hint=hint, exit_code=exit_code)


def _lines(what: str | Sequence[str]) -> list[str]:
    lines = [what] if isinstance(what, str) else list(what)
    more = len(lines) - MOST_LINES
    return [*map(_flat, lines[:MOST_LINES]), *([f"  … and {more:,} more."] if more > 0 else [])]


def shortened(text: str, most: int, tail: int) -> str:
    """Return `text`; of one with more than `most` characters the beginning and the last `tail`, `most` in all."""
    if len(text) <= most:
        return text
    note = f" … ({len(text):,} characters) … "
    return f"{text[: most - tail - len(note)]}{note}{text[len(text) - tail :]}"


def _flat(text: str) -> str:
    """Return `text` on one line that is short enough for a message."""
    text = shortened(text, MOST_CHARACTERS, _TAIL)
    # Without a look at every other invisible character: those are written out where text meets a terminal or a page.
    return "\\n".join(text.split("\n"))


def usage_error(what: str | Sequence[str], *, where: object | None = None, hint: str | None = None) -> SurgeryError:
    """Return a `SurgeryError` for a request that is wrong in itself (exit code 2)."""
    return SurgeryError(what, where=where, hint=hint, exit_code=WRONG_USAGE)


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the entry of `known` that `name` may be a misspelling of; None where none is near."""
    return next(iter(_near(name, known, 1)), None)


def did_you_mean(name: str, known: Iterable[str], *, most: int = 1) -> str | None:
    """Return the hint `Did you mean X?` for the (up to `most`) entries of `known` near to `name`; None without any."""
    near = _near(name, known, most)
    return f"Did you mean {listing(near)}?" if near else None


def _near(name: str, known: Iterable[str], most: int) -> list[str]:
    # Comparing two texts takes the product of their lengths: nobody misspells names of thousands of characters.
    some = [text for text in islice(known, _MOST_COMPARED) if len(text) <= _LONGEST_COMPARED]
    return difflib.get_close_matches(name, some, n=most) if len(name) <= _LONGEST_COMPARED else []


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def listing(names: Iterable[str], limit: int = 20) -> str:
    """Return `names` as one line: at most `limit` of them, then how many more there are."""
    every = list(names)
    shown = ", ".join(every[:limit])
    return shown if len(every) <= limit else f"{shown} and {len(every) - limit} more"


@dataclass
class _Entry:
    what: str | tuple[str, ...]
    hint: str | None = None
    usage: bool = False
    subjects: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.subjects:
            return str(SurgeryError(self.what, hint=self.hint))
        quoted = listing([f'"{name}"' for name in self.subjects], ErrorList.MOST_SUBJECTS)
        some = "" if len(self.subjects) == 1 else f"{len(self.subjects):,} tensors: "
        return str(SurgeryError(f"{some}{quoted}: {self.what}", hint=self.hint))


class ErrorList:
    """Errors collected while an input is checked, and raised together as one `SurgeryError`.

    An error that is added twice is kept once. Where any error is about the request itself (`usage`), the exit code is
    that of wrong usage, and those errors come first.
    """

    MOST_SUBJECTS = 3  # tensors named in a message that many of them share

    def __init__(self) -> None:
        self._entries: dict[tuple[str | tuple[str, ...], str | None], _Entry] = {}
        self._reasons: dict[str, None] = {}

    def add_reason(self, what: str) -> None:
        """Add what is no error in itself, but explains others: it is shown after them, where there are any."""
        self._reasons[what] = None

    def add(self, what: str, *, where: object | None = None, hint: str | None = None, usage: bool = False) -> None:
        """Add one error; the arguments are those of `SurgeryError`."""
        what = what if where is None else f"{where}: {what}"
        self._entries.setdefault((what, hint), _Entry(what, hint, usage))

    def add_tensor(self, name: str, what: str, hint: str) -> None:
        """Add an error of the tensor `name`; tensors that share `what` and `hint` become one message."""
        self._entries.setdefault((what, hint), _Entry(what, hint)).subjects.append(name)

    @contextmanager
    def collect(self, where: object | None = None, *, usage: bool = False) -> Iterator[None]:
        """Add a `SurgeryError` raised in the block instead of letting it pass."""
        try:
            yield
        except SurgeryError as error:
            first, *rest = str(error).split("\n")
            lines = (first if where is None else f"{_flat(str(where))}: {first}", *rest)
            # One line as `add` keeps it, so that the same error is there once.
            what = lines if rest else lines[0]
            self._entries.setdefault((what, None), _Entry(what, None, usage or error.exit_code == WRONG_USAGE))

    def extend(self, other: ErrorList) -> None:
        """Add every error of `other`."""
        for key, entry in other._entries.items():
            self._entries.setdefault(key, entry)
        self._reasons |= other._reasons

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the messages, those about the request first."""
        yield from map(str, sorted(self._entries.values(), key=lambda entry: not entry.usage))
        if self:
            yield from self._reasons

    def raise_if_any(self, where: object | None = None, *, limit: int | None = None) -> None:
        """Raise one SurgeryError with every message (the first `limit` of them), if there are any."""
        if not self:
            return
        messages = list(self)
        more = 0 if limit is None else len(messages) - limit
        shown = [*messages[:limit], f"… and {more} more."] if more > 0 else messages
        usage = any(entry.usage for entry in self._entries.values())
        raise SurgeryError(indented(shown), where=where, exit_code=WRONG_USAGE if usage else FAILED)


def indented(messages: Iterable[str]) -> list[str]:
    """Return the lines of a message that lists `messages`: the first after the place, the others below it, indented.

    A message that has several lines, as that of a `SurgeryError` may, keeps them as they are.
    """
    return [
        f"  {line}" if at and not below else line
        for at, message in enumerate(messages)
        for below, line in enumerate(message.split("\n"))
    ]
