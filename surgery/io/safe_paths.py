"""Turn names that come from files into paths, and keep those paths inside their folder.

A checkpoint, an ensemble, a manifest, a recipe or a listing of the Hub may be a stranger's. A name in it becomes a path
only by way of this module, so that nothing outside of the folder in question is ever read or written for it:

- `safe_name` and `safe_relative_path` check a name by itself;
- `unique_names` and `unique_paths` find two names that would be one file;
- `contained_file`, `find_file` and `find_files` find files to read, and where links to them end;
- `output_path` finds the place of a file to write.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from surgery.errors import SurgeryError

MAX_NAME_BYTES = 255  # of one component of a path: the limit of ext4, XFS, APFS and NTFS
MAX_PATH_BYTES = 1024  # of a whole relative path: with the folder before it, it stays below Linux's limit of 4,096
MAX_FILES = 5_000  # of one kind in a folder; the largest models have about 1,000
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
        key = folded(name)
        if key in seen:
            both = _quoted(name) if seen[key] == name else f"{_quoted(seen[key])} and {_quoted(name)}"
            raise _refusal(f"the {what} {both} is there twice, so that one would replace the other", where)
        seen[key] = name
    return list(seen.values())


def unique_paths(paths: Iterable[str], *, where: object, what: str = "file") -> list[str]:
    """Return the relative `paths` as a list if each would be a file of its own, and none the folder of another.

    Raises:
        SurgeryError: as `safe_relative_path` and `unique_names`; or one is a folder on the way to another.
    """
    names = unique_names((safe_relative_path(path, where=where, what=what) for path in paths), where=where, what=what)
    keys = {folded(name) for name in names}
    for name in names:
        for parent in PurePosixPath(folded(name)).parents:
            if str(parent) in keys:
                raise _refusal(f"the {what} {_quoted(name)} lies in a folder of another {what}'s name", where)
    return names


def folded(name: str) -> str:
    """Return what two names have in common that are one file where case and accents do not count (macOS, Windows)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


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


def find_file(folder: Path, name: str, *, where: object | None = None) -> Path | None:
    """Return the path of the regular file `name` of `folder` as `contained_file`; None where nothing has that name.

    Not by `Path.is_file`, which is false for a pipe, a folder and a broken link: those are errors, and not missing.

    Raises:
        SurgeryError: as `contained_file`, except that it may be missing.
    """
    path = folder / safe_relative_path(name, where=folder if where is None else where)
    if not path.exists() and not path.is_symlink():
        return None
    check_contained(folder, path)
    return path


def find_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files of `folder`, or of a folder in it, that match `pattern`, sorted; hidden ones do not count.

    Args:
        pattern: of the files' names, as in a shell; what is before its last `/` is the name of a folder in `folder`.

    Raises:
        SurgeryError: one is no regular file, or a link that leads out of `folder`; the folder cannot be read.
    """
    parent, _, name = pattern.rpartition("/")
    inside = folder / parent
    paths = [path for path in list_folder(inside) if fnmatchcase(path.name, name)] if inside.is_dir() else []
    if len(paths) > MAX_FILES:
        raise SurgeryError(
            f"holds {len(paths):,} files {pattern}, more than the {MAX_FILES:,} that it may", where=folder
        )
    for path in paths:
        check_contained(folder, path)
    return paths


def list_folder(folder: Path) -> list[Path]:
    """Return what is in `folder`, sorted, without what is hidden. Raises SurgeryError where it cannot be read."""
    try:
        # By names, which are compared much faster than paths.
        paths = sorted(folder.iterdir(), key=lambda path: path.name)
        return [path for path in paths if not path.name.startswith(".")]
    except OSError as error:
        raise SurgeryError(f"cannot be read ({error.strerror})", where=folder) from error


def contained_folder(folder: Path, name: str) -> Path:
    """Return the path of the folder `name` in `folder`. Raises SurgeryError where a link leads out, or it is a file."""
    path = folder / safe_relative_path(name, where=folder)
    _check(folder, path, stat.S_IFDIR)
    return path


def check_contained(folder: Path, path: Path) -> None:
    """Raise SurgeryError where `path`, in `folder`, is no regular file or a link that leads out of `folder`."""
    _check(folder, path, stat.S_IFREG)


def _check(folder: Path, path: Path, kind: int) -> None:
    try:
        # As a rule: no link, and right in the folder. Resolving takes ten times as long, and there may be thousands.
        if path.parent == folder and stat.S_IFMT(path.lstat().st_mode) == kind:
            return
        real = path.resolve(strict=True)
        status = real.stat()
    except ValueError as error:  # a zero byte in its name
        raise SurgeryError("cannot be read (no file has such a name)", where=path) from error
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        reason = getattr(error, "strerror", None) or "links in a circle"
        raise SurgeryError(f"cannot be read ({reason})", where=path) from error
    if stat.S_IFMT(status.st_mode) != kind:
        wanted = "a file" if kind == stat.S_IFREG else "a folder"
        raise SurgeryError(
            f"is {kind_of(status.st_mode)}, expected {wanted}",
            where=path,
            hint=f"Put {wanted.replace('a ', 'the ')} itself in its place, or remove it.",
        )
    roots = _allowed_roots(folder)
    if not any(real.is_relative_to(root) for root in roots):
        raise SurgeryError(
            f"is a link that leads out of its folder, to {real}",
            where=path,
            hint="Such links are never followed: put the file itself in its place, or remove the link.",
        )


def output_path(folder: Path, name: str) -> Path:
    """Return the path of the file `name` to write in `folder`; neither it nor a folder on the way to it may be a link.

    The last check before a byte is written: whatever a caller asks for, nothing leaves `folder`.

    Raises:
        SurgeryError: the name is unsafe, is a link, or leads through one.
    """
    path = folder / safe_relative_path(name, where=folder, what="output file")
    for parent in path.relative_to(folder).parents:
        if parent.name and (folder / parent).is_symlink():
            raise _refusal(f"the output file {_quoted(name)} leads through the link {parent}", folder)
    # Written through, it would change the file that it leads to.
    if path.is_symlink():
        raise _refusal(f"the output file {_quoted(name)} is a link", folder)
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
        stat.S_IFREG: "a file",
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
    repositories = [parent.parent.parent for parent in (root, *root.parents) if parent.parent.name == _HUB_SNAPSHOTS]
    # Blobs of one repository, which may be links to those that all repositories of the cache share.
    return [root, *(folder / _HUB_BLOBS for repo in repositories for folder in (repo, repo.parent))]


def _quoted(text: object) -> str:
    shown = ascii(text) if isinstance(text, str) and not text.isprintable() else repr(text)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"


def _refusal(what: str, where: object) -> SurgeryError:
    return SurgeryError(what, where=where, hint="Such a name is never followed: get the files from their author again.")
