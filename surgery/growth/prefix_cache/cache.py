"""The prefix cache: what enters a layer, for every window of a corpus, in one file that is mapped into memory.

In go hidden states with the numbers of their windows and the depth they stand at; out come the same ones, or nothing.
A window has one place, in which a deeper state replaces the one before. The folder holds

    states.bin   (windows, sequence, width) in fp32 or bf16, its room taken on the disk from the start
    windows.bin  for each window the depth of its state (−1: none) and the xxh3-64 of its bytes, as two 8-byte numbers
    cache.json   the sizes, what the windows are of, and the hash of the prefix that made the states of each depth

A hash is seeded with that of the prefix. So a state that was torn by a kill or a power loss, or made by another model,
is never believed: it counts as missing.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from xxhash import xxh3_64_intdigest

from surgery.errors import SurgeryError, usage_error
from surgery.io.atomic import disk_error, write_file
from surgery.io.hashing import hash_text
from surgery.reporting.report import format_value
from surgery.runtime.collectives import map_over_ranks, n_active_processes, on_main

STATES, WINDOWS, ABOUT = "states.bin", "windows.bin", "cache.json"
SCHEMA = 1
NOTHING = -1
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

_RECORD = np.dtype([("depth", "<i8"), ("hash", "<u8")])
# What file systems say that cannot reserve room.
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def cache_bytes(windows: int, sequence: int, width: int, dtype: torch.dtype) -> int:
    """The bytes that a cache takes on the disk."""
    return windows * (sequence * width * dtype.itemsize + _RECORD.itemsize)


def recorded(
    folder: Path, *, windows: int, sequence: int, width: int, dtype: torch.dtype, tokens: str
) -> dict[int, str] | None:
    """Depth → hash of the prefix whose states stand there, in the cache that lies in `folder`; nothing is changed.

    None where there is no cache, or one of other sizes or windows. The arguments are those of `PrefixCache`.
    """
    return _recorded(folder, _about(windows, sequence, width, dtype, tokens))


class PrefixCache:
    """The cache in `folder`; empty where that held none, or one of other sizes or other windows.

    With several processes all open it, on one disk; `begin` too is called by all.

    Args:
        windows: how many there is room for, numbered from 0.
        sequence, width: of a window's state: (sequence, width).
        dtype: float32 or bfloat16; states are rounded to it.
        tokens: tells apart what the windows are cut from.
        alone: no other process opens this folder.

    Raises:
        SurgeryError: a size or the dtype is none; the disk has no room for the whole cache, or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        windows: int,
        sequence: int,
        width: int,
        dtype: torch.dtype,
        tokens: str,
        alone: bool = False,
    ) -> None:
        if min(windows, sequence, width) < 1 or dtype not in DTYPES:
            raise usage_error(
                f"got {windows} windows of {sequence} × {width} in {dtype}, expected at least one of each in float32 "
                "or bfloat16",
                where=folder,
            )
        self.folder, self.windows, self.sequence, self.width, self.dtype = folder, windows, sequence, width, dtype
        self.damaged = 0
        self.prefixes: dict[int, str] = {}
        self._alone = alone
        self._about = _about(windows, sequence, width, dtype, tokens)
        try:
            self._once(self._prepare)
            self._each(self._open)
        except OSError as error:
            raise disk_error(error, folder) from error

    @property
    def bytes_per_window(self) -> int:
        """The bytes of one window's state."""
        return self.sequence * self.width * self.dtype.itemsize

    def begin(self, depth: int, prefixes: Mapping[int, str]) -> None:
        """To be called before states at `depth` are read or written.

        Args:
            prefixes: depth → a hash of all that decides the states there: for `depth`, and for those of the depths in
                `self.prefixes` whose states may be built upon. Where it is another than it was, or missing, states
                at that depth are forgotten.

        Raises:
            SurgeryError: the disk cannot be written.
        """
        kept = {at: made for at, made in self.prefixes.items() if prefixes.get(at) == made}
        begun = kept | {depth: prefixes[depth]}

        def forget_and_record() -> None:
            self._depths[~np.isin(self._depths, list(kept))] = NOTHING
            self._windows_map.flush()
            self._record(begun)

        try:
            self._once(forget_and_record)
        except OSError as error:
            raise disk_error(error, self.folder) from error
        self.prefixes = begun
        self._seeds = _seeds(self.prefixes)

    def depths(self, numbers: Sequence[int]) -> list[int]:
        """The depth at which the state of each of these windows stands; −1 where there is none."""
        self._check(numbers)
        return [int(self._depths[number]) for number in numbers]

    def read(self, numbers: Sequence[int], depth: int) -> Tensor | None:
        """The states of these windows: (B, sequence, width) fp32 on the CPU, a copy.

        None unless all of them stand at exactly that depth and are whole; those that are not whole are forgotten. May
        run in another thread, though not while the same windows are written.
        """
        if any(stands != depth for stands in self.depths(numbers)):
            return None
        # Torch's memory begins at a multiple of 64 bytes: products of matrices round as they did without the cache.
        rows = torch.empty(len(numbers), self.sequence, self.width)
        # NumPy copies in this thread alone and without Python's lock, so that training goes on meanwhile.
        copies, whole = rows.numpy(), True
        self._expect(numbers)
        for copy, number in zip(copies, numbers, strict=True):
            stored = self._states[number]
            if self.dtype == torch.float32:
                np.copyto(copy, stored)
            else:
                np.left_shift(stored, 16, out=copy.view(np.uint32), dtype=np.uint32)
            if self._hash(stored, depth) != int(self._hashes[number]):
                self._depths[number] = NOTHING
                self.damaged += 1
                whole = False
        return rows if whole else None

    def write(self, numbers: Sequence[int], depth: int, hidden: Tensor) -> Tensor:
        """Keeps the states of these windows, each named once, and returns them as they will be read: rounded.

        Args:
            hidden: (B, sequence, width), on any device and of any float dtype; what is returned is like it.

        Raises:
            SurgeryError: the disk cannot be written. Some file systems find only now that they are full; the windows
                that were not written then stand nowhere.
        """
        self._check(numbers)
        if tuple(hidden.shape) != (len(numbers), self.sequence, self.width):
            raise usage_error(
                f"got states of shape {tuple(hidden.shape)}, expected {(len(numbers), self.sequence, self.width)}",
                where=self.folder,
            )
        rounded = hidden.detach().to(self.dtype)
        bits = rounded.cpu().contiguous()
        rows = (bits if self.dtype == torch.float32 else bits.view(torch.uint16)).numpy()
        # In this order: whenever the process is killed, no window says that it stands where it does not.
        self._depths[list(numbers)] = NOTHING
        for row, number in zip(rows, numbers, strict=True):
            try:
                self._put(row, number)
            except OSError as error:
                raise disk_error(error, self.folder) from error
            self._hashes[number] = self._hash(row, depth)
            self._depths[number] = depth
        return rounded.to(hidden.dtype)

    def rounded(self, hidden: Tensor) -> Tensor:
        """`hidden` as it would be read after it was written."""
        return hidden.to(self.dtype).to(hidden.dtype)

    def flush(self) -> None:
        """Returns once all states are on the disk. Raises SurgeryError where it cannot be written."""
        try:
            self._states_map.flush()
            self._windows_map.flush()
        except OSError as error:
            raise disk_error(error, self.folder) from error

    def close(self) -> None:
        """Ends the use of this object; what was written stays."""
        # The maps cannot be closed while arrays look into them.
        del self._states, self._depths, self._hashes
        self._states_map.close()
        self._windows_map.close()
        self._release()

    def remove(self) -> None:
        """Closes the cache and deletes its folder; for one process, once the others have closed it."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _once(self, work: Callable[[], None]) -> None:
        """`work` in one process, the others waiting for it."""
        if self._alone:
            work()
        else:
            on_main(work)

    def _each(self, work: Callable[[], None]) -> None:
        """`work` in every process; none goes on where it fails in one."""
        if self._alone:
            work()
        else:
            map_over_ranks(range(n_active_processes()), lambda _: work())

    def _open(self) -> None:
        self.prefixes = _recorded(self.folder, self._about) or {}
        self._seeds = _seeds(self.prefixes)
        self._states_file = os.open(self.folder / STATES, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        self._release = weakref.finalize(self, os.close, self._states_file)
        self._states_map: mmap.mmap = _mapped(self.folder / STATES)
        self._windows_map: mmap.mmap = _mapped(self.folder / WINDOWS)
        kind = np.float32 if self.dtype == torch.float32 else np.uint16
        shape = self.windows, self.sequence, self.width
        self._states: NDArray[Any] = np.frombuffer(self._states_map, kind).reshape(shape)
        records = np.frombuffer(self._windows_map, _RECORD)
        self._depths: NDArray[np.int64] = records["depth"]
        self._hashes: NDArray[np.uint64] = records["hash"]

    def _put(self, row: NDArray[Any], number: int) -> None:
        # Not through the map: where the disk has no room in spite of all, a file says so, and a map kills the process.
        octets, at = memoryview(row).cast("B"), number * self.bytes_per_window  # type: ignore[arg-type]  # see octets
        while octets:
            done = os.pwrite(self._states_file, octets, at)
            octets, at = octets[done:], at + done

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        states, windows = self.folder / STATES, self.folder / WINDOWS
        size = self.windows * self.bytes_per_window
        known = _recorded(self.folder, self._about) is not None and _size(windows) == self.windows * _RECORD.itemsize
        if not known:
            for path in (self.folder / ABOUT, windows, states):
                path.unlink(missing_ok=True)
        # Where a known file had lost its end, the states that lay there no longer match their hashes.
        _reserve(states, size)
        if not known:
            records = np.zeros(self.windows, _RECORD)
            records["depth"] = NOTHING
            write_file(windows, records.tobytes())
            self._record({})

    def _record(self, prefixes: Mapping[int, str]) -> None:
        write_file(self.folder / ABOUT, json.dumps(self._about | {"prefixes": prefixes}, indent=2))

    def _expect(self, numbers: Sequence[int]) -> None:
        """Lets the system fetch the windows together, not page by page as they are touched."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        for number in numbers:
            begin = number * self.bytes_per_window
            page = begin - begin % mmap.PAGESIZE
            self._states_map.madvise(mmap.MADV_WILLNEED, page, begin + self.bytes_per_window - page)

    def _hash(self, row: NDArray[Any], depth: int) -> int:
        return xxh3_64_intdigest(memoryview(row), seed=self._seeds[depth])  # type: ignore[arg-type]  # see octets

    def _check(self, numbers: Sequence[int]) -> None:
        wrong = [number for number in numbers if not 0 <= number < self.windows]
        if wrong:
            raise usage_error(f"has no window {wrong[0]}, only 0 to {self.windows - 1}", where=self.folder)


