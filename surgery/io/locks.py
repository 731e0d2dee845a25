"""Let one process at a time work in a folder: `exclusive_lock`, an advisory lock that the kernel drops with its holder.

The lock is `flock` on a lock file. It belongs to the open file, which forked children and those that get the descriptor
share: it is free when the last of them has ended, however they ended. The process id in the file is for messages alone.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import usage_error
from surgery.io.atomic import disk_error
from surgery.io.safe_paths import kind_of

_PAUSE = 0.05  # seconds between two attempts
_WAIT = "Wait until it is done, or stop it."


@contextmanager
def exclusive_lock(
    path: Path,
    *,
    where: object,
    busy: str,
    hint: str = _WAIT,
    patience: float = 0.0,
    remove: bool = False,
) -> Iterator[int]:
    """Hold the lock of the file `path` in the block, created with its folder if need be; yield its file descriptor.

    Args:
        where: what the lock protects, for the error.
        busy: the error's text where another process holds the lock, e.g. "another run is at work here".
        patience: seconds to wait for a holder that has ended while children of it are about to; `math.inf` waits for
            every holder, however long it takes.
        remove: remove the file at the end. Not where children may hold the lock for longer than this process: whoever
            comes next would lock a new file.

    Raises:
        SurgeryError: another process holds the lock; the file cannot be written, or is no regular file.
    """
    descriptor = _acquire(path, where, busy, hint, patience)
    try:
        try:
            # Cut off only now: before, the file names the holder.
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        except OSError as error:
            raise disk_error(error, path) from error
        yield descriptor
    finally:
        # While the lock is held, so that nobody else can have locked what is removed: `_open` looks whether the file
        # that it locked still has its name.
        if remove:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, where: object, busy: str, hint: str, patience: float) -> int:
    end = time.monotonic() + patience
    while True:
        descriptor = _open(path)
        taken = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Not so where an earlier holder has removed the file in between.
            taken = _has_name(descriptor, path)
            if taken:
                return descriptor
        except BlockingIOError as error:
            holder = os.pread(descriptor, 20, 0).decode("ascii", errors="replace").strip()
            # A holder that lives will not end soon; the children of one that was killed are about to.
            if time.monotonic() >= end or (_is_alive(holder) and patience < math.inf):
                who = f" (process {holder})" if holder.isdigit() else ""
                raise usage_error(f"{busy}{who}", where=where, hint=hint) from error
            time.sleep(_PAUSE)
        except OSError as error:  # a file system without locks
            raise disk_error(error, path) from error
        finally:
            if not taken:
                os.close(descriptor)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A link is not followed: what it leads to would be overwritten. Opened without waiting, as for a pipe.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise usage_error("is a link, expected a lock file", where=path, hint="Remove it.") from error
        raise disk_error(error, path) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise usage_error(f"is {kind_of(mode)}, expected a lock file", where=path, hint="Remove it.")
    return descriptor


def _has_name(descriptor: int, path: Path) -> bool:
    """Return whether the open file is still the one that is called `path`."""
    try:
        named, opened = os.lstat(path), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
