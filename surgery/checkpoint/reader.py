"""Read slices of stored tensors, as the inputs of kernels.

Tensors are cut into segments of `SEGMENT` elements, whatever their dtype, so that the inputs and the output of an
elementwise kernel are cut at the same places; a segment is the unit of reading, hashing, writing and resuming. Its
bounds depend on the tensor alone, never on threads, which is what makes results independent of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from surgery.checkpoint.dtypes import DTYPES, n_bytes, n_elements
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.errors import SurgeryError
from surgery.io.hashing import hash_bytes, hash_parts
from surgery.io.input_files import open_descriptor

SEGMENT = 1 << 20  # elements: 2 MiB of bf16, so that a segment's inputs are still in cache when they are used
BLOCK = 1 << 18  # elements that a kernel sees at once on a CPU: its temporaries stay in the second-level cache

MOST_KEPT = 32  # results that derived tensors need for all their segments: a kernel may read as many models at once

T = TypeVar("T")

# Safetensors name → the torch dtype as which kernels see a tensor's bytes.
TORCH_DTYPES: dict[str, torch.dtype] = {
    dtype.name: getattr(torch, dtype.torch) for dtype in DTYPES.values() if dtype.torch is not None
}

# Unsigned type of the same width, and the bits of the greatest finite value.
_FINITE: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F64": (np.uint64, 0x7FEF_FFFF_FFFF_FFFF),
    "F32": (np.uint32, 0x7F7F_FFFF),
    "F16": (np.uint16, 0x7BFF),
    "BF16": (np.uint16, 0x7F7F),
}


# Compared by identity: comparing arrays gives arrays, not a truth value.
@dataclass(frozen=True, eq=False)
class TensorInput:
    """A stored tensor as a kernel's input.

    rows: (rows of the output,) int64: the row of `tensor` that each is read from, −1 for a row of zeros. None: the
        tensor is read as it is stored.
    others: further tensors, each with rows of its own; a row of the input is then the mean of those given for it, in
        fp32 (fp64 if one of them is F64); zeros if none is.
    constant: (rows, value): rows, ascending, that are `value` (width,) instead.
    """

    tensor: StoredTensor
    rows: np.ndarray | None = None
    others: tuple[tuple[StoredTensor, np.ndarray], ...] = ()
    constant: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the kernel sees."""
        return self.tensor.shape if self.rows is None else (len(self.rows), *self.tensor.shape[1:])

    @property
    def n_elements(self) -> int:
        """The number of elements that the kernel sees."""
        return n_elements(self.shape)

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Every tensor that it is read from."""
        return (self.tensor, *(tensor for tensor, _ in self.others))

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of `tensors`."""
        return tuple(tensor.dtype for tensor in self.tensors)


