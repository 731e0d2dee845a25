"""Compute sums over the values of stored tensors, in one streaming pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from surgery.checkpoint.reader import (
    BLOCK,
    SourceFiles,
    TensorInput,
    TensorReader,
    compute_dtype,
    segments,
)
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.engine.work.workers import run_shared
from surgery.runtime.progress import Progress, silent

Measure = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def reduce_tensors(
    jobs: Mapping[str, Sequence[StoredTensor]],
    measure: Measure,
    *,
    label: str,
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, list[float]]:
    """Sum `measure` over every piece of every job's tensors.

    Args:
        jobs: name → tensors of one shape, given to `measure` piece by piece as 1-D fp32 (fp64 for F64).
        measure: returns 0-d tensors; each is summed over the pieces in fp64, in an order that threads do not change.

    Returns:
        name → one sum per value of `measure`; an empty list for tensors without elements.

    Raises:
        SurgeryError: a file cannot be read, or changes while it is read.
    """
    units = [
        (name, part, begin, end)
        for name, tensors in jobs.items()
        for part, (begin, end) in enumerate(segments(tensors[0].n_elements))
    ]
    total = sum(tensor.n_bytes for tensors in jobs.values() for tensor in tensors)
    sums: dict[str, dict[int, list[float]]] = {name: {} for name in jobs}

    def work(unit: tuple[str, int, int, int], reader: TensorReader) -> tuple[str, int, int, list[float]]:
        name, part, begin, end = unit
        tensors = jobs[name]
        compute = compute_dtype(tensor.dtype for tensor in tensors)
        values = [reader.values(TensorInput(tensor), begin, end, slot) for slot, tensor in enumerate(tensors)]
        # Block by block, added up in fp64: in one fp32 sum over a segment the small terms would be lost.
        rows = [
            [value.item() for value in measure([x[i : i + BLOCK].to(compute) for x in values])]
            for i in range(0, end - begin, BLOCK)
        ]
        read = sum(tensor.n_bytes * (end - begin) // tensor.n_elements for tensor in tensors)
        return name, part, read, [math.fsum(column) for column in zip(*rows, strict=True)]

    with SourceFiles(path for tensors in jobs.values() for t in tensors for path in t.files) as files:
        with progress(label, total) as advance:
            for name, part, read, row in run_shared(units, work, files, threads=threads):
                sums[name][part] = row
                advance(read)
        files.check_unchanged()
    return {
        name: [math.fsum(column) for column in zip(*(parts[i] for i in sorted(parts)), strict=True)]
        for name, parts in sums.items()
    }
