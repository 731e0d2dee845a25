"""Find the k largest scores of a tensor, exactly, in two streaming passes and without sorting it: a radix select.

Non-negative fp32 numbers are ordered as their bits are. The first pass counts scores by their upper 16 bits (sign,
exponent and 7 bits of mantissa), which gives the bucket of the k-th largest; the second counts the values inside that
bucket. Equal scores are ordered by position, the first one being the largest. All is compared as bits, so that NaN,
which stays NaN in the result anyway, counts as very large and does no harm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merges.methods.measures import KEPT
from surgery.engine.kernel import Pass, TensorSlice

THRESHOLDS = "thresholds"  # in `TensorSlice.pass_results`: per score, one `Threshold` for each wanted count
_BUCKETS = "buckets"
# Half of the bits in each of the two passes: a histogram of 65,536 counts is small.
_LOW_BITS = 16
# Which 16-bit half of a 32-bit number in memory has its upper bits.
_UPPER_HALF = 1 if np.little_endian else 0

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Counts = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]  # distinct values, ascending, and how often each occurs
Scores = Callable[..., Sequence[Tensor | None]]
Wanted = Callable[..., Sequence[tuple[int, ...]]]


@dataclass(frozen=True)
class Threshold:
    """The smallest of the k largest scores.

    Args:
        value: the score. Of those equal to it, the ones in pieces before `piece` are among the k largest, and the
            first `equals` in that piece.
        piece: index of the piece's first element.
    """

    value: float
    piece: float = math.inf
    equals: int = 0

    def largest(self, scores: Floats, begin: int) -> Bools:
        """Return which of the `scores`, the piece from element `begin` on, are among the k largest."""
        value = np.float32(self.value)
        # Ties are broken by position: before the piece in question all of them are in, behind it none is.
        if begin < self.piece:
            return scores >= value
        chosen = scores > value
        if begin == self.piece:
            chosen[np.flatnonzero(scores == value)[: self.equals]] = True
        return chosen


ALL, NONE = Threshold(-math.inf), Threshold(math.nan)  # nothing is ≥ NaN


@dataclass(frozen=True)
class _Bucket:
    """The k-th largest score is the `rank`-th largest (from 1) of those whose upper bits are `upper`."""

    upper: int
    rank: int


def topk_passes(scores: Scores, wanted: Wanted) -> tuple[Pass, Pass]:
    """Return the two passes that find thresholds.

    Args:
        scores: `scores(tensors, place, **params)` → per score a tensor of non-negative numbers, as many as the piece
            has elements; None where nothing needs to be known about it.
        wanted: `wanted(place, positive, **params)` → per score, how many of the largest are wanted; where there is a
            second number, so many of them are dropped again. `positive` says per score how many are not zero.
    """

    def count(tensors: Sequence[Tensor], place: TensorSlice, **params: Any) -> list[tuple[Counts, int] | None]:
        values = [None if score is None else as_floats(score) for score in scores(tensors, place, **params)]
        # A comparison and a count of what is true take a fifth of the time of counting floats that are not zero.
        return [None if v is None else (_upper_bits(v), int(np.count_nonzero(v != 0))) for v in values]

    def find_buckets(
        gathered: Sequence[list[tuple[Counts, int] | None]], place: TensorSlice, **params: Any
    ) -> Mapping[str, Any]:
        totals = [_total(pieces) for pieces in zip(*gathered, strict=True)]
        counts = wanted(place, [positive for _, positive in totals], **params)
        buckets = [tuple(_bucket(histogram, k) for k in ks) for (histogram, _), ks in zip(totals, counts, strict=True)]
        # More than two counts are quantiles, not a selection: how many elements are kept is then counted elsewhere.
        if any(len(ks) > 2 for ks in counts):
            return {_BUCKETS: buckets}
        return {_BUCKETS: buckets, KEPT: [ks[0] - sum(ks[1:]) for ks in counts]}

    def look_inside(
        tensors: Sequence[Tensor], place: TensorSlice, **params: Any
    ) -> tuple[int, list[list[Counts | None]]]:
        counts: list[list[Counts | None]] = []
        for score, buckets in zip(scores(tensors, place, **params), place.pass_results[_BUCKETS], strict=True):
            values = None if score is None else as_floats(score)
            counts.append(
                [_inside(values, b) if values is not None and isinstance(b, _Bucket) else None for b in buckets]
            )
        return place.begin, counts

    def find_thresholds(
        gathered: Sequence[tuple[int, list[list[Counts | None]]]], place: TensorSlice, **params: Any
    ) -> Mapping[str, Any]:
        # Equal scores are ordered by position, so each piece's count must be known with where the piece begins.
        begins = [begin for begin, _ in gathered]

        def threshold(i: int, j: int, bucket: Threshold | _Bucket) -> Threshold:
            if isinstance(bucket, Threshold):
                return bucket
            pieces = [counts for _, piece in gathered if (counts := piece[i][j]) is not None]
            return _threshold_at(pieces, begins, bucket.rank)

        return {
            THRESHOLDS: [
                tuple(threshold(i, j, bucket) for j, bucket in enumerate(buckets))
                for i, buckets in enumerate(place.pass_results[_BUCKETS])
            ]
        }

    return Pass(count, find_buckets), Pass(look_inside, find_thresholds)


def as_floats(score: Tensor) -> Floats:
    """Return scores as they are compared: fp32, 1-D, on the CPU. fp64 scores that are equal in fp32 count as equal."""
    values: Floats = score.reshape(-1).to("cpu", torch.float32).numpy()
    return values


def _upper_bits(values: Floats) -> Counts:
    # As numpy.unique does, without its second copy.
    bits = np.sort(values.view(np.uint16)[_UPPER_HALF::2])
    starts = np.concatenate([[0], np.flatnonzero(bits[1:] != bits[:-1]) + 1])
    return bits[starts], np.diff(starts, append=len(bits))


def _total(pieces: Sequence[tuple[Counts, int] | None]) -> tuple[npt.NDArray[np.int64], int]:
    histogram, positive = np.zeros(1 << _LOW_BITS, np.int64), 0
    for piece in pieces:
        if piece is not None:
            (upper, counts), nonzero = piece
            histogram[upper] += counts
            positive += nonzero
    return histogram, positive


def _bucket(histogram: npt.NDArray[np.int64], k: int) -> Threshold | _Bucket:
    if k <= 0:
        return NONE
    if not histogram.any():  # nothing needed to be counted, because nothing is cut off
        return ALL
    # Counts of the scores in this bucket and all higher ones, the highest bucket first.
    from_top = np.cumsum(histogram[::-1])
    at = int(np.searchsorted(from_top, k))
    upper = len(histogram) - 1 - at
    return _Bucket(upper, k - int(from_top[at] - histogram[upper]))


def _inside(values: Floats, bucket: _Bucket) -> Counts:
    """Return the distinct bits of a bucket's values, and how often each occurs."""
    bits = values.view(np.uint32)
    low = np.uint32(bucket.upper << _LOW_BITS)
    # Differences of 16-bit numbers have few digits: many are the bucket's first value, so these are only counted.
    first = np.count_nonzero(bits == low)
    rest, counts = np.unique(bits[(bits > low) & (bits <= low + np.uint32((1 << _LOW_BITS) - 1))], return_counts=True)
    return np.concatenate([[low], rest]).astype(np.uint32), np.concatenate([[first], counts])


def _threshold_at(pieces: Sequence[Counts], begins: Sequence[int], rank: int) -> Threshold:
    """Return the threshold at the `rank`-th largest of a bucket's values, which are given piece by piece."""
    # The pieces' counts, added up per distinct value.
    bits, where = np.unique(np.concatenate([bits for bits, _ in pieces]), return_inverse=True)
    counts = np.zeros(len(bits), np.int64)
    np.add.at(counts, where, np.concatenate([counts for _, counts in pieces]))
    from_top = np.cumsum(counts[::-1])
    at = len(bits) - 1 - int(np.searchsorted(from_top, rank))
    value = float(bits[at : at + 1].view(np.float32)[0])
    equals = rank - int(from_top[len(bits) - 1 - at] - counts[at])
    # In which piece the last of the equal scores is that still counts, and how many of them it contributes.
    each = np.cumsum([int(counts[values == bits[at]].sum()) for values, counts in pieces])
    piece = int(np.searchsorted(each, equals))
    return Threshold(value, begins[piece], equals - (int(each[piece - 1]) if piece else 0))
