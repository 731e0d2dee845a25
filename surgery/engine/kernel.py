"""Kernels: the pure functions that compute output tensors, and the passes over the inputs that they need first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

# Nothing else may be a parameter: a plan's fingerprint is taken over these values as JSON.
Number = float | int | str | bool
Parameter = Number | None | tuple[Number, ...]  # a tuple has one entry per model
Sums = Sequence[Tensor | float]


def row_width(shape: Sequence[int]) -> int:
    """Return the number of elements in a row, at least 1; a vector is one row."""
    return max(shape[-1] if shape else 1, 1)


@dataclass(frozen=True)
class TensorSlice:
    """The piece of a tensor that a kernel is called on.

    tensor: name of the output tensor; random numbers are seeded by it.
    begin: index of the piece's first element.
    shape: of the whole tensor.
    pass_results: what the kernel's passes returned about the whole tensor.
    """

    tensor: str
    begin: int
    shape: tuple[int, ...]
    pass_results: Mapping[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Elements in a row of the tensor."""
        return row_width(self.shape)


@dataclass(frozen=True)
class Pass:
    """One streaming pass over a kernel's inputs, for what it must know about the whole tensor before it can run.

    Args:
        gather: `gather(tensors, place, **params)` → a small summary of the piece at `place`.
        reduce: `reduce(gathered, place, **params)` → entries to add to `place.pass_results`, computed from the
            summaries of all pieces in their order; `place` is the whole tensor, with the results of earlier passes.
    """

    gather: Callable[..., Any]
    reduce: Callable[..., Mapping[str, Any]]


@dataclass(frozen=True)
class Kernel:
    """A pure function of tensors and numbers: `fn(tensors, **params) -> Tensor`, without I/O or global state.

    Inputs arrive in fp32 (fp64 where one of them or the output is F64) on the job's device; the result is rounded once.

    Args:
        name: names the formula in plans and manifests, so changing the arithmetic changes the name.
        kind: "elementwise" kernels get 1-D pieces cut anywhere, the same from each input; "rows" kernels get pieces of
            whole rows, (rows, width), a vector being one row; "whole" kernels get full tensors in their shape, and may
            return a tuple, of which each planned tensor takes its `part`.
        measure: `measure(tensors, stored, **params)` → one number or 0-d tensor per name in `measures`: sums over the
            piece, where `stored` is the rounded result, back in the compute dtype. Added up over pieces in fp64.
        takes_slice: `fn` (and `measure`) take a `TensorSlice` after the tensors.
        passes: run in this order before `fn`, which must then take a slice; not for "whole" kernels.
    """

    name: str
    fn: Callable[..., Any]
    kind: Literal["elementwise", "rows", "whole"] = "elementwise"
    measures: tuple[str, ...] = ()
    measure: Callable[..., Sums] | None = None
    takes_slice: bool = False
    passes: tuple[Pass, ...] = ()


def identity(tensors: Sequence[Tensor]) -> Tensor:
    """Return the one input, x, as it is.   (…) → (…)"""
    return tensors[0]


# For tensors whose bytes cannot be copied: they change their dtype, or are computed on reading.
IDENTITY = Kernel("identity", identity)
