"""Turn names that come from files into paths, and keep those paths inside their folder.

A checkpoint, an ensemble, a manifest, a recipe or a listing of the Hub may be a stranger's. A name in it becomes a path
only by way of this module, so that nothing outside of the folder in question is ever read or written for it:

- `safe_name` and `safe_relative_path` check a name by itself;
- `unique_names` finds two names that would be one file;
- `contained_file` finds a file to read, and where links to it end;
- `output_path` finds the place of a file to write.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from surgery.errors import SurgeryError

MAX_NAME_BYTES = 255  # of one component of a path: the limit of ext4, XFS, APFS and NTFS
MAX_PATH_BYTES = 1024  # of a whole relative path: with the folder before it, it stays below Linux's limit of 4,096
_SHOWN = 80  # characters of a bad name that a message repeats
_HUB_SNAPSHOTS, _HUB_BLOBS = "snapshots", "blobs"  # folders of the Hub's cache: files of the first link to the second


def safe_name(text: object, *, where: object, what: str = "name") -> str:
    """Return `text` if it can be the name of one file or folder: one component, visible, printable, not too long.

    Args:
        where: the file that says it, for the error.
        what: what it names, e.g. "member".

    Raises:
        SurgeryError: it is no text, empty, `.` or `..`, begins with a dot, holds a separator, a control character or
            one that changes the direction of writing, or is too long.
    """
    if (reason := _why_unsafe(text)) is None:
        assert isinstance(text, str)
        return text
    raise _refusal(f"the {what} {_quoted(text)} {reason}", where)


def safe_relative_path(text: object, *, where: object, what: str = "file") -> str:
    """Return `text` if it is a relative path, with `/` between components that are each a `safe_name`.

    Raises:
        SurgeryError: as `safe_name`.
    """
    if not isinstance(text, str) or not text:
        raise _refusal(f"the {what} {_quoted(text)} is no path", where)
    for part in text.split("/"):
        if reason := _why_unsafe(part):
            raise _refusal(f"the {what} {_quoted(text)} {reason}", where)
    if len(os.fsencode(text)) > MAX_PATH_BYTES:
        raise _refusal(f"the {what} {_quoted(text)} is longer than {MAX_PATH_BYTES:,} bytes", where)
    return text


def unique_names(names: Iterable[str], *, where: object, what: str = "name") -> list[str]:
    """Return `names` as a list if each would be a file or folder of its own on every file system.

    Raises:
        SurgeryError: two are the same, or differ only in case or in how accents are encoded.
    """
    seen: dict[str, str] = {}
    for name in names:
        # As file systems that ignore case and normalise accents (macOS, Windows) see it.
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        if key in seen:
            both = _quoted(name) if seen[key] == name else f"{_quoted(seen[key])} and {_quoted(name)}"
            raise _refusal(f"the {what} {both} is there twice, so that one would replace the other", where)
        seen[key] = name
    return list(seen.values())


def contained_file(folder: Path, name: str, *, where: object | None = None) -> Path:
    """Return the path of the regular file `name` of `folder`, which may be a link as long as it stays inside.

    Links may end in `folder`, or among the blobs of the Hub's cache where `folder` is a snapshot in it.

    Args:
        name: its relative path, as a file of the folder says it.
        where: the file that says it, for errors; by default the file itself.

    Raises:
        SurgeryError: the name is unsafe; there is no such file; it is no regular file; a link leads elsewhere.
    """
    path = folder / safe_relative_path(name, where=folder if where is None else where)
    check_contained(folder, path)
    return path


def check_contained(folder: Path, path: Path) -> None:
    """Raise SurgeryError where `path`, in `folder`, is no regular file or a link that leads out of `folder`."""
    try:
        real = path.resolve(strict=True)
        status = real.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        reason = getattr(error, "strerror", None) or "links in a circle"
        raise SurgeryError(f"cannot be read ({reason})", where=path) from error
    if not stat.S_ISREG(status.st_mode):
        raise SurgeryError(
            f"is {kind_of(status.st_mode)}, expected a file", where=path, hint="Put the file itself in its place."
        )
    roots = _allowed_roots(folder)
    if not any(real.is_relative_to(root) for root in roots):
        raise SurgeryError(
            f"is a link that leads out of its folder, to {real}",
            where=path,
            hint="Such links are never followed: put the file itself in its place, or remove the link.",
        )


def output_path(folder: Path, name: str) -> Path:
    """Return the path of the file `name` to write in `folder`; no folder on the way to it may be a link.

    The last check before a byte is written: whatever a caller asks for, nothing leaves `folder`.

    Raises:
        SurgeryError: the name is unsafe, or leads through a link.
    """
    path = folder / safe_relative_path(name, where=folder, what="output file")
    for parent in path.relative_to(folder).parents:
        if parent.name and (folder / parent).is_symlink():
            raise _refusal(f"the output file {_quoted(name)} leads through the link {parent}", folder)
    return path


def kind_of(mode: int) -> str:
    """Return what a file of `st_mode` `mode` is, in words."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFLNK: "a link",
    }
    return kinds.get(stat.S_IFMT(mode), "no regular file")


def _why_unsafe(text: object) -> str | None:
    """Return why `text` cannot be one component of a path, or None."""
    if not isinstance(text, str) or not text:
        return "is no name"
    if text in (".", "..") or "/" in text or "\\" in text:
        return "leads to another folder"
    # Hidden files steer other programs: .git/config and .bashrc run commands.
    if text.startswith("."):
        return "is hidden"
    # Control characters, marks that turn the direction of writing, and halves of surrogate pairs are not printable.
    if not text.isprintable():
        return "holds characters that are not printable"
    if len(os.fsencode(text)) > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_BYTES} bytes"
    return None


def _allowed_roots(folder: Path) -> list[Path]:
    root = folder.resolve()
    # A snapshot, or a folder inside of one: …/models--org--name/{blobs,snapshots/COMMIT/…}.
    snapshots = [parent for parent in (root, *root.parents) if parent.parent.name == _HUB_SNAPSHOTS]
    return [root, *(snapshot.parent.parent / _HUB_BLOBS for snapshot in snapshots)]


def _quoted(text: object) -> str:
    shown = ascii(text) if isinstance(text, str) and not text.isprintable() else repr(text)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"


def _refusal(what: str, where: object) -> SurgeryError:
    return SurgeryError(what, where=where, hint="Such a name is never followed: get the files from their author again.")
