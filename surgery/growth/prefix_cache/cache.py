"""Prefix cache: the hidden states that enter a layer, for every window of a corpus, in one memory-mapped file.

States are written with the indices of their windows and their depth, and are read back unchanged or not at all. A
window has one slot, in which a deeper state replaces the one before. The folder holds

    states.bin   (windows, sequence, width) in fp32 or bf16, allocated on the disk from the start
    windows.bin  for each window the depth of its state (−1: none) and the xxh3-64 of its bytes, as two 8-byte numbers
    cache.json   the sizes, a hash of the tokens, and the hash of the prefix that computed the states of each depth

The hash of a state is seeded with that of its prefix. So a state that was torn by a kill or a power loss, or computed
by another model, does not match, and counts as missing.
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
from surgery.io.atomic import disk_error, remove_path, write_file
from surgery.io.hashing import hash_text
from surgery.io.json_io import read_json
from surgery.io.private_files import FILE_MODE, make_private_folder
from surgery.io.safe_paths import contained_file
from surgery.reporting.report import format_value
from surgery.runtime.collectives import map_over_ranks, n_active_processes, on_main

STATES, WINDOWS, METADATA = "states.bin", "windows.bin", "cache.json"
SCHEMA = 1
NOT_CACHED = -1  # as a depth
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

_RECORD = np.dtype([("depth", "<i8"), ("hash", "<u8")])
# Error numbers of file systems that cannot allocate space ahead.
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def cache_bytes(windows: int, sequence: int, width: int, dtype: torch.dtype) -> int:
    """Return the size of a cache on the disk."""
    return windows * (sequence * width * dtype.itemsize + _RECORD.itemsize)


def cached_prefixes(
    folder: Path, *, windows: int, sequence: int, width: int, dtype: torch.dtype, tokens: str
) -> dict[int, str] | None:
    """Return for each depth in the cache in `folder` the hash of the prefix that computed its states.

    None where there is no cache, or one of other sizes or windows. Nothing is changed. The arguments are those of
    `PrefixCache`.
    """
    return _read_prefixes(folder, _metadata(windows, sequence, width, dtype, tokens))


class PrefixCache:
    """The cache in `folder`; a new one if there is none, or one of other sizes or other windows.

    With several processes all open it, on one disk; `start_depth` too is called by all.

    Args:
        windows: how many there is room for; their indices start at 0.
        sequence, width: shape of a window's state.
        dtype: float32 or bfloat16; states are rounded to it.
        tokens: hash of what the windows are cut from.
        alone: no other process opens this folder.

    Raises:
        SurgeryError: a size or the dtype is invalid; the disk has no room for the whole cache, or cannot be written.
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
        self._metadata = _metadata(windows, sequence, width, dtype, tokens)
        try:
            self._run_on_main(self._prepare)
            self._run_on_all(self._open)
        except OSError as error:
            raise disk_error(error, folder) from error

    @property
    def bytes_per_window(self) -> int:
        """Bytes of one window's state."""
        return self.sequence * self.width * self.dtype.itemsize

    def start_depth(self, depth: int, prefixes: Mapping[int, str]) -> None:
        """Declare that states at `depth` will be read and written, and drop states of other prefixes.

        Args:
            prefixes: depth → a hash of everything that decides the states there: for `depth`, and for those of the
                depths in `self.prefixes` whose states may be built upon. Where it is missing, or another than before,
                states at that depth are dropped.

        Raises:
            SurgeryError: the disk cannot be written.
        """
        retained = {at: prefix for at, prefix in self.prefixes.items() if prefixes.get(at) == prefix}
        current = retained | {depth: prefixes[depth]}

        def drop_and_record() -> None:
            self._depths[~np.isin(self._depths, list(retained))] = NOT_CACHED
            # Before the prefixes are recorded: after a kill in between, dropped states must not look valid.
            self._windows_map.flush()
            self._write_metadata(current)

        try:
            self._run_on_main(drop_and_record)
        except OSError as error:
            raise disk_error(error, self.folder) from error
        self.prefixes = current
        self._seeds = _seeds(self.prefixes)

    def depths(self, indices: Sequence[int]) -> list[int]:
        """Return the depth of the cached state of each of these windows; −1 where there is none."""
        self._check(indices)
        return [int(self._depths[index]) for index in indices]

    def read(self, indices: Sequence[int], depth: int) -> Tensor | None:
        """Return a copy of the states of these windows: (B, sequence, width) fp32 on the CPU.

        None unless all of them are cached at exactly that depth and match their hashes; damaged ones are dropped. May
        run in another thread, but not while the same windows are written.
        """
        if any(cached != depth for cached in self.depths(indices)):
            return None
        # Torch's memory is aligned to 64 bytes: matrix products round as they do without the cache.
        rows = torch.empty(len(indices), self.sequence, self.width)
        # NumPy copies in this thread alone and without Python's lock, so that training goes on meanwhile.
        copies, intact = rows.numpy(), True
        self._prefetch_pages(indices)
        for copy, index in zip(copies, indices, strict=True):
            stored = self._states[index]
            if self.dtype == torch.float32:
                np.copyto(copy, stored)
            else:
                # bf16 is the upper half of fp32.
                np.left_shift(stored, 16, out=copy.view(np.uint32), dtype=np.uint32)
            if self._hash(stored, depth) != int(self._hashes[index]):
                self._depths[index] = NOT_CACHED
                self.damaged += 1
                intact = False
        return rows if intact else None

    def write(self, indices: Sequence[int], depth: int, hidden: Tensor) -> Tensor:
        """Write the states of these windows, each given once; return them as they will be read, rounded.

        Args:
            hidden: (B, sequence, width), on any device and of any float dtype; the result has the same.

        Raises:
            SurgeryError: the disk cannot be written. Some file systems notice only now that they are full; the windows
                that were not written are then not cached.
        """
        self._check(indices)
        if tuple(hidden.shape) != (len(indices), self.sequence, self.width):
            raise usage_error(
                f"got states of shape {tuple(hidden.shape)}, expected {(len(indices), self.sequence, self.width)}",
                where=self.folder,
            )
        rounded = hidden.detach().to(self.dtype)
        bits = rounded.cpu().contiguous()
        rows = (bits if self.dtype == torch.float32 else bits.view(torch.uint16)).numpy()
        # In this order: whenever the process is killed, no window claims a depth that its state does not have.
        self._depths[list(indices)] = NOT_CACHED
        for row, index in zip(rows, indices, strict=True):
            try:
                self._write_row(row, index)
            except OSError as error:
                raise disk_error(error, self.folder) from error
            self._hashes[index] = self._hash(row, depth)
            self._depths[index] = depth
        return rounded.to(hidden.dtype)

    def round_to_stored(self, hidden: Tensor) -> Tensor:
        """Return `hidden` as it would be read back."""
        return hidden.to(self.dtype).to(hidden.dtype)

    def flush(self) -> None:
        """Wait until all states are on the disk. Raises SurgeryError where it cannot be written."""
        try:
            self._states_map.flush()
            self._windows_map.flush()
        except OSError as error:
            raise disk_error(error, self.folder) from error

    def close(self) -> None:
        """Close the files; what was written stays."""
        # A map cannot be closed while an array refers to it.
        del self._states, self._depths, self._hashes
        self._states_map.close()
        self._windows_map.close()
        self._release()

    def remove(self) -> None:
        """Close the cache and delete its folder; for one process, once the others have closed it."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run_on_main(self, work: Callable[[], None]) -> None:
        """Run `work` in one process while the others wait for it."""
        if self._alone:
            work()
        else:
            on_main(work)

    def _run_on_all(self, work: Callable[[], None]) -> None:
        """Run `work` in every process; none goes on where it fails in one."""
        if self._alone:
            work()
        else:
            map_over_ranks(range(n_active_processes()), lambda _: work())

    def _open(self) -> None:
        self.prefixes = _read_prefixes(self.folder, self._metadata) or {}
        self._seeds = _seeds(self.prefixes)
        self._states_file = os.open(self.folder / STATES, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        # Also closes the file of a cache that is garbage-collected without `close`.
        self._release = weakref.finalize(self, os.close, self._states_file)
        self._states_map: mmap.mmap = _map_file(self.folder / STATES)
        self._windows_map: mmap.mmap = _map_file(self.folder / WINDOWS)
        # NumPy has no bfloat16: its bits are handled as uint16.
        kind = np.float32 if self.dtype == torch.float32 else np.uint16
        shape = self.windows, self.sequence, self.width
        self._states: NDArray[Any] = np.frombuffer(self._states_map, kind).reshape(shape)
        records = np.frombuffer(self._windows_map, _RECORD)
        self._depths: NDArray[np.int64] = records["depth"]
        self._hashes: NDArray[np.uint64] = records["hash"]

    def _write_row(self, row: NDArray[Any], index: int) -> None:
        # Not through the map: on a full disk a file reports an error, a map kills the process (SIGBUS).
        data, at = memoryview(row).cast("B"), index * self.bytes_per_window  # type: ignore[arg-type]  # see octets
        while data:
            written = os.pwrite(self._states_file, data, at)
            data, at = data[written:], at + written

    def _prepare(self) -> None:
        make_private_folder(self.folder)
        states, windows = self.folder / STATES, self.folder / WINDOWS
        size = self.windows * self.bytes_per_window
        valid = (
            _read_prefixes(self.folder, self._metadata) is not None
            and _file_size(windows) == self.windows * _RECORD.itemsize
            # Through a link another file would be overwritten.
            and not states.is_symlink()
            and (states.is_file() or not states.exists())
        )
        if not valid:
            # The metadata first: after a kill in between, no valid-looking cache remains.
            for path in (self.folder / METADATA, windows, states):
                remove_path(path)
        # Where a valid file had lost its end, the states in it no longer match their hashes.
        _allocate(states, size)
        if not valid:
            records = np.zeros(self.windows, _RECORD)
            records["depth"] = NOT_CACHED
            write_file(windows, records.tobytes()).chmod(FILE_MODE)
            self._write_metadata({})

    def _write_metadata(self, prefixes: Mapping[int, str]) -> None:
        write_file(self.folder / METADATA, json.dumps(self._metadata | {"prefixes": prefixes}, indent=2)).chmod(
            FILE_MODE
        )

    def _prefetch_pages(self, indices: Sequence[int]) -> None:
        """Let the system read the windows at once, instead of page by page as they are touched."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        for index in indices:
            begin = index * self.bytes_per_window
            # madvise accepts only offsets at page boundaries.
            page = begin - begin % mmap.PAGESIZE
            self._states_map.madvise(mmap.MADV_WILLNEED, page, begin + self.bytes_per_window - page)

    def _hash(self, row: NDArray[Any], depth: int) -> int:
        return xxh3_64_intdigest(memoryview(row), seed=self._seeds[depth])  # type: ignore[arg-type]  # see octets

    def _check(self, indices: Sequence[int]) -> None:
        wrong = [index for index in indices if not 0 <= index < self.windows]
        if wrong:
            raise usage_error(f"has no window {wrong[0]}, only 0 to {self.windows - 1}", where=self.folder)


