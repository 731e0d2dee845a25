"""Principal axes of many rows, the same on any number of threads.

In come rows of small whole numbers (bitmaps) or of floats, out come centre and axes, and rows seen along them. Sums of
whole numbers are exact in fp64 whatever their order; all other products of matrices are computed by one thread, for a
library's threads decide in which order a sum is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
CHUNK = 4096  # rows in fp64 at a time; fixed, as the order of sums depends on it


@dataclass(frozen=True)
class Axes:
    """Where rows are seen from: `centre` (P,), and orthonormal `vectors` (P, width) by falling variance; fp64.

    Vectors along which no row varies are zero, for their direction would be noise. kept: the share of the variance
    that lies along `vectors`. rank: how many of them are not zero.
    """

    centre: npt.NDArray[np.float64]
    vectors: npt.NDArray[np.float64]
    kept: float
    rank: int


def principal_axes(rows: Rows, width: int) -> Axes:
    """The first `width` eigenvectors of the rows' covariance (P, P); `rows` is (n, P), width ≤ P.

    Each vector's largest entry, the first of them, is positive: eigenvectors have no sign of their own.
    """
    from threadpoolctl import threadpool_limits

    n, size = rows.shape
    with threadpool_limits(1):
        total = np.zeros(size)
        for part in _parts(rows):
            total += part.sum(axis=0)
        centre = total / n
        # Whole numbers stay whole, so that the sums are exact; floats are centred first, lest their digits cancel.
        whole = np.issubdtype(rows.dtype, np.integer)
        products = np.zeros((size, size))
        for part in _parts(rows):
            seen = part if whole else part - centre
            products += seen.T @ seen
        if whole:
            products -= np.outer(total, total) / n
        values, vectors = np.linalg.eigh(products)
    values, vectors = values[::-1], vectors[:, ::-1][:, :width].copy()
    largest = np.abs(vectors).argmax(axis=0)
    vectors *= np.where(vectors[largest, np.arange(width)] < 0, -1.0, 1.0)
    floor = max(float(values[0]), 0.0) * size * np.finfo(np.float64).eps
    real = values > floor
    vectors[:, ~real[:width]] = 0.0
    variance = float(values[real].sum())
    kept = float(values[:width][real[:width]].sum()) / variance if variance else 0.0
    return Axes(centre, vectors, kept, int(real[:width].sum()))


def project(rows: Rows, axes: Axes) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """(number of the first row, (rows − centre)·vectors in fp64) for one chunk of `rows` after the other."""
    from threadpoolctl import threadpool_limits

    begin = 0
    for part in _parts(rows):
        with threadpool_limits(1):
            seen = (part - axes.centre) @ axes.vectors
        yield begin, seen
        begin += len(part)


def _parts(rows: Rows) -> Iterator[npt.NDArray[np.float64]]:
    for begin in range(0, len(rows), CHUNK):
        yield rows[begin : begin + CHUNK].astype(np.float64)
