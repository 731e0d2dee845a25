"""Count what a process writes, and let the k-th call fail, be cut short or kill the process.

The layer lies under Python: `os` and `open` are replaced, so that everything that is written from Python passes it.
What libraries write by themselves does not. Only files under the watched folder count.
"""

from __future__ import annotations

import builtins
import errno
import io
import mmap
import os
import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Fault = Literal["kill", "short", "ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES"]
ERRORS: tuple[Fault, ...] = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES")

# Calls on a descriptor, with the position of that argument; those of paths are all others.
_ON_DESCRIPTORS = {
    "write": 0,
    "pwrite": 0,
    "fsync": 0,
    "ftruncate": 0,
    "posix_fallocate": 0,
    "copy_file_range": 1,
    "sendfile": 0,
    "truncate": 0,
}
_ON_PATHS = ("rename", "replace", "mkdir", "unlink", "remove", "rmdir", "link", "symlink", "chmod")
# What an operating system reports of each kind of call: a full disk does not keep anybody from deleting.
_NO_SPACE = frozenset({"write", "pwrite", "fsync", "posix_fallocate", "copy_file_range", "sendfile", "mkdir", "open"})


class Counter:
    """A number that forked processes share. It must be made before they are."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    @property
    def value(self) -> int:
        """The count so far."""
        return int(struct.unpack("q", self._memory[:8])[0])

    @value.setter
    def value(self, count: int) -> None:
        self._memory[:8] = struct.pack("q", count)


@dataclass
class Injector:
    """Replaces the calls of this process, from `install` on, for good: for forked processes.

    Attributes:
        folder: only what lies under it counts.
        counter: of the calls; shared with the process that watches.
        at: the call that goes wrong, from 1; 0 for none. Every later one of its kind fails too where the disk is full.
        fault: how it goes wrong.
        hits: how many calls went wrong.
        writes: count only those calls that a full disk lets fail.
    """

    folder: Path
    counter: Counter
    at: int = 0
    fault: Fault = "kill"
    hits: Counter | None = None
    writes: bool = False

    def install(self) -> None:
        """Replace the functions of `os`, and `open`."""
        for name, position in _ON_DESCRIPTORS.items():
            if hasattr(os, name):
                setattr(os, name, self._wrapped(name, getattr(os, name), position))
        for name in _ON_PATHS:
            setattr(os, name, self._wrapped(name, getattr(os, name), 0))
        os.open = self._wrapped_os_open(os.open)
        builtins.open = io.open = self._wrapped_open(io.open)  # type: ignore[assignment]

    def passes(self, name: str, what: Any) -> bool:
        """Count a call; return False where it is to be cut short. Raises OSError, or kills, where that is planned."""
        if not self._is_watched(what) or (self.writes and name not in _NO_SPACE):
            return True
        self.counter.value += 1
        count = self.counter.value
        full = self.fault in ("ENOSPC", "EDQUOT") and name in _NO_SPACE
        if not self.at or count < self.at or (count > self.at and not full):
            return True
        if self.fault in ("ENOSPC", "EDQUOT") and not full:
            return True
        if self.hits is not None:
            self.hits.value += 1
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "short":
            return name not in ("write", "pwrite")
        number = getattr(errno, self.fault)
        raise OSError(number, os.strerror(number), os.fspath(what) if not isinstance(what, int) else None)

    def _is_watched(self, what: Any) -> bool:
        try:
            path = str(Path(f"/proc/self/fd/{what}").readlink() if isinstance(what, int) else Path(what).absolute())
        except OSError:
            return False
        return path.startswith(str(self.folder))

    def _wrapped(self, name: str, call: Callable[..., Any], position: int) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            # With a folder's descriptor the path is relative to it, as in `shutil.rmtree`.
            what = kwargs.get("dir_fd", args[position]) if kwargs.get("dir_fd") is not None else args[position]
            if not self.passes(name, what) and len(args[1]) > 1:
                return call(args[0], memoryview(args[1])[: len(args[1]) // 2], *args[2:])
            return call(*args, **kwargs)

        return wrapped

    def _wrapped_os_open(self, call: Callable[..., int]) -> Callable[..., int]:
        def wrapped(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & os.O_CREAT:
                self.passes("open", path if kwargs.get("dir_fd") is None else kwargs["dir_fd"])
            return call(path, flags, *args, **kwargs)

        return wrapped

    def _wrapped_open(self, call: Callable[..., Any]) -> Callable[..., Any]:
        injector = self

        class Raw(io.FileIO):
            """A file whose every write passes the injector."""

            def write(self, data: Any) -> int:
                view = memoryview(data).cast("B")
                if not injector.passes("write", self.fileno()) and len(view) > 1:
                    view = view[: len(view) // 2]
                return super().write(view)

            def truncate(self, size: int | None = None) -> int:
                injector.passes("ftruncate", self.fileno())
                return super().truncate(size)

        def wrapped(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            if not set(mode) & set("wax+") or not injector._is_watched(file):
                return call(file, mode, buffering, encoding, errors, newline, closefd, opener)
            if not isinstance(file, int):
                injector.passes("open", file)
            raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            if buffering == 0:
                return raw
            buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
            if "b" in mode:
                return buffered
            return io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline, line_buffering=buffering == 1)

        return wrapped