def _metadata(windows: int, sequence: int, width: int, dtype: torch.dtype, tokens: str) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "windows": windows,
        "sequence": sequence,
        "width": width,
        "dtype": DTYPES[dtype],
        "tokens": tokens,
    }


def _read_prefixes(folder: Path, metadata: Mapping[str, Any]) -> dict[int, str] | None:
    try:
        content = read_json(contained_file(folder, METADATA))
        prefixes = {int(depth): str(prefix) for depth, prefix in content.pop("prefixes").items()}
    except (SurgeryError, ValueError, KeyError, TypeError, AttributeError):
        return None  # only a cache: it is made again
    return prefixes if content == metadata else None


def _seeds(prefixes: Mapping[int, str]) -> dict[int, int]:
    """Return the seeds of xxh3-64: 64 bits of a hash of each depth and its prefix."""
    return {depth: int(hash_text(f"{depth} {prefix}")[:16], 16) for depth, prefix in prefixes.items()}


def _map_file(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.is_file() and not path.is_symlink() else 0


def _allocate(path: Path, size: int) -> None:
    """Give the file its size and allocate it on the disk: a full disk must show now, not when a page is touched."""
    before = path.stat().st_blocks * 512 if path.is_file() else 0
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), FILE_MODE)
    try:
        if not _preallocate(descriptor, size) and shutil.disk_usage(path.parent).free + before < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.ftruncate(descriptor, 0)  # frees what was allocated before the disk was full
        free = shutil.disk_usage(path.parent).free
        raise SurgeryError(
            f"the prefix cache needs {format_value(size, 'bytes')} ({size:,} bytes), and {format_value(free, 'bytes')} "
            f"({free:,} bytes) are free",
            where=path.parent,
            hint="Free some space, give cache.folder on another disk, or set cache.use to off.",
        ) from error
    finally:
        os.close(descriptor)


def _preallocate(descriptor: int, size: int) -> bool:
    """Allocate `size` bytes; return whether the file system can do that."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True
