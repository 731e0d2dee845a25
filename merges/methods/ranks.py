"""The k largest scores of a tensor, found exactly in two streaming passes and without a sort of the whole.

Non-negative fp32 numbers are ordered as their bits are. The first pass counts scores by their upper 16 bits (sign,
exponent and 7 bits of mantissa), which tells in which bucket the k-th largest lies; the second counts the values inside
that bucket. Scores that are equal are ordered by position, the first one being the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merges.methods.measures import KEPT
from surgery.plan import Pass, Place

CUTS = "cuts"  # in `Place.known`: per score, one `Cut` for each wanted count
_BUCKETS = "buckets"
_LOW_BITS = 16

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Scores = Callable[..., Sequence[Tensor | None]]
Wanted = Callable[..., Sequence[tuple[int, ...]]]


@dataclass(frozen=True)
class Cut:
    """Where the k largest scores end.

    value: the smallest of them. equals: how many scores equal to it are among them. before: piece's first element →
    how many scores equal to `value` lie before it; empty where all of them are among the largest.
    """

    value: float
    equals: int = 0
    before: Mapping[int, int] = field(default_factory=dict)

    def largest(self, scores: Floats, begin: int) -> Bools:
        """Which of the `scores`, the piece from element `begin` on, are among the k largest."""
        value = np.float32(self.value)
        if not self.before:
            return scores >= value
        chosen = scores > value
        left = self.equals - self.before[begin]
        if left > 0:
            chosen[np.flatnonzero(scores == value)[:left]] = True
        return chosen


ALL, NONE = Cut(-np.inf), Cut(np.inf)


@dataclass(frozen=True)
class _Bucket:
    """The k-th largest score is the `rank`-th largest (from 1) of those whose upper bits are `upper`."""

    upper: int
    rank: int


def order_passes(scores: Scores, wanted: Wanted) -> tuple[Pass, Pass]:
    """The two passes that find cuts.

    Args:
        scores: `scores(tensors, place, **params)` → per score a tensor of non-negative numbers, as many as the piece
            has elements; None where nothing needs to be known about it.
        wanted: `wanted(place, positive, **params)` → per score, how many of the largest are wanted; where there is a
            second number, so many of them are dropped again. `positive` says per score how many are not zero.
    """

    def count(tensors: Sequence[Tensor], place: Place, **params: Any) -> list[Any]:
        found: list[Any] = []
        for score in scores(tensors, place, **params):
            if score is None:
                found.append(None)
                continue
            values = _floats(score)
            upper = np.unique(values.view(np.uint16)[_UPPER_HALF::2], return_counts=True)
            found.append((upper, np.count_nonzero(values)))
        return found

    def find_buckets(gathered: Sequence[list[Any]], place: Place, **params: Any) -> Mapping[str, Any]:
        totals = [_total([piece[i] for piece in gathered]) for i in range(len(gathered[0]))] if gathered else []
        counts = wanted(place, [positive for _, positive in totals], **params)
        return {
            _BUCKETS: [
                tuple(_bucket(histogram, k) for k in ks) for (histogram, _), ks in zip(totals, counts, strict=True)
            ],
            **({KEPT: [ks[0] - sum(ks[1:]) for ks in counts]} if all(len(ks) <= 2 for ks in counts) else {}),
        }

    def look_inside(tensors: Sequence[Tensor], place: Place, **params: Any) -> tuple[int, list[Any]]:
        found = []
        for score, buckets in zip(scores(tensors, place, **params), place.known[_BUCKETS], strict=True):
            values = None if score is None else _floats(score)
            found.append([None if values is None or isinstance(b, Cut) else _inside(values, b) for b in buckets])
        return place.begin, found

    def find_cuts(gathered: Sequence[tuple[int, list[Any]]], place: Place, **params: Any) -> Mapping[str, Any]:
        begins = [begin for begin, _ in gathered]
        return {
            CUTS: [
                tuple(
                    bucket
                    if isinstance(bucket, Cut)
                    else _cut([pieces[i][j] for _, pieces in gathered], begins, bucket)
                    for j, bucket in enumerate(buckets)
                )
                for i, buckets in enumerate(place.known[_BUCKETS])
            ]
        }

    return Pass(count, find_buckets), Pass(look_inside, find_cuts)


_UPPER_HALF = 1 if np.little_endian else 0


def _floats(score: Tensor) -> Floats:
    # Where scores are fp64, those that fp32 cannot tell apart count as equal.
    values: Floats = score.reshape(-1).to("cpu", torch.float32).numpy()
    return values


def _total(pieces: Sequence[Any]) -> tuple[npt.NDArray[np.int64], int]:
    histogram, positive = np.zeros(1 << _LOW_BITS, np.int64), 0
    for piece in pieces:
        if piece is not None:
            (upper, counts), nonzero = piece
            histogram[upper] += counts
            positive += int(nonzero)
    return histogram, positive


def _bucket(histogram: npt.NDArray[np.int64], k: int) -> Cut | _Bucket:
    if k <= 0:
        return NONE
    if not histogram.any():  # nothing needed to be counted, because nothing is cut off
        return ALL
    from_top = np.cumsum(histogram[::-1])
    at = int(np.searchsorted(from_top, k))
    upper = len(histogram) - 1 - at
    return _Bucket(upper, k - int(from_top[at] - histogram[upper]))


def _inside(values: Floats, bucket: _Bucket) -> tuple[Floats, npt.NDArray[np.int64]]:
    """The distinct values in a bucket, ascending, and how often each occurs."""
    low, high = (np.array([b << _LOW_BITS], np.uint32).view(np.float32)[0] for b in (bucket.upper, bucket.upper + 1))
    # Differences of 16-bit numbers have few digits: many are the bucket's first value, so these are only counted.
    first = np.count_nonzero(values == low)
    rest, counts = np.unique(values[(values > low) & (values < high)], return_counts=True)
    return np.concatenate([[low], rest]).astype(np.float32), np.concatenate([[first], counts])


def _cut(pieces: Sequence[Any], begins: Sequence[int], bucket: _Bucket) -> Cut:
    values, where = np.unique(np.concatenate([piece[0] for piece in pieces]), return_inverse=True)
    counts = np.zeros(len(values), np.int64)
    np.add.at(counts, where, np.concatenate([piece[1] for piece in pieces]))
    from_top = np.cumsum(counts[::-1])
    at = len(values) - 1 - int(np.searchsorted(from_top, bucket.rank))
    value, here = values[at], int(counts[at])
    equals = bucket.rank - int(from_top[len(values) - 1 - at] - here)
    if equals == here:
        return Cut(float(value))
    each = [int(piece[1][piece[0] == value].sum()) for piece in pieces]
    return Cut(float(value), equals, dict(zip(begins, accumulate(each, initial=0), strict=False)))
