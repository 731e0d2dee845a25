"""Principal axes of many rows (PCA), with the same result on any number of threads.

Rows are small whole numbers (bitmaps) or floats. Sums of whole numbers are exact in fp64 in any order; all other matrix
products are computed by one thread, because the threads of a BLAS library decide in which order a sum is taken.
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
    """Principal axes: the mean `centre` (P,), and orthonormal `vectors` (P, width) by falling variance; fp64.

    Vectors along which no row varies are zero, as their direction would be noise. kept: the fraction of the variance
    along `vectors`. rank: how many of them are not zero.
    """

    centre: npt.NDArray[np.float64]
    vectors: npt.NDArray[np.float64]
    kept: float
    rank: int


def principal_axes(rows: Rows, width: int) -> Axes:
    """Return the first `width` eigenvectors of the covariance (P, P) of `rows` (n, P); width ≤ P.

    Eigenvectors have no sign of their own: the (first) largest entry of each is made positive.
    """
    from threadpoolctl import threadpool_limits

    n, size = rows.shape
    with threadpool_limits(1):
        total = np.zeros(size)
        for part in _parts(rows):
            total += part.sum(axis=0)
        centre = total / n
        # Whole numbers are centred afterwards, so that the sums are exact; floats before, or their digits would cancel.
        whole = np.issubdtype(rows.dtype, np.integer)
        products = np.zeros((size, size))
        for part in _parts(rows):
            centred = part if whole else part - centre
            products += centred.T @ centred
        if whole:
            products -= np.outer(total, total) / n
        values, vectors = np.linalg.eigh(products)
    values, vectors = values[::-1], vectors[:, ::-1][:, :width].copy()
    largest = np.abs(vectors).argmax(axis=0)
    vectors *= np.where(vectors[largest, np.arange(width)] < 0, -1.0, 1.0)
    # Smaller eigenvalues are rounding errors.
    floor = max(float(values[0]), 0.0) * size * np.finfo(np.float64).eps
    real = values > floor
    vectors[:, ~real[:width]] = 0.0
    variance = float(values[real].sum())
    kept = float(values[:width][real[:width]].sum()) / variance if variance else 0.0
    return Axes(centre, vectors, kept, int(real[:width].sum()))


def project(rows: Rows, axes: Axes) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """Yield (index of the first row, (rows − centre)·vectors in fp64) for each chunk of `rows`."""
    from threadpoolctl import threadpool_limits

    begin = 0
    for part in _parts(rows):
        with threadpool_limits(1):
            projected = (part - axes.centre) @ axes.vectors
        yield begin, projected
        begin += len(part)


def _parts(rows: Rows) -> Iterator[npt.NDArray[np.float64]]:
    for begin in range(0, len(rows), CHUNK):
        yield rows[begin : begin + CHUNK].astype(np.float64)
