"""Write large files past the page cache, by any number of workers, in any order, at any offset.

A checkpoint is written once and not read back: in the page cache its bytes would displace those of the sources. Direct
writes need whole, aligned blocks. Where data covers only part of a block, that part, an `Edge`, is returned to the
process that collects the results, and kept there until the neighbouring pieces complete the block; blocks that are
still incomplete at the end go through the page cache, when nothing else writes any more.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path

BLOCK = 4096  # bytes: what direct writes are aligned to, on disks of today
DIRECT_FROM = 64 << 20  # bytes; for smaller files the page cache is faster

# What `open` answers for O_DIRECT on file systems without it, as tmpfs on older kernels and some network disks.
_NOT_SUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


@dataclass(frozen=True)
class Edge:
    """A piece of data inside one block, at `position` bytes from the start of the file."""

    position: int
    data: bytes


class DirectFile:
    """A file of known size that is written past the page cache.

    A kill loses at most the blocks that were still incomplete. `write` may be called from any
    thread, and in a forked process; `complete` and `flush` are for one thread of one process, and `flush` is the last.
    Raises OSError as the system does.
    """

    def __init__(self, descriptor: int, buffered: int) -> None:
        """`descriptor` was opened with O_DIRECT, `buffered` without, both on the same file; the caller closes them."""
        self._descriptor = descriptor
        self._buffered = buffered
        self._edges: dict[int, dict[int, bytes]] = {}  # block → offset in it → data
        self._local = threading.local()

    def write(self, position: int, data: memoryview) -> list[Edge]:
        """Write the whole blocks of `data`, at `position` bytes from the file's start; return the rest."""
        head = min(-position % BLOCK, len(data))
        body = (len(data) - head) // BLOCK * BLOCK
        if body:
            self._aligned(position + head, data[head : head + body])
        ends = ((0, head), (head + body, len(data)))
        return [Edge(position + begin, bytes(data[begin:end])) for begin, end in ends if begin < end]

    def complete(self, edge: Edge) -> None:
        """Add an edge that `write` returned, and write its block once that is complete."""
        block, offset = divmod(edge.position, BLOCK)
        pieces = self._edges.setdefault(block, {})
        pieces[offset] = edge.data
        # Pieces never overlap, since tensors do not: their lengths alone tell when the block is whole.
        if sum(map(len, pieces.values())) == BLOCK:
            del self._edges[block]
            self._aligned(block * BLOCK, memoryview(b"".join(pieces[at] for at in sorted(pieces))))

    def flush(self) -> None:
        """Write the incomplete blocks, through the page cache."""
        for block, pieces in sorted(self._edges.items()):
            for offset, piece in pieces.items():
                view = memoryview(piece)
                while view:
                    count = os.pwrite(self._buffered, view, block * BLOCK + offset)
                    view, offset = view[count:], offset + count
        self._edges.clear()

    def _aligned(self, position: int, data: memoryview) -> None:
        """Write whole blocks from page-aligned memory, as O_DIRECT demands."""
        # A map begins at a page, which no bytes object or tensor promises: O_DIRECT would fail with EINVAL. One per
        # thread, and reused: a new map for every write would fault in its pages anew.
        pages: mmap.mmap | None = getattr(self._local, "pages", None)
        if pages is None or len(pages) < len(data):
            pages = self._local.pages = mmap.mmap(-1, len(data))
        pages[: len(data)] = data
        with memoryview(pages) as view:
            done = 0
            while done < len(data):
                done += os.pwrite(self._descriptor, view[done : len(data)], position + done)


def open_direct(path: Path) -> int | None:
    """Open the existing file `path` for direct writes; None where the system or the file system has none."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT | os.O_NOFOLLOW | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return None
        raise
