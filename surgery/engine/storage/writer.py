"""Write safetensors files of known size at any offset, in any order, by any number of workers."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable
from pathlib import Path

from surgery.engine.plan import PlannedFile
from surgery.engine.storage.direct_io import BLOCK, DIRECT_FROM, DirectFile, Edge, open_direct
from surgery.errors import SurgeryError
from surgery.io.atomic import disk_error
from surgery.io.output_files import open_output

_SYNC_FILE_RANGE_WRITE = 2
_LIBC = ctypes.CDLL(None, use_errno=True)


class ShardWriter:
    """The weight files of one output folder, created (or, on resuming, reopened) at their full size.

    Several processes may write into one file, each with its own writer; the first writer creates the files.

    Args:
        create: False where another process has created them.

    Raises:
        SurgeryError: the disk is full, or a file cannot be written.
    """

    def __init__(self, folder: Path, files: Iterable[PlannedFile], *, create: bool = True) -> None:
        self._descriptors: dict[str, int] = {}
        self._direct: dict[str, DirectFile] = {}
        self._direct_descriptors: list[int] = []
        self._starts: dict[str, dict[str, int]] = {}
        self.folder = folder
        try:
            for file in files:
                self._open(file, create=create)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file; safe to call twice."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
        while self._direct_descriptors:
            os.close(self._direct_descriptors.pop())

    def complete(self, file: str, edges: Iterable[Edge]) -> None:
        """Write the edges that a `write` to `file` returned, once their blocks are whole; for one thread only."""
        for edge in edges:
            try:
                self._direct[file].complete(edge)
            except OSError as error:
                raise disk_error(error, self.folder / file) from error

    def begin(self, file: PlannedFile) -> None:
        """Register the header's last bytes. Call before the first tensor of `file` is written, in the same process.

        They share a block with that tensor, and direct writes write whole blocks.
        """
        if file.name in self._direct:
            rest = len(file.header.raw) // BLOCK * BLOCK
            self.complete(file.name, self.write(file.name, rest, memoryview(file.header.raw)[rest:]))

    def flush(self) -> None:
        """Write the blocks that are still incomplete; call once, when no process writes to the files any more."""
        for name, direct in self._direct.items():
            try:
                direct.flush()
            except OSError as error:
                raise disk_error(error, self.folder / name) from error

    def sync(self) -> None:
        """Wait until all pages of the files that this machine has are on the disk."""
        for name, descriptor in self._descriptors.items():
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise disk_error(error, self.folder / name) from error

    def is_direct(self, file: str) -> bool:
        """Return whether `file` is written past the page cache, so that written bytes cannot be read back yet."""
        return file in self._direct

    def descriptor(self, file: str) -> int:
        """Return the open file descriptor of `file`."""
        return self._descriptors[file]

    def position(self, file: str, tensor: str) -> int:
        """Return the offset in `file` at which the bytes of `tensor` begin."""
        return self._starts[file][tensor]

    def write(self, file: str, position: int, data: memoryview) -> list[Edge]:
        """Write `data` at `position` bytes from the start of `file`, and start its writeback to the disk.

        Returns:
            What must be given to `complete`, in the process that created this writer.
        """
        descriptor, direct = self._descriptors[file], self._direct.get(file)
        try:
            if direct is not None:
                return direct.write(position, data)
            _write_all(descriptor, data, position)
        except OSError as error:
            raise disk_error(error, self.folder / file) from error
        start_writeback(descriptor, position, len(data))
        return []

    def copy(self, source: int, source_position: int, file: str, position: int, size: int) -> None:
        """Copy `size` bytes between files inside the kernel, where the file systems support it.

        Not for files that are written past the page cache.
        """
        assert file not in self._direct
        descriptor = self._descriptors[file]
        done = 0
        try:
            while done < size:
                count = _copy_range(source, source_position + done, descriptor, position + done, size - done)
                if count == 0:
                    raise SurgeryError("the source ended while it was being copied", where=self.folder / file)
                done += count
        except OSError as error:
            raise disk_error(error, self.folder / file) from error
        start_writeback(descriptor, position, size)

    def _open(self, file: PlannedFile, *, create: bool) -> None:
        path = self.folder / file.name
        header = file.header
        try:
            descriptor = open_output(self.folder, file.name, os.O_RDWR | (os.O_CREAT if create else 0))
            self._descriptors[file.name] = descriptor
            if create:
                _reserve(descriptor, file.size)
                _write_all(descriptor, memoryview(header.raw), 0)
            # Files of copies alone are written inside the kernel, by way of the page cache.
            if file.size >= DIRECT_FROM and any(tensor.kernel is not None for tensor in file.tensors):
                self._open_direct(file, descriptor)
        except OSError as error:
            raise disk_error(error, path) from error
        self._starts[file.name] = {entry.name: header.data_start + entry.begin for entry in header.entries}

    def _open_direct(self, file: PlannedFile, buffered: int) -> None:
        direct = open_direct(self.folder / file.name)
        if direct is None:
            return
        self._direct_descriptors.append(direct)
        self._direct[file.name] = DirectFile(direct, buffered)


def start_writeback(descriptor: int, position: int, size: int) -> None:
    """Start writing a range to the disk without waiting, so that little is left for the fsync at the end.

    Only a hint: a system without the call takes longer at the end.
    """
    if hasattr(_LIBC, "sync_file_range"):
        _LIBC.sync_file_range(descriptor, ctypes.c_int64(position), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)


def _write_all(descriptor: int, data: memoryview, position: int) -> None:
    # A write may be cut short: by a signal, at 2 GiB, or on a disk that is about to be full.
    while data:
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count


def _reserve(descriptor: int, size: int) -> None:
    current = os.fstat(descriptor).st_size
    if current != size:
        os.ftruncate(descriptor, size)
    # A full disk shows now, not after an hour of writing.
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(descriptor, 0, size)


def _copy_range(source: int, source_position: int, target: int, position: int, size: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, size, source_position, position)
        except OSError as error:
            # Across file systems, and on some of them, the kernel cannot: then the bytes go through here.
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
    # 8 MiB is a segment of the widest dtype, so that one round suffices.
    return os.pwrite(target, os.pread(source, min(size, 8 << 20), source_position), position)
