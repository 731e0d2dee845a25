"""Write files atomically and durably: each appears whole or not at all. `surgery.io.output_folder` does so for folders.

A file is written under a temporary name in its own folder, fsynced and renamed over its target. A kill leaves the
target as it was, and at worst a hidden file `.NAME.xxxxxxxx` beside it, which the next writing of the target removes.
The order fsync → rename matters: renamed first, a file could be empty after a power failure although it has its name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import SurgeryError
from surgery.io.redaction import redact
from surgery.io.safe_paths import kind_of

MANIFEST = "surgery.json"  # marks a folder as an output of this tool
JOURNAL = "journal.jsonl"  # marks a staging folder whose job can be resumed; see `surgery.engine.storage.journal`
PARTIAL = ".partial"  # suffix of a staging folder
TEMPORARY_END = "[0-9a-f]{8}"  # a regular expression: what is appended to the names of temporary files

# What to do about a failed write: errno → hint.
_HINTS: dict[int | None, str] = {
    errno.EACCES: "Give yourself the permission to write there, or choose another place.",
    errno.EPERM: "Give yourself the permission to write there, or choose another place.",
    errno.EROFS: "Choose another place, or mount it for writing and run the same command again.",
    errno.EIO: "The disk, or the connection to it, is failing: run the same command again, or choose another place.",
    errno.EFBIG: "A limit on the size of files is set (`ulimit -f`), or the file system has one: choose another place.",
    errno.EMFILE: "Allow more open files (`ulimit -n`), and run the same command again.",
    errno.ENFILE: "The system has too many open files: run the same command again later.",
}


def write_file(path: Path, content: bytes | str) -> Path:
    """Write `content` to `path` atomically, creating its folder; return `path`. Raises SurgeryError.

    content: text is written as UTF-8, without tokens of the Hub.
    """
    with atomic_replace(path) as temporary:
        temporary.write_bytes(redact(content).encode() if isinstance(content, str) else content)
    return path


@contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Yield a temporary file to write to; at the end of the block it replaces `path` and takes over its mode.

    After an error in the block `path` is unchanged and the temporary file is gone.

    Raises:
        SurgeryError: the file cannot be written.
    """
    temporary: Path | None = None
    descriptor: int | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_replaceable(path)
        remove_left_files(path)
        descriptor, temporary = _temporary_file(path)
        mode = os.fstat(descriptor).st_mode
        yield temporary
        # Again, since safetensors puts a file of its own in this one's place.
        temporary.chmod(stat.S_IMODE(path.stat().st_mode if path.exists() else mode))
        fsync_path(temporary)
        temporary.replace(path)
        # The new name is an entry of the folder, which a power failure loses unless the folder is on the disk too.
        fsync_path(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)


def _check_replaceable(path: Path) -> None:
    """Raise SurgeryError where `path` is something that a file must not take the place of, such as a device."""
    mode = path.lstat().st_mode if os.path.lexists(path) else stat.S_IFREG
    # A link itself is replaced, never what it leads to.
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        raise SurgeryError(f"is {kind_of(mode)}, expected a file", where=path, hint="Choose another name.")


def _temporary_file(path: Path) -> tuple[int, Path]:
    """Create a temporary file beside `path`; return its descriptor, which has its lock, and its path."""
    while True:
        # In the target's own folder: a rename is atomic only within one file system. Not by mkstemp, whose files only
        # their owner can read: the user's umask decides.
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        descriptor = os.open(temporary, flags, 0o666)
        _lock(descriptor)
        # Another process may have taken it for left over, before it was locked.
        if os.fstat(descriptor).st_nlink:
            return descriptor, temporary
        os.close(descriptor)


def remove_left_files(path: Path) -> None:
    """Remove the temporary files of `path` whose processes were killed: of those alive, the files are locked."""
    pattern = re.compile(re.escape(f".{path.name}.") + TEMPORARY_END)
    for left in path.parent.iterdir():
        if not pattern.fullmatch(left.name):
            continue
        try:
            descriptor = os.open(left, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # gone meanwhile, or none of ours
            continue
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode) and _lock(descriptor):
                left.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file without waiting; return whether it is locked now. The kernel drops the lock with its holder."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process has it, or the file system has no locks: then nothing is taken for left over
        return False
    return True


def partial_path(out: Path, suffix: str = PARTIAL) -> Path:
    """Return the path of the staging folder of `out`."""
    # Not by `with_name`, which fails where there is no name, as of `/`; `check_free` finds that out.
    return out.parent / f"{out.name}{suffix}"


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file under `folder`, by its path relative to it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def remove_path(path: Path) -> None:
    """Remove a file, a symbolic link (not what it points to) or a folder; do nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync_path(path: Path) -> None:
    """Block until the file or folder `path` is on the disk. Raises SurgeryError if it cannot be written."""
    # For reading only, as folders cannot be opened in any other way; fsync needs no more.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        os.close(descriptor)


def disk_error(error: Exception, path: Path) -> SurgeryError:
    """Return the SurgeryError for a failed write to `path`: for an OSError, or what a library made of one."""
    number = error.errno if isinstance(error, OSError) else _number_in(str(error))
    # A quota that is used up is the same to the user, and has the same remedy.
    if number in (errno.ENOSPC, errno.EDQUOT):
        return SurgeryError(
            "the disk is full",
            where=path,
            hint="Free some space and run the same command again: it goes on where it stopped.",
        )
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return SurgeryError(f"cannot be written ({reason})", where=path, hint=_HINTS.get(number))


def _number_in(text: str) -> int | None:
    """Return the number of a system's error that libraries written in Rust (safetensors, tokenizers) quote."""
    found = re.search(r"\(os error ([0-9]{1,4})\)", text)
    return None if found is None else int(found[1])
