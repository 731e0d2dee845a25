"""Compute one segment of a planned tensor: read the inputs, cut them into pieces, call the kernel.

A piece fits a processor's cache. A kernel that works on whole rows gets all rows that overlap the segment; of rows
across the segment's ends only the segment's own part is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from surgery.checkpoint.dtypes import is_float, n_bytes, n_elements
from surgery.checkpoint.reader import BLOCK, SEGMENT, TORCH_DTYPES, TensorInput, TensorReader, compute_dtype, digest
from surgery.engine.kernel import Kernel, TensorSlice, row_width
from surgery.engine.plan import PlannedTensor
from surgery.errors import usage_error


@dataclass(frozen=True)
class Computed:
    """A computed segment of an output tensor.

    values: rounded to the stored dtype, 1-D, on the CPU; valid until the reader's next call.
    sums: squares, nonfinite and the kernel's measures.
    input_hashes: per input the hash of the values read; "" where these are not the stored bytes.
    """

    values: Tensor
    sums: list[float]
    input_hashes: tuple[str, ...] = ()


def bounds(tensor: PlannedTensor, segment: int) -> tuple[int, int]:
    """Return the elements [begin, end) of a segment."""
    return segment * SEGMENT, min((segment + 1) * SEGMENT, n_elements(tensor.shape))


def kernel_of(tensor: PlannedTensor) -> Kernel:
    """Return the kernel of a tensor that is known to have one."""
    assert tensor.kernel is not None
    return tensor.kernel


def compute(
    tensor: PlannedTensor, segment: int, place: TensorSlice, reader: TensorReader, device: torch.device
) -> Computed:
    """Compute one segment by an elementwise or row-wise kernel; `place` is the whole tensor."""
    kernel = kernel_of(tensor)
    begin, end = bounds(tensor, segment)
    first, last = _rows_around(tensor, begin, end)
    values = [reader.values(source, first, last, slot) for slot, source in enumerate(tensor.inputs)]
    # Hashed while they are in cache: a pass of its own would read every source twice.
    hashes = tuple(
        digest(value[begin - first : end - first]).hex() if is_plain(source) else ""
        for source, value in zip(tensor.inputs, values, strict=True)
    )
    out = reader.buffer("out", n_bytes(tensor.dtype, (end - begin,))).view(TORCH_DTYPES[tensor.dtype])
    sums = [0.0] * (2 + len(kernel.measures))
    with _stream_of(device):
        for inputs, here in _pieces(tensor, values, first, place, device):
            slice_argument = (here,) if kernel.takes_slice else ()
            stored = kernel.fn(inputs, *slice_argument, **tensor.params).to(out.dtype).reshape(-1)
            skip, stop = max(begin - here.begin, 0), min(end - here.begin, stored.numel())
            own = stored[skip:stop]  # without the parts of rows that belong to neighbouring segments
            out[here.begin + skip - begin : here.begin + stop - begin].copy_(own, non_blocking=True)
            # Inputs are cut like the output: a row that two segments share would otherwise be measured twice.
            flat = [x.reshape(-1)[skip:stop] for x in inputs]
            # Measured after rounding: an update that the stored dtype swallows does not count as delivered.
            back = own.to(_compute_dtype(tensor))
            for i, value in enumerate(
                _measure(kernel, tensor.params, flat, back, replace(here, begin=here.begin + skip))
            ):
                sums[i] += value
        # The copies to `out` are asynchronous; the caller hashes and writes it at once.
        if device.type == "cuda":
            torch.cuda.current_stream().synchronize()
    return Computed(out, sums, hashes)


def gather(
    tensor: PlannedTensor, segment: int, number: int, place: TensorSlice, reader: TensorReader, device: torch.device
) -> list[Any]:
    """Return what pass `number` gathers of a segment, piece by piece; a row belongs to the segment it begins in."""
    begin, end = bounds(tensor, segment)
    if kernel_of(tensor).kind == "rows":
        # Each row is gathered once, though two segments may share it.
        width = row_width(tensor.shape)
        begin, end = -(-begin // width) * width, -(-end // width) * width
    values = [reader.values(source, begin, end, slot) for slot, source in enumerate(tensor.inputs)]
    collect = tensor.passes[number].gather
    with _stream_of(device):
        return [
            collect(inputs, here, **tensor.params) for inputs, here in _pieces(tensor, values, begin, place, device)
        ]


def compute_whole(tensors: Sequence[PlannedTensor], reader: TensorReader, device: torch.device) -> Iterator[Computed]:
    """Compute the tensors that one call of a "whole" kernel returns, each in one piece."""
    first = tensors[0]
    kernel = kernel_of(first)
    dtype = _compute_dtype(first)
    inputs = [reader.whole(source, slot).to(device, dtype) for slot, source in enumerate(first.inputs)]
    result = kernel.fn(inputs, **first.params)
    results = result if isinstance(result, tuple) else (result,)
    for tensor in tensors:
        stored = results[tensor.part].to(TORCH_DTYPES[tensor.dtype])
        place = TensorSlice(tensor.name, 0, tensor.shape)
        sums = _measure(kernel, first.params, inputs, stored.to(dtype), place)
        yield Computed(stored.cpu().contiguous().view(-1), sums)


def is_plain(source: TensorInput) -> bool:
    """Return whether the values are read as they are stored, so that their hash is the stored tensor's."""
    return source.rows is None and source.tensor.derivation is None and is_float(source.tensor.dtype)


