"""Compare two models, or several task vectors, tensor by tensor and layer by layer."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.layouts.layout_view import seen_as
from surgery.checkpoint.quantised.quantisation import find_quantisation
from surgery.checkpoint.reader import SourceFiles, TensorReader
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.checkpoint.structure import model_structure
from surgery.engine.config_differences import compared_configs
from surgery.engine.options import ExecutionOptions
from surgery.engine.preflight import Preflight, check_quantised
from surgery.engine.reduce import reduce_tensors
from surgery.errors import SurgeryError, SurgeryWarning, listing, usage_error
from surgery.reporting.plots import plot_layer_changes, plot_similarity
from surgery.reporting.report import Column, Figure, Table
from surgery.vectors.task_vector import TaskVector, open_vector


@dataclass(frozen=True)
class TensorDifference:
    """The distance of B from A, over one tensor or a group of them.

    relative: ‖A−B‖/‖A‖ (inf where A is zero and B is not). cosine: of A and B as vectors, NaN where one is zero.
    changed: share of elements whose values differ, in [0, 1]. norm: ‖A−B‖.
    """

    name: str
    relative: float
    cosine: float
    changed: float
    norm: float
    elements: int


@dataclass(frozen=True)
class DiffReport:
    """Differences per tensor, per group ("layer 3", "embed", …, in the order of the model) and as a whole.

    only_a, only_b, reshaped: names that could not be compared. other_names: what of B is seen under names of A.
    configs: in what else the models differ, as sentences.
    """

    a: str
    b: str
    tensors: Sequence[TensorDifference]
    groups: Sequence[TensorDifference]
    whole: TensorDifference
    only_a: Sequence[str]
    only_b: Sequence[str]
    reshaped: Sequence[str]
    other_names: str | None = None
    configs: Sequence[str] = ()

    def tables(self, top: int = 20) -> list[Table]:
        """Return the differences per part of the model, and of the `top` tensors that differ most."""
        most = sorted(self.tensors, key=lambda d: (-d.relative, d.name))[:top]
        left_out = [
            (what, names)
            for what, names in (
                (f"only in {self.a}", self.only_a),
                (f"only in {self.b}", self.only_b),
                ("of different shape", self.reshaped),
            )
            if names
        ]
        note = f"{self.b}: {self.other_names}" if self.other_names else None
        tables = [_table(f"{self.b} against {self.a}", "part", [*self.groups, self.whole], note)]
        tables += (
            [_table(f"The {len(most)} of {len(self.tensors)} tensors that moved most", "tensor", most)] if most else []
        )
        if left_out:
            rows = [(what, len(names), listing(names)) for what, names in left_out]
            tables.append(Table("Not compared", ["why", "tensors", "names"], rows))
        return tables

    def figure(self) -> Figure:
        """Return a bar per part of the model: ‖A−B‖/‖A‖."""
        return plot_layer_changes(
            f"{self.b} against {self.a}", [g.name for g in self.groups], [g.relative for g in self.groups]
        )


@dataclass(frozen=True)
class Similarity:
    """Cosine of each pair of vectors and norm of each, over one group of tensors; NaN where a vector is zero."""

    name: str
    cosines: Mapping[tuple[int, int], float]
    norms: Sequence[float]


@dataclass(frozen=True)
class CompareReport:
    """`vectors` as typed; similarities per group and as a whole, over the tensors that any of them moved.

    configs: in what the models differ that they were extracted from, as sentences.
    """

    vectors: Sequence[str]
    groups: Sequence[Similarity]
    whole: Similarity
    configs: Sequence[str] = ()

    def table(self) -> Table:
        """Return the cosines of all pairs and the norms, per part of the model."""
        pairs = list(self.whole.cosines)
        columns = [
            Column("part"),
            *(Column(f"cos({i + 1}, {j + 1})", "score") for i, j in pairs),
            *(Column(f"‖v{i + 1}‖", "number") for i in range(len(self.vectors))),
        ]
        rows: list[list[str | float]] = [
            [s.name, *(s.cosines[pair] for pair in pairs), *s.norms] for s in (*self.groups, self.whole)
        ]
        return Table("Similarity of task vectors", columns, rows, note=self._legend())

    def figure(self) -> Figure:
        """Return the cosines of all pairs, along the model."""
        return plot_similarity(
            "Similarity of task vectors",
            [s.name for s in self.groups],
            {f"{i + 1} · {j + 1}": [s.cosines[i, j] for s in self.groups] for i, j in self.whole.cosines},
            caption=self._legend(),
        )

    def _legend(self) -> str:
        return "; ".join(f"{i + 1}: {vector}" for i, vector in enumerate(self.vectors))


def diff(a: str, b: str, *, dequantise: bool = False, options: ExecutionOptions = ExecutionOptions()) -> DiffReport:
    """Compare two models tensor by tensor.

    Example:
        print(surgery.diff("lab:sft", "lab:grpo").whole)

    Args:
        dequantise: see models in FP8 with scales, or in MXFP4, as bf16. Otherwise stored codes are compared, which a
            `SurgeryWarning` tells.

    Raises:
        SurgeryError: one of them cannot be read, or they have no tensor in common.
    """
    left, other = (open_checkpoint(ref, dequantise=dequantise) for ref in (a, b))
    for model in (left, other):
        _warn_of_codes(model)
    view = seen_as(other, left)
    right = view.checkpoint
    common = [name for name in left.tensors if name in right.tensors]
    reshaped = [name for name in common if left.tensors[name].shape != right.tensors[name].shape]
    pairs = {name: (left.tensors[name], right.tensors[name]) for name in common if name not in set(reshaped)}
    if not pairs:
        raise SurgeryError(
            f"no tensor of {b} has the name and shape of one of its own (it has {listing(left.tensors, 3)})",
            where=a,
        )
    # Values are compared as floats where both sides store floats, of whatever dtypes; all else byte by byte.
    floats = {name: pair for name, pair in pairs.items() if all(tensor.is_float for tensor in pair)}
    sums = reduce_tensors(floats, _pair_sums, label="Comparing", threads=options.threads, progress=options.progress)
    rows = {name: (values or [0.0] * 5, floats[name][0].n_elements) for name, values in sums.items()}
    rows |= {name: _equal_or_not(pair) for name, pair in pairs.items() if name not in floats}
    groups = model_structure(left).grouped(pairs)
    return DiffReport(
        a,
        b,
        [_difference(name, [rows[name]]) for name in pairs],
        [_difference(group, [rows[n] for n in names]) for group, names in groups.items()],
        _difference("whole", list(rows.values())),
        [name for name in left.tensors if name not in right.tensors],
        [name for name in right.tensors if name not in left.tensors],
        reshaped,
        view.description,
        compared_configs([(a, left.config), (b, right.config)]),
    )


def compare(vectors: Sequence[str], *, options: ExecutionOptions = ExecutionOptions()) -> CompareReport:
    """Return cosine and norm of task vectors, per layer and as a whole; a tensor that a vector lacks counts as zero.

    Example:
        print(surgery.compare(["reasoning", "other-vector"]).table())

    Raises:
        SurgeryError: fewer than two vectors, or vectors of different shapes.
    """
    if len(vectors) < 2:
        raise usage_error(f"got {len(vectors)} vector, expected two or more", where="vector compare")
    opened = [open_vector(vector) for vector in vectors]
    preflight = Preflight()
    check_quantised(preflight, [vector.checkpoint for vector in opened])
    preflight.errors.raise_if_any("vector compare")
    opened = _in_one_layout(opened)
    holders: dict[str, list[int]] = defaultdict(list)
    for i, vector in enumerate(opened):
        for name in vector.checkpoint.tensors:
            holders[name].append(i)
    _check_shapes(opened, holders)
    jobs = {
        name: [opened[i].checkpoint.tensors[name] for i in vectors_with]
        for name, vectors_with in sorted(holders.items())
    }
    if not jobs:
        raise SurgeryError("all of them are zero", where=", ".join(vectors))
    sums = reduce_tensors(jobs, _gram, label="Comparing", threads=options.threads, progress=options.progress)
    dots = {name: _by_pair(holders[name], sums[name]) for name in jobs}
    # A vector stores only the tensors that changed: the model's structure is recognised from all vectors together.
    # Only names and shapes matter, which are the same in all vectors (see `_check_shapes`).
    union = {name: tensors[0] for name, tensors in jobs.items()}
    groups = model_structure(replace(opened[0].checkpoint, tensors=union)).grouped(jobs)
    count = len(opened)
    return CompareReport(
        list(vectors),
        [_similarity(group, [dots[n] for n in names], count) for group, names in groups.items()],
        _similarity("whole", list(dots.values()), count),
        compared_configs([(vector.ref, vector.checkpoint.config) for vector in opened]),
    )


def _warn_of_codes(model: Checkpoint) -> None:
    """Emit a `SurgeryWarning` where stored values are codes: whether they differ is known, but not by how much."""
    if (found := find_quantisation(model)) is not None:
        help_ = " --dequantise compares weights." if found.readable else ""
        text = f"{model.ref} is quantised ({found.scheme}): codes are compared, not weights.{help_}"
        warnings.warn(text, SurgeryWarning, stacklevel=3)


def _pair_sums(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    a, b = tensors
    difference = a - b
    changed = difference.bool().sum(dtype=torch.int32)
    return torch.dot(difference, difference), torch.dot(a, a), torch.dot(b, b), torch.dot(a, b), changed


def _gram(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [torch.dot(tensors[i], tensors[j]) for i in range(len(tensors)) for j in range(i, len(tensors))]


def _equal_or_not(pair: tuple[StoredTensor, StoredTensor]) -> tuple[list[float], int]:
    """Count the elements of a pair without a distance (integers and the like) whose bytes differ."""
    a, b = pair
    if a.dtype != b.dtype:
        return [0.0, 0.0, 0.0, 0.0, float(a.n_elements)], a.n_elements
    with SourceFiles([*a.files, *b.files]) as files:
        reader = TensorReader(files)
        left, right = (_bytes(reader, t, slot) for slot, t in enumerate(pair))
        # Bytes of one element, so that a change of several bytes counts once.
        width = max(1, left.numel() // max(1, a.n_elements))
        changed = (left.view(-1, width) != right.view(-1, width)).any(dim=1).sum().item()
    return [0.0, 0.0, 0.0, 0.0, float(changed)], a.n_elements


def _bytes(reader: TensorReader, tensor: StoredTensor, slot: int) -> Tensor:
    if tensor.derivation is None:
        return reader.raw(tensor, 0, tensor.n_elements, slot)
    return reader.tensor(tensor, 0, tensor.n_elements, slot).view(torch.uint8)


def _difference(name: str, rows: Sequence[tuple[Sequence[float], int]]) -> TensorDifference:
    squares, a, b, dot, changed = (math.fsum(values[i] for values, _ in rows) for i in range(5))
    elements = sum(count for _, count in rows)
    relative = math.sqrt(squares / a) if a else (math.inf if squares else 0.0)
    cosine = dot / math.sqrt(a * b) if a and b else math.nan
    share = changed / elements if elements else 0.0
    # Rounding can give a quotient just beyond ±1, which is no cosine.
    return TensorDifference(
        name, relative, min(1.0, max(-1.0, cosine)) if a and b else cosine, share, math.sqrt(squares), elements
    )


def _table(title: str, what: str, rows: Sequence[TensorDifference], note: str | None = None) -> Table:
    columns = [
        Column(what),
        Column("‖A−B‖/‖A‖", "percent"),
        Column("cosine", "number"),
        Column("changed", "percent"),
        Column("elements", "count"),
    ]
    return Table(title, columns, [(r.name, r.relative, r.cosine, r.changed, r.elements) for r in rows], note=note)


def _in_one_layout(vectors: Sequence[TaskVector]) -> list[TaskVector]:
    """Return all vectors with the names and the layout of the first."""
    first = vectors[0]
    views = [
        seen_as(vector.checkpoint, first.checkpoint, absent=vector.zero, reference_absent=first.zero)
        for vector in vectors
    ]
    return [
        replace(one, checkpoint=view.checkpoint, zero=view.absent) for one, view in zip(vectors, views, strict=True)
    ]


def _similarity(name: str, rows: Sequence[Mapping[tuple[int, int], float]], count: int) -> Similarity:
    def total(i: int, j: int) -> float:
        return math.fsum(row.get((i, j), 0.0) for row in rows)

    squares = [total(i, i) for i in range(count)]
    cosines = {
        (i, j): total(i, j) / math.sqrt(squares[i] * squares[j]) if squares[i] and squares[j] else math.nan
        for i, j in combinations(range(count), 2)
    }
    return Similarity(name, cosines, [math.sqrt(square) for square in squares])


def _by_pair(holders: Sequence[int], values: Sequence[float]) -> dict[tuple[int, int], float]:
    """Return the dot products of `_gram` by pair of vectors; `holders` are the vectors that have the tensor."""
    pairs = [(holders[i], holders[j]) for i in range(len(holders)) for j in range(i, len(holders))]
    return dict(zip(pairs, values or [0.0] * len(pairs), strict=True))


def _check_shapes(opened: Sequence[TaskVector], holders: Mapping[str, Sequence[int]]) -> None:
    for name, vectors in holders.items():
        shapes = {opened[i].checkpoint.tensors[name].shape for i in vectors}
        if len(shapes) > 1:
            raise SurgeryError(
                f'"{name}" has the shapes {listing(str(list(s)) for s in sorted(shapes))} in different vectors',
                where=listing(opened[i].ref for i in vectors),
                hint="Only vectors of one architecture can be compared.",
            )
