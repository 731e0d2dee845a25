"""Report a merge model by model: distance from the base and from the result, and how much of it was kept."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merges.config.settings import MethodSpec, ParameterSpec, as_written
from merges.plan import MergedTensor
from surgery.engine.result import ExecutionResult
from surgery.reporting.report import Column, Figure, Table


def methods_table(specs: Iterable[MethodSpec]) -> Table:
    """Return the merge methods: parameters with their defaults (those without one are required), and sources."""

    def signature(parameter: ParameterSpec) -> str:
        default = "" if parameter.default is None else f"={as_written(parameter.default)}"
        return f"{parameter.name}{'*' if parameter.per_model else ''}{default}"

    rows = [
        (
            s.name,
            s.base if s.base != "none" else None,
            ", ".join(map(signature, s.parameters)),
            s.summary,
            s.paper or None,
        )
        for s in specs
    ]
    return Table(
        "Merge methods",
        ["method", "base", "parameters", "what it does", "source"],
        rows,
        note="*: one value per model. A list is a gradient over depth, a list of {filter, value} chooses by name.",
    )


@dataclass(frozen=True)
class ModelShare:
    """One merged model.

    Args:
        weight: the mean over its tensors; None where the method has no weights.
        norm: ‖x‖.
        update: ‖x − base‖/‖base‖; None without a base.
        kept: share of its elements that the method let through.
        distance: ‖OUT − x‖/‖x‖, OUT as stored.
        layers: the same per part of the model.
    """

    model: str
    weight: float | None
    norm: float
    update: float | None
    kept: float
    distance: float
    layers: Mapping[str, float]


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge: the method computed `merged` of `tensors` tensors; the rest are copies."""

    out: Path
    method: str
    preflight: Mapping[str, str]
    warnings: Sequence[str]
    merged: int
    tensors: int
    models: Sequence[ModelShare] = ()
    resumed_bytes: int = 0
    dry_run: bool = False

    def summary(self) -> dict[str, Any]:
        """Return the manifest's report, which does not depend on where, and in how many runs, the job was done."""
        return {"method": self.method, "merged": self.merged, "tensors": self.tensors, "models": list(self.models)}

    def table(self) -> Table:
        """Return a table with one row per model."""
        return Table(
            "What went into the merge",
            [
                Column("model"),
                Column("weight", "number"),
                Column("‖x‖", "number"),
                Column("‖x−base‖/‖base‖", "percent"),
                Column("kept", "percent"),
                Column("‖OUT−x‖/‖x‖", "percent"),
            ],
            [(m.model, m.weight, m.norm, m.update, m.kept, m.distance) for m in self.models],
            note="kept: share of the model's elements that the method let through.",
        )

    def figure(self) -> Figure:
        """Return a figure of the result's distance from each model, layer by layer."""
        from surgery.reporting.plots import plot_distances

        # In the order of the layers; models of other slices may lack some of them, which leaves a gap in their line.
        groups = list(dict.fromkeys(group for share in self.models for group in share.layers))
        names = _short([share.model for share in self.models])
        series = {name: [m.layers.get(group) for group in groups] for name, m in zip(names, self.models, strict=True)}
        return plot_distances(f"How far the merge is from each model ({self.method})", groups, series)


def with_result(report: MergeReport, merged: Iterable[MergedTensor], result: ExecutionResult) -> MergeReport:
    """Return `report` with the numbers measured in `result`."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    layers: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    weights: dict[str, list[float]] = defaultdict(list)
    # Sums of squares, not norms, are added over tensors: the norm of a whole model is the root of their sum.
    for tensor in merged:
        measured = result.sums.get(tensor.planned.name, {})
        for i, model in enumerate(tensor.models):
            if f"squares.{i}" not in measured:
                continue  # a copy: nothing was computed, so nothing was measured
            own = sums[model]
            for what in ("squares", "distance", "update", "kept"):
                own[what] += measured.get(f"{what}.{i}", 0.0)
            own["base"] += measured.get("base", 0.0)
            own["based"] += tensor.based
            own["elements"] += math.prod(tensor.planned.shape)
            layers[model][tensor.group][0] += measured[f"distance.{i}"]
            layers[model][tensor.group][1] += measured[f"squares.{i}"]
            if tensor.weights:
                weights[model].append(tensor.weights[i])
    shares = [
        ModelShare(
            model,
            math.fsum(weights[model]) / len(weights[model]) if weights[model] else None,
            math.sqrt(own["squares"]),
            _ratio(own["update"], own["base"]) if own["based"] else None,
            own["kept"] / own["elements"] if own["elements"] else 1.0,
            _ratio(own["distance"], own["squares"]),
            {group: _ratio(*pair) for group, pair in layers[model].items()},
        )
        for model, own in sums.items()
    ]
    return replace(report, models=shares, resumed_bytes=result.resumed_bytes)


def _short(refs: Sequence[str]) -> list[str]:
    """Shorten references to the fewest last parts that tell them apart."""
    parts = [ref.rstrip("/").split("/") for ref in refs]
    for n_parts in range(1, max(map(len, parts), default=0)):
        names = ["/".join(part[-n_parts:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(refs)


def _ratio(above: float, below: float) -> float:
    """Return √(above/below); 0 where both are 0."""
    # Relative to a model of zeros every change is infinite; two of them do not differ at all.
    return math.sqrt(above / below) if below else (math.inf if above else 0.0)
