"""Measure the models of a merge while it is written: norms, distances, and how much of each was kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.checkpoint.dtypes import n_elements
from surgery.engine.kernel import Kernel, Pass, Sums, TensorSlice

KEPT = "kept"  # in `TensorSlice.pass_results`: per model, how many of its elements the method kept

Count = Callable[..., Tensor | float]


@dataclass(frozen=True)
class Measures:
    """Sums over a merged tensor, per model: Σx², Σδ² (with a base), Σ(out − x)², elements kept; and Σ base².

    Args:
        models: how many there are, the base not counted.
        based: whether a base is the first input.
        count: `count(delta, i, place, **params)` → how many elements of a piece of δᵢ (1-D, may be overwritten) are
            kept, for methods with a base that can tell piece by piece. Without it the count is taken from
            `TensorSlice.pass_results`; where that has none, all are.
    """

    models: int
    based: bool
    count: Count | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sums that `measure` returns, in its order."""
        kinds = ("squares", "distance", "update", "kept") if self.based else ("squares", "distance", "kept")
        per_model = [f"{kind}.{i}" for i in range(self.models) for kind in kinds]
        return (*(("base",) if self.based else ()), *per_model)

    def measure(self, tensors: Sequence[Tensor], stored: Tensor, place: TensorSlice, **params: Any) -> Sums:
        """Return the sums over one piece; `stored` is the merged, rounded piece."""
        base, models = (tensors[0], tensors[1:]) if self.based else (None, tensors)
        # Passes count over the whole tensor; each piece reports its share, and the shares add up to the count.
        share = stored.numel() / max(n_elements(place.shape), 1)
        kept: Tensor | float
        sums: list[Tensor | float] = [] if base is None else [torch.dot(base, base)]
        for i, model in enumerate(models):
            kept = place.pass_results[KEPT][i] * share if KEPT in place.pass_results else stored.numel()
            # From the stored values, so that the distance includes what rounding to the output's dtype adds.
            away = stored - model
            sums += [torch.dot(model, model), torch.dot(away, away)]
            if base is not None:
                update = model - base
                sums.append(torch.dot(update, update))
                # Last, as it may overwrite the update.
                if self.count is not None:
                    kept = self.count(update, i, place, **params)
            sums.append(kept)
        return sums


def measured_kernel(
    name: str,
    fn: Callable[..., Tensor],
    models: int,
    *,
    based: bool,
    rows: bool = False,
    passes: tuple[Pass, ...] = (),
    count: Count | None = None,
) -> Kernel:
    """Return a merge method's kernel, which measures its models. The other arguments are those of `Kernel`."""
    measures = Measures(models, based, count)
    return Kernel(
        name,
        fn,
        kind="rows" if rows else "elementwise",
        measures=measures.names,
        measure=measures.measure,
        takes_slice=True,
        passes=passes,
    )
