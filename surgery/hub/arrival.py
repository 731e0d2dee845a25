"""Show how much of a download has arrived, by what lies in the cache: whatever the client's version and protocol."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.runtime.progress import Advance, terminal

_INTERVAL = 1.0  # seconds between two looks at the cache


@contextmanager
def show_arrival(name: str, total: int, folder: Path) -> Iterator[None]:
    """Show in the block how many of `total` bytes of `name` have come.

    Args:
        folder: the repository's in the cache, as huggingface_hub arranges it.
    """
    blobs = folder / "blobs"  # begun files too, under names of their own
    before = _size(blobs)
    with terminal(f"Downloading {name}", total) as advance:
        ended = threading.Event()
        watcher = threading.Thread(target=_watch, args=(blobs, before, total, advance, ended), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def _watch(blobs: Path, before: int, total: int, advance: Advance, ended: threading.Event) -> None:
    done = 0
    last = False
    while not last:
        last = ended.wait(_INTERVAL)
        # Never less than was told: a begun file may go where another process has finished it.
        now = max(done, min(_size(blobs) - before, total))
        advance(now - done)
        done = now


def _size(folder: Path) -> int:
    """Return the bytes of the files in `folder`; 0 where there is none."""
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                total += entry.stat(follow_symlinks=False).st_size
    except OSError:  # not made yet, or a file that was renamed between the two calls: the next look sees more
        pass
    return total
