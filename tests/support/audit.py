"""Watch which files this process opens and changes, to prove that nothing is read or written outside given folders.

Built on Python's audit events, which every thread raises for every `open`, `rename` and the like. Native libraries that
open files by themselves (safetensors' `safe_open`, tokenizers' `from_file`) raise none.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events by the positions of the paths that they change. "open" is apart: its flags decide.
_CHANGES = {
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.link": (1,),
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rename": (0, 1),
    "os.rmdir": (0,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.utime": (0,),
}
# Where these events have the descriptor of the folder that their path is relative to; -1 where there is none.
_FOLDERS = {"os.mkdir": 2, "os.remove": 1, "os.rmdir": 1}
# What Python and its libraries read whatever they are asked to do.
ALWAYS_READ = (
    sys.prefix,
    sys.base_prefix,
    str(Path(__file__).resolve().parents[2]),  # this project's own sources
    "/proc",
    "/sys",
    "/dev/null",
    "/dev/urandom",
    "/usr/lib",
    "/usr/share",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/nsswitch.conf",
)
_ALWAYS_WRITTEN = ("/dev/null",)


@dataclass
class WatchedFiles:
    """What happened while `watch_files` was on: real paths, links followed.

    read: files that were opened for reading alone.
    written: files that were opened for writing, and names that were made, renamed, changed or removed.
    """

    read: set[Path] = field(default_factory=set)
    written: set[Path] = field(default_factory=set)

    def check(self, *, reads: Iterable[Path] = (), writes: Iterable[Path] = ()) -> None:
        """Raise AssertionError where a file outside of `writes` was written, or one outside of both was read.

        Python, its libraries, this project's own sources and a few files of the system may always be read.
        """
        allowed = [os.path.realpath(path) for path in writes]
        outside = sorted(str(path) for path in self.written if not is_inside(path, (*allowed, *_ALWAYS_WRITTEN)))
        assert not outside, f"written outside of {allowed}: {outside}"
        allowed += [os.path.realpath(path) for path in reads]
        outside = sorted(str(path) for path in self.read if not is_inside(path, (*allowed, *ALWAYS_READ)))
        assert not outside, f"read outside of {allowed}: {outside}"


_active: list[WatchedFiles] = []  # hooks cannot be removed: one is installed, and does nothing while this is empty
_installed: list[bool] = []


@contextmanager
def watch_files() -> Iterator[WatchedFiles]:
    """Record which files are opened and changed in the block, by any thread of this process."""
    if not _installed:
        _installed.append(True)
        sys.addaudithook(_record)
    watched = WatchedFiles()
    _active.append(watched)
    try:
        yield watched
    finally:
        _active.remove(watched)


def tree(folder: Path) -> dict[str, bytes | str]:
    """Return everything under `folder`, to be compared: path → content, `-> TARGET` of a link, or `/` of a folder."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_dir():
            found[name] = "/"
        else:
            found[name] = path.read_bytes() if path.is_file() else "special"
    return found


def _record(event: str, args: tuple[Any, ...]) -> None:
    if not _active:
        return
    if event == "open":
        path, mode, flags = args
        writes = bool((flags or 0) & _WRITING) or (isinstance(mode, str) and bool(set(mode) & set("wax+")))
        _note(path, writes=writes, follow=True)
    elif event in _CHANGES:
        folder = args[_FOLDERS[event]] if event in _FOLDERS else -1
        for position in _CHANGES[event]:
            # `shutil.rmtree` opens a folder and removes by names in it.
            path = args[position] if folder in (-1, None) else f"/proc/self/fd/{folder}/{os.fsdecode(args[position])}"
            _note(path, writes=True, follow=event in ("os.chmod", "os.truncate", "os.utime"))


def _note(path: Any, *, writes: bool, follow: bool) -> None:
    if isinstance(path, int):  # a descriptor, which was opened by a path before
        return
    # An exception here would end the program that is watched: paths that cannot exist are not opened either.
    try:
        given = Path.cwd() / os.fsdecode(path)
        # Renaming or removing a link changes the folder that it is in, not what it leads to.
        real = Path(os.path.realpath(given)) if follow else Path(os.path.realpath(given.parent), given.name)
    except (ValueError, TypeError, OSError):
        return
    for watched in _active:
        (watched.written if writes else watched.read).add(real)


def is_inside(path: Path, folders: Iterable[str | Path]) -> bool:
    """Return whether `path` is one of `folders`, or below one; links are not followed."""
    return any(path == Path(folder) or Path(folder) in path.parents for folder in folders)
