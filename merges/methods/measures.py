"""What every merge measures of its models while it writes: norms, distances, and how much of each was kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.plan import Place, Sums

KEPT = "kept"  # in `Place.known`: per model, how many of its elements the method let through


@dataclass(frozen=True)
class Measures:
    """Sums over a merged tensor, per model: Σx², Σδ² (with a base), Σ(out − x)², elements kept; and Σ base².

    Args:
        models: how many there are, the base not counted.
        based: whether a base is the first input.
    """

    models: int
    based: bool

    @property
    def names(self) -> tuple[str, ...]:
        """What `measure` returns, in its order."""
        per_model = [f"{what}.{i}" for i in range(self.models) for what in self._kinds]
        return (*(("base",) if self.based else ()), *per_model)

    def measure(self, tensors: Sequence[Tensor], stored: Tensor, place: Place, **_: object) -> Sums:
        """The sums over one piece; `stored` is the merged, rounded piece."""
        base, models = (tensors[0], tensors[1:]) if self.based else (None, tensors)
        count = torch.Size(place.shape).numel()
        kept = place.known.get(KEPT)
        sums: list[Tensor | float] = [] if base is None else [torch.dot(base, base)]
        for i, model in enumerate(models):
            away = stored - model
            sums += [torch.dot(model, model), torch.dot(away, away)]
            if base is not None:
                update = model - base
                sums.append(torch.dot(update, update))
            sums.append(stored.numel() if kept is None else kept[i] * stored.numel() / count)
        return sums

    @property
    def _kinds(self) -> tuple[str, ...]:
        return ("squares", "distance", "update", "kept") if self.based else ("squares", "distance", "kept")