def _about(windows: int, sequence: int, width: int, dtype: torch.dtype, tokens: str) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "windows": windows,
        "sequence": sequence,
        "width": width,
        "dtype": DTYPES[dtype],
        "tokens": tokens,
    }


def _recorded(folder: Path, about: Mapping[str, Any]) -> dict[int, str] | None:
    try:
        found = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        prefixes = {int(depth): str(made) for depth, made in found.pop("prefixes").items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return prefixes if found == about else None


def _seeds(prefixes: Mapping[int, str]) -> dict[int, int]:
    return {depth: int(hash_text(f"{depth} {made}")[:16], 16) for depth, made in prefixes.items()}


def _mapped(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _reserve(path: Path, size: int) -> None:
    """Gives the file its size, and takes the room at once: a full disk must show now, not when a page is touched."""
    before = path.stat().st_blocks * 512 if path.is_file() else 0
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        if not _allocated(descriptor, size) and shutil.disk_usage(path.parent).free + before < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.ftruncate(descriptor, 0)  # what was taken before the room ended
        free = shutil.disk_usage(path.parent).free
        raise SurgeryError(
            f"the prefix cache needs {format_value(size, 'bytes')} ({size:,} bytes), and {format_value(free, 'bytes')} "
            f"({free:,} bytes) are free",
            where=path.parent,
            hint="Free some space, give cache.folder on another disk, or set cache.use to off.",
        ) from error
    finally:
        os.close(descriptor)


def _allocated(descriptor: int, size: int) -> bool:
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True
