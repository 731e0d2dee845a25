"""What a frozen embedding's rows can be: numbers of tokens or pictures in, fp32 rows (V, width) out; and which collide.

Pure functions; the same numbers on any number of threads.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.checkpoint.write_table import Table
from surgery.errors import SurgeryError, usage_error
from surgery.growth.embedding.pca import CHUNK, Rows, principal_axes, project
from surgery.io.hashing import hash_bytes

Groups = list[list[int]]  # numbers of rows that are alike, two or more in each; the largest group first

FEWEST_BITS = 16  # as in the paper
TIE = 1e-2  # how far rows that were alike are moved apart, as a share of their norm


def bit_table(rows: int, width: int) -> Table:
    """Row i holds the b bits of i, most significant first, as 0 or 1, each width / b times; b is 16, or more if needed.

    Source: the 16-bit variant of arXiv 2507.04886, for which the order of the bits is not published.

    Raises:
        SurgeryError: `width` is no multiple of b.
    """
    n_bits = max(FEWEST_BITS, (rows - 1).bit_length())
    if width % n_bits:
        raise usage_error(
            f"got {width}, expected a multiple of {n_bits}, the bits of {rows:,} ids",
            where="--width",
            hint=f"Such as {max(1, round(width / n_bits)) * n_bits}.",
        )
    shifts = np.arange(n_bits - 1, -1, -1)
    of_id = (np.arange(rows)[:, None] >> shifts) & 1
    return np.repeat(of_id.astype(np.float32), width // n_bits, axis=1)


def random_table(rows: int, width: int, *, seed: int, normalise: bool) -> Table:
    """Independent N(0, 1), drawn from a generator seeded by `seed` and the table's name."""
    generator = _generator(seed, "embedding")
    table = np.empty((rows, width), np.float32)
    for begin in range(0, rows, CHUNK):
        part = generator.standard_normal((min(CHUNK, rows - begin), width))
        table[begin : begin + len(part)] = unit_rows(part) if normalise else part
    return table


def principal_table(rows: Rows, width: int, *, normalise: bool) -> tuple[Table, float, int]:
    """`rows` (V, P) along their first `width` principal axes; the share of variance kept, and how many axes vary.

    At width P this is a rotation about the mean. Rows that are alike stay alike to the bit.

    Raises:
        SurgeryError: all rows are alike.
    """
    axes = principal_axes(rows, width)
    if not axes.rank:
        raise SurgeryError("all rows are alike, so that they have no principal axes", where="--kind")
    table = np.empty((len(rows), width), np.float32)
    for begin, part in project(rows, axes):
        part += 0.0  # no negative zeros
        table[begin : begin + len(part)] = unit_rows(part) if normalise else part
    # The last bits of a product depend on where in its matrix a row stands.
    for first, *others in duplicate_rows(rows):
        table[others] = table[first]
    return table, axes.kept, axes.rank


def normalize_rows(table: Table) -> Table:
    """`table` with rows of norm 1, in place; rows of zeros stay."""
    for begin in range(0, len(table), CHUNK):
        table[begin : begin + CHUNK] = unit_rows(table[begin : begin + CHUNK].astype(np.float64))
    return table


def unit_rows(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """x / ‖x‖₂ of each row; a row of zeros stays."""
    norms = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
    return rows / np.where(norms > 0, norms, 1.0)


def duplicate_rows(table: npt.NDArray[Any]) -> Groups:
    """The groups of rows that are the same to the bit."""
    found: dict[bytes, list[int]] = {}
    for number, row in enumerate(table):
        found.setdefault(hash_bytes(row.tobytes()), []).append(number)
    return sorted((group for group in found.values() if len(group) > 1), key=lambda group: (-len(group), group[0]))


def separate_duplicates(table: Table, groups: Groups, *, seed: int, normalise: bool) -> None:
    """Moves all but the first row of each group, in place: x + 0.01·‖x‖·u, u a random direction of the row's own.

    u is drawn from a generator seeded by `seed` and the row's number; x / 100 where ‖x‖ is 0 would not move, so that
    ‖x‖ counts as 1 there. With `normalise` the norm is 1 afterwards.

    Raises:
        SurgeryError: rows are still alike, because the table is too narrow to tell them apart.
    """
    for number in _later(groups):
        row = table[number].astype(np.float64)
        direction = unit_rows(_generator(seed, f"embedding {number}").standard_normal((1, len(row))))[0]
        moved = row + TIE * (math.sqrt(float(np.square(row).sum())) or 1.0) * direction
        table[number] = unit_rows(moved[None])[0] if normalise else moved
    if groups and (left := duplicate_rows(table)):
        raise SurgeryError(
            f"{sum(map(len, left)):,} rows cannot be told apart at width {table.shape[1]}",
            where="--unique",
            hint="Give a larger --width.",
        )


def _later(groups: Sequence[Sequence[int]]) -> Iterator[int]:
    for _, *others in groups:
        yield from others


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(f"{seed} {name}".encode())))
