"""Match names against patterns that a stranger's file may hold: globs and regular expressions, in bounded time.

Python's `re` tries one way after another, and `(a+)+$` has 2ⁿ of them; here all ways are followed at once, so that the
time grows with the lengths of pattern and name alone. Patterns that need memory of what was matched before (references,
looks ahead and behind) are refused; no adapter that PEFT wrote has them.

- `matches_glob` for names, as in a shell;
- `glob_paths` for files on disk;
- `SuffixPatterns` for the keys of PEFT's `alpha_pattern`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import translate
from functools import lru_cache
from pathlib import Path

from surgery.errors import SurgeryError, usage_error
from surgery.io.regular_expressions import Expression, StepCounter

MAX_CHARACTERS = 1_000  # of one pattern; PEFT's and globs over tensor names have fewer than 200
MAX_NAME = 4_096  # characters of a module's name
MAX_PATTERNS = 100_000  # of one file: a key for every module of the largest models
MAX_VISITED = 1_000_000  # files and folders that one glob looks at
MAX_EXPRESSIONS = 1_000  # of one file: each is tried on every name
_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")
_WILD = frozenset("*?[")
RECURSIVE = "**"


def matches_glob(name: str, glob: str) -> bool:
    """Return whether `glob` matches the whole of `name`: `*` any run of characters, `?` one, `[…]` one of a set.

    Raises:
        SurgeryError: the glob has more than `MAX_CHARACTERS`.
    """
    return _compiled_glob(glob).match(name) is not None


@lru_cache(maxsize=1_000)
def _compiled_glob(glob: str) -> re.Pattern[str]:
    check_length(glob, where=None)
    # Python's translation never goes back behind a star that it has passed (since 3.9), so that it takes linear time.
    # What it does not do: several stars in a row are one.
    return re.compile(translate(re.sub(r"\*+", "*", glob)))


def check_length(pattern: str, *, where: object) -> None:
    """Raise SurgeryError where `pattern` is longer than any that names of tensors and files need."""
    if len(pattern) > MAX_CHARACTERS:
        raise usage_error(
            f"the pattern {pattern[:40]!r}… has {len(pattern):,} characters, more than {MAX_CHARACTERS:,}",
            where=where,
            hint="Give several shorter ones.",
        )


def has_wildcard(text: str) -> bool:
    """Return whether `text` is a glob: has one of `*`, `?` and `[`."""
    return not _WILD.isdisjoint(text)


def glob_paths(pattern: str) -> list[str]:
    """Return what the glob `pattern` matches on disk, sorted: without hidden files; `**` is any number of folders.

    A folder is entered once for each `**`, even where links lead to it in several ways or in circles: the shortest way
    counts, and of two that are equally long the first in the order of names.

    Raises:
        SurgeryError: the pattern is too long, or more than `MAX_VISITED` files and folders would have to be looked at.
    """
    check_length(pattern, where=None)
    path = Path(pattern).expanduser()
    steps = path.parts[1:] if path.is_absolute() else path.parts
    found, visited = [path.anchor], _Counter(pattern)
    for at, step in enumerate(steps):
        is_last = at == len(steps) - 1
        if step == RECURSIVE:
            found = list(_descendants(found, visited, with_files=is_last))
        elif has_wildcard(step):
            found = [
                _join(folder, entry.name)
                for folder in found
                for entry in _entries(folder, visited)
                if (is_last or entry.is_dir())
                and (step.startswith(".") or not entry.name.startswith("."))
                and matches_glob(entry.name, step)
            ]
        else:
            found = [each for folder in found if os.path.lexists(each := _join(folder, step))]
    return sorted(each for each in found if each)


class _Counter:
    """Counts what a glob has looked at."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.count = pattern, 0

    def add(self) -> None:
        self.count += 1
        if self.count > MAX_VISITED:
            raise usage_error(
                f"more than {MAX_VISITED:,} files and folders would have to be looked at",
                where=self.pattern,
                hint="Name a folder farther down.",
            )


def _join(folder: str, name: str) -> str:
    # Not by Path: a glob may look at a million of them.
    return f"{folder}{name}" if folder in ("", "/") else f"{folder}/{name}"


def _entries(folder: str, visited: _Counter) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder or ".") as entries:
            for entry in entries:
                visited.add()
                yield entry
    except OSError:
        return  # as in a shell: what is no folder, or may not be read, has no matches


def _descendants(folders: Sequence[str], visited: _Counter, *, with_files: bool) -> Iterator[str]:
    """Yield `folders` and all folders in them that are not hidden, those that are nearest first; each once."""
    known: set[tuple[int, int]] = set()
    level = list(folders)
    while level:
        below: list[str] = []
        for folder in sorted(level):
            try:
                status = Path(folder).stat()
            except OSError:
                continue
            if (status.st_dev, status.st_ino) in known:
                continue
            known.add((status.st_dev, status.st_ino))
            yield folder
            for entry in _entries(folder, visited):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    below.append(_join(folder, entry.name))
                elif with_files:
                    yield _join(folder, entry.name)
        level = below


class SuffixPatterns:
    """Patterns of which each matches the end of a module's name, whole components of it: the keys of PEFT's tables.

    PEFT takes the first key for which `re.match(rf"(.*\\.)?({key})$", name)` finds something. Most keys are plain
    names and are looked up; a dot in those is a dot. Others are regular expressions.

    Raises:
        SurgeryError: there are too many patterns, or one is too long, or beyond what `Expression` can read.
    """

    def __init__(self, patterns: Iterable[str], *, where: object) -> None:
        self._where = where
        self._plain: dict[str, int] = {}
        self._expressions: list[tuple[int, Expression]] = []
        counter = StepCounter(where)
        for at, pattern in enumerate(patterns):
            if at == MAX_PATTERNS:
                raise SurgeryError(f"has more than {MAX_PATTERNS:,} patterns", where=where)
            check_length(pattern, where=where)
            if _PLAIN.fullmatch(pattern):
                self._plain.setdefault(pattern, at)
            else:
                Expression(pattern, counter)  # by itself too: a key such as `a)|(b` would leave its group
                self._expressions.append((at, Expression(rf"(.*\.)?({pattern})", counter)))
                if len(self._expressions) > MAX_EXPRESSIONS:
                    raise SurgeryError(f"has more than {MAX_EXPRESSIONS:,} regular expressions", where=where)

    def first_match(self, name: str) -> int | None:
        """Return the index of the first pattern that matches the end of `name`; None where none does.

        Raises:
            SurgeryError: the expressions have taken too many steps, or the name is longer than `MAX_NAME`.
        """
        if len(name) > MAX_NAME:
            raise SurgeryError(f"the name {name[:40]!r}… has {len(name):,} characters", where=self._where)
        ends = [0, *(at + 1 for at, character in enumerate(name) if character == ".")]
        plain = [self._plain[name[at:]] for at in ends if name[at:] in self._plain]
        first = min(plain, default=None)
        for at, expression in self._expressions:
            if first is not None and at > first:
                break
            if expression.matches(name):
                return at
        return first