def torch_device(name: str) -> torch.device:
    """Return the device called `name`. Raises SurgeryError where this machine lacks it."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise usage_error(f"got {name!r}, expected cpu or cuda[:N]", where="--device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise usage_error(
            "no CUDA device is available to this installation of torch",
            where=f"--device {name}",
            hint="Use --device cpu.",
        )
    if device.type not in ("cpu", "cuda"):
        raise usage_error(f"got {name!r}, expected cpu or cuda[:N]", where="--device")
    return device


def _pieces(
    tensor: PlannedTensor, values: Sequence[Tensor], first: int, place: TensorSlice, device: torch.device
) -> Iterator[tuple[list[Tensor], TensorSlice]]:
    """Yield `values`, which begin at element `first`, piece by piece in the compute dtype on the device."""
    count = values[0].numel()
    dtype = _compute_dtype(tensor)
    rows = kernel_of(tensor).kind == "rows"
    width = row_width(tensor.shape) if rows else 1
    # A GPU gets the segment in one piece: small launches would leave it idle.
    piece = max((BLOCK if device.type == "cpu" else count) // width, 1) * width
    for at in range(0, count, piece):
        inputs = [value[at : at + piece].to(device, non_blocking=True).to(dtype) for value in values]
        yield [x.view(-1, width) for x in inputs] if rows else inputs, replace(place, begin=first + at)


def _rows_around(tensor: PlannedTensor, begin: int, end: int) -> tuple[int, int]:
    """Return the elements that the kernel needs for its output's elements [begin, end)."""
    if kernel_of(tensor).kind != "rows":
        return begin, end
    width = row_width(tensor.shape)
    return begin // width * width, -(-end // width) * width


def _compute_dtype(tensor: PlannedTensor) -> torch.dtype:
    return compute_dtype((tensor.dtype, *(dtype for source in tensor.inputs for dtype in source.dtypes)))


def _measure(
    kernel: Kernel, params: Mapping[str, object], inputs: Sequence[Tensor], values: Tensor, place: TensorSlice
) -> list[float]:
    flat = values.reshape(-1)
    squares = torch.dot(flat, flat).item()
    # A finite sum of squares proves that all values are finite, in one pass over them. One that is not may have
    # overflowed, so then the values are counted.
    nonfinite = 0 if math.isfinite(squares) else flat.numel() - int(torch.isfinite(flat).sum())
    slice_argument = (place,) if kernel.takes_slice else ()
    extra = kernel.measure(inputs, values, *slice_argument, **params) if kernel.measure else ()
    return [squares, float(nonfinite), *map(float, extra)]


def _stream_of(device: torch.device) -> torch.cuda.StreamContext | ExitStack:
    """Return a CUDA stream of this thread's own, so that copies and arithmetic of several segments overlap."""
    if device.type != "cuda":
        return ExitStack()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