def segments(count: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds [begin, end), in elements, of the segments of a tensor of `count` elements."""
    for begin in range(0, count, SEGMENT):
        yield begin, min(begin + SEGMENT, count)


def n_segments(count: int) -> int:
    """Return the number of segments of a tensor of `count` elements."""
    return -(-count // SEGMENT)


def compute_dtype(dtypes: Iterable[str]) -> torch.dtype:
    """Return fp64 if any of `dtypes` is F64, else fp32."""
    return torch.float64 if "F64" in set(dtypes) else torch.float32


class SourceFiles:
    """The source files of a job, opened read-only once; detects changes in them during the job."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._descriptors: dict[Path, int] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        try:
            for path in sorted(set(paths)):
                # Open until the end: a file replaced under its name meanwhile is then read to the end as it was.
                descriptor = open_descriptor(path)
                self._descriptors[path] = descriptor
                self._stamps[path] = _stamp(os.fstat(descriptor))
        except SurgeryError:
            self.close()
            raise

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file; safe to call twice."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def descriptor(self, path: Path) -> int:
        """Return the open file descriptor of `path`."""
        return self._descriptors[path]

    def check_unchanged(self) -> None:
        """Raise SurgeryError if a source was written, replaced or removed since it was opened."""
        for path, stamp in self._stamps.items():
            try:
                now = _stamp(path.stat())
            except OSError as error:
                # What was read of the open file is whole, but nobody could tell what the result was made from.
                raise SurgeryError(
                    f"vanished while it was being read ({error.strerror})",
                    where=path,
                    hint="Put it back, or fetch it again, and run the same command.",
                ) from error
            if now != stamp:
                raise SurgeryError(
                    "changed while it was being read, so the result would mix two versions",
                    where=path,
                    hint="Run the command again when nothing writes to it.",
                )

    def stamps(self) -> list[tuple[str, int, int]]:
        """Return (path, size in bytes, modification time in ns) of every file, sorted by path."""
        return [(str(path), *stamp) for path, stamp in sorted(self._stamps.items())]


def _stamp(status: os.stat_result) -> tuple[int, int]:
    # Without the change time, which a chmod or a new hard link sets too: a job could then not be resumed.
    return status.st_size, status.st_mtime_ns


class TensorReader:
    """A reader of segments, into buffers that it reuses for the next one. One per worker.

    The result of a method is valid until the next call with the same `slot`. With `pinned`, buffers are page-locked, so
    that a GPU copies from them asynchronously.
    """

    def __init__(self, files: SourceFiles, *, pinned: bool = False) -> None:
        self._files = files
        self._pinned = pinned
        self._buffers: dict[object, Tensor] = {}
        self._kept: dict[int, tuple[object, Any]] = {}

    def buffer(self, slot: object, size: int) -> Tensor:
        """Return `size` bytes, uint8 (size,), of the buffer called `slot`."""
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.numel() < size:
            # Kept for the next segment: fresh memory costs page faults, and locking pages costs more still.
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
            self._buffers[slot] = buffer
        return buffer[:size]

    def kept(self, owner: object, compute: Callable[[], T]) -> T:
        """Return `compute()`, called once for all segments of a tensor: results of the last `MOST_KEPT` owners stay.

        Args:
            owner: the derivation that needs the result, which must be small.
        """
        # The owner is kept as well: another object may get the id of one that is gone.
        found = self._kept.pop(id(owner), None) or (owner, compute())
        self._kept[id(owner)] = found
        if len(self._kept) > MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        return cast(T, found[1])

    @staticmethod
    def compute_dtype(dtypes: Iterable[str]) -> torch.dtype:
        """Return the dtype to compute in: fp64 if any of `dtypes` is F64, else fp32."""
        return compute_dtype(dtypes)

    def raw(self, tensor: StoredTensor, begin: int, end: int, slot: object) -> Tensor:
        """Read the stored bytes of elements [begin, end) of `tensor`, uint8. It must not be derived."""
        assert tensor.derivation is None, f"{tensor.name} is computed, and has no stored bytes"
        first = n_bytes(tensor.dtype, (begin,))
        size = n_bytes(tensor.dtype, (end,)) - first
        target = self.buffer(slot, size)
        read_into(self._files.descriptor(tensor.file), target, tensor.start + first, tensor)
        return target

    def values(self, source: TensorInput, begin: int, end: int, slot: object) -> Tensor:
        """Read elements [begin, end) of `source`, 1-D: in its dtype, or in a wider one if it is derived."""
        tensor = source.tensor
        if source.others or source.constant is not None:
            return self._mean_of_rows(source, begin, end, slot)
        if source.rows is not None:
            return self._rows(tensor, source.rows, begin, end, slot)
        return self.tensor(tensor, begin, end, slot)

    def tensor(self, tensor: StoredTensor, begin: int, end: int, slot: object) -> Tensor:
        """Read elements [begin, end) of `tensor`, 1-D: as they are stored, or as its derivation computes them."""
        if tensor.derivation is not None:
            return tensor.derivation.values(tensor, begin, end, self, slot)
        return self.raw(tensor, begin, end, slot).view(TORCH_DTYPES[tensor.dtype])

    def whole_tensor(self, tensor: StoredTensor, slot: object) -> Tensor:
        """Read all of `tensor` in its shape; dtype as in `tensor`."""
        return self.tensor(tensor, 0, tensor.n_elements, slot).view(tensor.shape)

    def whole(self, source: TensorInput, slot: object) -> Tensor:
        """Read all of `source` in its shape; dtype as in `values`."""
        return self.values(source, 0, source.n_elements, slot).view(source.shape)

    def _mean_of_rows(self, source: TensorInput, begin: int, end: int, slot: object) -> Tensor:
        assert source.rows is not None
        compute = compute_dtype(source.dtypes)
        width = max(source.n_elements // max(len(source.rows), 1), 1)
        first, last = begin // width, -(-end // width)
        total = torch.zeros((last - first, width), dtype=compute)
        count = np.zeros(last - first, dtype=np.int64)
        for number, (tensor, rows) in enumerate(((source.tensor, source.rows), *source.others)):
            own = self._rows(tensor, rows, first * width, last * width, (slot, number))
            total += own.view(-1, width).to(compute)
            count += rows[first:last] >= 0
        # Rows without any source are divided by 1 and stay zero; by 0 they would be NaN.
        total /= torch.from_numpy(np.maximum(count, 1))[:, None]
        if source.constant is not None:
            fixed, value = source.constant
            here = fixed[np.searchsorted(fixed, first) : np.searchsorted(fixed, last)] - first
            total[torch.from_numpy(here)] = torch.from_numpy(value).to(compute)
        return total.view(-1)[begin - first * width : end - first * width]

    def _rows(self, tensor: StoredTensor, rows: np.ndarray, begin: int, end: int, slot: object) -> Tensor:
        # Also for a tensor without rows, whose width cannot be computed.
        if begin == end:
            return torch.zeros(0, dtype=TORCH_DTYPES[tensor.dtype])
        width = tensor.n_elements // tensor.shape[0]
        first, last = begin // width, -(-end // width)
        wanted = rows[first:last]
        gathered: Tensor | None = None
        # Neighbouring rows are read in one go: two tokenizers of one family differ in a few places only.
        # A missing row (−1) is no neighbour of row 0.
        breaks = np.flatnonzero((np.diff(wanted) != 1) | (wanted[:-1] < 0)) + 1
        for run_begin, run_end in zip([0, *breaks], [*breaks, len(wanted)], strict=True):
            row = int(wanted[run_begin])
            if row < 0:
                continue
            size = int(run_end - run_begin)
            run = self.tensor(tensor, row * width, (row + size) * width, (slot, "run"))
            # Now, not before: derived values may come in another dtype than the tensor's.
            if gathered is None:
                gathered = torch.zeros((len(wanted), width), dtype=run.dtype)
            gathered[run_begin:run_end] = run.view(size, width)
        if gathered is None:
            gathered = torch.zeros((len(wanted), width), dtype=TORCH_DTYPES[tensor.dtype])
        return gathered.view(-1)[begin - first * width : end - first * width]


def read_into(descriptor: int, target: Tensor, position: int, tensor: StoredTensor) -> None:
    """Fill `target`, a contiguous CPU tensor, from `position` of a file. Raises SurgeryError if it ends early."""
    view = octets(target)
    done = 0
    # One call may read less than asked for: Linux transfers at most 2 GiB at once.
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], position + done)
        except OSError as error:
            raise SurgeryError(f'"{tensor.name}" cannot be read ({error.strerror})', where=tensor.file) from error
        if count == 0:
            raise SurgeryError(
                f'the file ends at byte {position + done:,}, inside "{tensor.name}"',
                where=tensor.file,
                hint="It was cut while it was being read: restore it and run the command again.",
            )
        done += count


def octets(data: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, shared and not copied."""
    return memoryview(data.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy says no Buffer before 3.12


def digest(data: Tensor) -> bytes:
    """Return the hash of a segment's bytes, 16 bytes long."""
    return hash_bytes(octets(data))


def hash_tensor(reader: TensorReader, tensor: StoredTensor) -> str:
    """Return the hash of a tensor's stored bytes. It must not be derived: its `parts` are not."""
    return hash_parts(digest(reader.raw(tensor, begin, end, "hash")) for begin, end in segments(tensor.n_elements))


def count_nonfinite(data: Tensor, dtype: str) -> int:
    """Return how many values among a float tensor's stored bytes (uint8) are NaN or infinite."""
    if not data.numel():
        return 0
    if dtype in _FINITE:
        # Without its sign bit a float orders as its bits do, and all that is not finite comes last.
        unsigned, greatest = _FINITE[dtype]
        bits = data.numpy().view(unsigned) & unsigned(np.iinfo(unsigned).max >> 1)
        return 0 if bits.max() <= greatest else int(np.count_nonzero(bits > greatest))
    values = data.view(TORCH_DTYPES[dtype]).float()
    return values.numel() - int(torch.isfinite(values).sum())
