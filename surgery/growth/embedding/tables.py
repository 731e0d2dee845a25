"""Tables of a frozen embedding: fp32 rows (V, width) of token ids, random numbers or pictures; and duplicate rows.

Pure functions; the same values on any number of threads.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.checkpoint.table_file import Table
from surgery.errors import SurgeryError, usage_error
from surgery.growth.embedding.pca import CHUNK, Rows, principal_axes, project
from surgery.io.hashing import hash_bytes

Groups = list[list[int]]  # indices of equal rows, two or more in each group; the largest group first

MIN_BITS = 16  # as in the paper
SEPARATION = 1e-2  # how far equal rows are moved apart, as a fraction of their norm


def bit_table(rows: int, width: int) -> Table:
    """Return rows of which row i has the b bits of i, most significant first, as 0 or 1, each width / b times.

    b is 16, or as many as the largest id needs.

    Source: the 16-bit variant of arXiv 2507.04886, for which the order of the bits is not published.

    Raises:
        SurgeryError: `width` is not a multiple of b.
    """
    # (rows − 1) is the largest id.
    n_bits = max(MIN_BITS, (rows - 1).bit_length())
    if width % n_bits:
        raise usage_error(
            f"got {width}, expected a multiple of {n_bits}, the bits of {rows:,} ids",
            where="--width",
            hint=f"Such as {max(1, round(width / n_bits)) * n_bits}.",
        )
    shifts = np.arange(n_bits - 1, -1, -1)
    bits = (np.arange(rows)[:, None] >> shifts) & 1
    return np.repeat(bits.astype(np.float32), width // n_bits, axis=1)


def random_table(rows: int, width: int, *, seed: int, normalise: bool) -> Table:
    """Return independent draws from N(0, 1), from a generator seeded by `seed` and the table's name."""
    # In chunks, as fp64 draws of a whole table would take twice its memory.
    generator = _generator(seed, "embedding")
    table = np.empty((rows, width), np.float32)
    for begin in range(0, rows, CHUNK):
        part = generator.standard_normal((min(CHUNK, rows - begin), width))
        table[begin : begin + len(part)] = unit_rows(part) if normalise else part
    return table


def principal_table(rows: Rows, width: int, *, normalise: bool) -> tuple[Table, float, int]:
    """Project `rows` (V, P) on their first `width` principal axes.

    Also return the fraction of variance retained, and the number of axes along which rows vary. At width P this is a
    rotation about the mean. Equal rows stay equal to the bit.

    Raises:
        SurgeryError: all rows are equal.
    """
    axes = principal_axes(rows, width)
    if not axes.rank:
        raise SurgeryError("all rows are alike, so that they have no principal axes", where="--kind")
    table = np.empty((len(rows), width), np.float32)
    for begin, part in project(rows, axes):
        part += 0.0  # no negative zeros
        table[begin : begin + len(part)] = unit_rows(part) if normalise else part
    # The last bits of a matrix product depend on the position of a row in the matrix.
    for first, *others in duplicate_rows(rows):
        table[others] = table[first]
    return table, axes.kept, axes.rank


def normalize_rows(table: Table) -> Table:
    """Divide each row of `table` by its norm, in place; rows of zeros stay."""
    for begin in range(0, len(table), CHUNK):
        table[begin : begin + CHUNK] = unit_rows(table[begin : begin + CHUNK].astype(np.float64))
    return table


def unit_rows(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return x / ‖x‖₂ for each row; a row of zeros stays."""
    norms = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
    return rows / np.where(norms > 0, norms, 1.0)


def duplicate_rows(table: npt.NDArray[Any]) -> Groups:
    """Return the groups of rows that are equal to the bit."""
    groups: dict[bytes, list[int]] = {}
    for index, row in enumerate(table):
        groups.setdefault(hash_bytes(row.tobytes()), []).append(index)
    return sorted((group for group in groups.values() if len(group) > 1), key=lambda group: (-len(group), group[0]))


def separate_duplicates(table: Table, groups: Groups, *, seed: int, normalise: bool) -> None:
    """Move all but the first row of each group, in place: x + 0.01·‖x‖·u, with a random direction u per row.

    u is drawn from a generator seeded by `seed` and the row's index. Where ‖x‖ is 0 it counts as 1, or the row would
    not move. With `normalise` the norm is 1 afterwards.

    Raises:
        SurgeryError: rows are still equal, because the table is too narrow to tell them apart.
    """
    for index in _duplicates(groups):
        row = table[index].astype(np.float64)
        # Seeded by the row: the direction does not depend on which other rows are duplicates.
        direction = unit_rows(_generator(seed, f"embedding {index}").standard_normal((1, len(row))))[0]
        moved = row + SEPARATION * (math.sqrt(float(np.square(row).sum())) or 1.0) * direction
        table[index] = unit_rows(moved[None])[0] if normalise else moved
    if groups and (left := duplicate_rows(table)):
        raise SurgeryError(
            f"{sum(map(len, left)):,} rows cannot be told apart at width {table.shape[1]}",
            where="--unique",
            hint="Give a larger --width.",
        )


def _duplicates(groups: Sequence[Sequence[int]]) -> Iterator[int]:
    for _, *others in groups:
        yield from others


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(f"{seed} {name}".encode())))
