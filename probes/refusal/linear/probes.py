"""Linear probes, one for each layer: weights, biases and metrics, their scores of states, and their file format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from surgery.checkpoint.safetensors_header import read_header
from surgery.checkpoint.tensor_file import load_tensors
from surgery.errors import SurgeryError, usage_error
from surgery.evaluation.statistics import EstimateWithInterval
from surgery.io.atomic import atomic_replace, disk_error
from surgery.io.escaping import json_text
from surgery.io.json_fields import COUNT, NUMBER, TABLE, TABLES, TEXTS, check_fields, shown
from surgery.io.json_io import jsonable, parse_json

SCHEMA = 1
RECORD = "probes"

_TENSORS: dict[str, tuple[str | None, int]] = {
    "weights": ("F32", 2),
    "biases": ("F32", 1),
    "out_of_fold": ("F32", 2),
    "fold": ("I64", 1),
    "fold_weights": ("F32", 3),
    "fold_biases": ("F32", 2),
}
_KINDS = {
    "metrics": TABLES,
    "folds": COUNT,
    **dict.fromkeys(("C", "seed"), NUMBER),
    "counts": TABLE,
    "notes": TEXTS,
    "about": TABLE,
}


@dataclass(frozen=True)
class LayerMetrics:
    """Metrics of one layer's probe on examples that it was not fitted to.

    auroc: over the scores of all folds together, with its 95 % interval by bootstrap over groups. That resamples
        examples, not trainings, so it is somewhat narrow: on 80 examples of pure noise it covers 0.5 in 84 to 88 % of
        cases.
    accuracy: at p = 0.5, with Wilson's 95 % interval, which treats examples as independent: with large groups it is
        too narrow. balanced_accuracy: the mean of the two classes' recalls.
    ece: expected calibration error over ten bins of equal width. brier: mean squared error of p. Both are weighted as
        in training, so that refused and complied examples weigh the same.
    shuffled: mean AUROC of probes trained and tested in the same way on permuted labels. selectivity: auroc −
        shuffled, what the probe finds beyond what it could memorise. None where it was not measured.
    """

    auroc: float
    auroc_low: float
    auroc_high: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    balanced_accuracy: float
    ece: float
    brier: float
    shuffled: float | None = None
    selectivity: float | None = None

    @property
    def auroc_interval(self) -> EstimateWithInterval:
        """AUROC with its interval."""
        return EstimateWithInterval(self.auroc, self.auroc_low, self.auroc_high)


@dataclass(frozen=True, eq=False)
class Probes:
    """One linear probe for each layer.

    weights: (layers, D) fp32, and biases: (layers,) fp32, both for raw states.
    metrics: for each layer, on held-out examples.
    out_of_fold: (N, layers) fp32, p(refused) of each training example by the probe that was not fitted to its group.
    fold: (N,) int64, the fold that each example was held out in; folds: their number.
    fold_weights, fold_biases: (folds, layers, D) and (folds, layers) fp32, the probes that were not fitted to a fold.
    counts: cell → number of training examples.
    notes: sentences on where training differs from what was requested.
    about: other metadata to store, such as the model and hashes.
    """

    weights: Tensor
    biases: Tensor
    metrics: tuple[LayerMetrics, ...]
    out_of_fold: Tensor
    fold: Tensor
    folds: int
    fold_weights: Tensor
    fold_biases: Tensor
    counts: Mapping[str, int]
    C: float
    seed: int
    notes: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def logits(self, states: Tensor) -> Tensor:
        """Return w·h + b: states (…, layers, D) of any float dtype → (…, layers) fp32, summed in fp64.

        Raises:
            SurgeryError: the states have other layers or another width.
        """
        layers, width = self.weights.shape
        if states.ndim < 2 or tuple(states.shape[-2:]) != (layers, width):
            raise SurgeryError(
                f"the probes are for {layers} layers of {width} numbers, the states have the shape "
                f"{list(states.shape)}",
                hint="Use probes and states of one model, at the same layers.",
            )
        weights, biases = self.weights.to(states.device).double(), self.biases.to(states.device).double()
        # Layer by layer: all states in fp64 at once would take up to four times their own memory.
        columns = [states[..., at, :].double() @ weights[at] + biases[at] for at in range(layers)]
        return torch.stack(columns, dim=-1).float()

    def scores(self, states: Tensor) -> Tensor:
        """Return p(refused) = σ(w·h + b): states (…, layers, D) → (…, layers) fp32. Raises as `logits`."""
        return torch.sigmoid(self.logits(states).double()).float()

    def save(self, path: Path) -> Path:
        """Write a safetensors file atomically, and return `path`.

        Tensors: weights, biases, out_of_fold, fold, fold_weights, fold_biases. The metadata has one entry, "probes": a
        JSON object with the schema's version (`schema`) and all other fields.

        Raises:
            SurgeryError: the file cannot be written.
        """
        record = {
            "schema": SCHEMA,
            "metrics": self.metrics,
            "folds": self.folds,
            "counts": self.counts,
            "C": self.C,
            "seed": self.seed,
            "notes": self.notes,
            "about": self.about,
        }
        tensors = {
            "weights": self.weights,
            "biases": self.biases,
            "out_of_fold": self.out_of_fold,
            "fold": self.fold,
            "fold_weights": self.fold_weights,
            "fold_biases": self.fold_biases,
        }
        metadata = {RECORD: json_text(json.dumps(jsonable(record), ensure_ascii=False))}
        try:
            with atomic_replace(path) as temporary:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise disk_error(error, path) from error
        return path

    @classmethod
    def load(cls, path: Path) -> Probes:
        """Read a file that `save` wrote.

        Raises:
            SurgeryError: the file cannot be read, is no file of probes, or has another schema.
        """
        record = _read_record(path)
        if record["schema"] != SCHEMA:
            raise usage_error(
                f"holds probes of schema {shown(record['schema'])}, expected {SCHEMA}",
                where=path,
                hint="Train them again with this version.",
            )
        check_fields(record, _KINDS, where=path)
        tensors = load_tensors(path, _TENSORS, hint="Train them again.")
        try:
            probes = cls(
                tensors["weights"],
                tensors["biases"],
                tuple(LayerMetrics(**row) for row in record["metrics"]),
                tensors["out_of_fold"],
                tensors["fold"],
                record["folds"],
                tensors["fold_weights"],
                tensors["fold_biases"],
                record["counts"],
                record["C"],
                record["seed"],
                tuple(record["notes"]),
                record["about"],
            )
            # A file that another tool wrote may have tensors that do not belong together.
            layers = probes.weights.shape[0]
            consistent = probes.weights.ndim == 2 and probes.biases.shape == (layers,) and len(probes.metrics) == layers
        except (KeyError, TypeError, IndexError) as error:
            raise usage_error(f"its record of probes is incomplete ({error})", where=path) from error
        if not consistent:
            raise usage_error("its weights, biases and metrics are not of the same layers", where=path)
        return probes


def _read_record(path: Path) -> dict[str, Any]:
    """Return the record in the metadata of a file of probes, of whatever schema. Raises SurgeryError."""
    metadata = read_header(path).metadata
    record = parse_json(metadata[RECORD].encode(), where=path) if RECORD in metadata else None
    if not isinstance(record, dict) or "schema" not in record:
        raise usage_error("is not a file of refusal probes", where=path, hint="`surgery probe refusal` writes one.")
    return record
