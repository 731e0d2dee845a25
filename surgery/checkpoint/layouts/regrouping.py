"""Find, for the fused or separate matrices of one model, those of another that holds them in another layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from surgery.checkpoint.layouts.canonical_names import CanonicalNames
from surgery.checkpoint.layouts.fused_matrices import (
    ExpertLayout,
    expert_layouts,
    expert_of,
    fused_names,
    rows_of,
    stacked_parts,
)
from surgery.checkpoint.layouts.tensor_views import PLAIN_FLOATS, concatenated, zeros_like
from surgery.checkpoint.stored_tensor import StoredTensor


@dataclass(frozen=True)
class NamedTensors:
    """The tensors of a model and their names.

    absent: names of tensors that are zero and not stored (of a task vector). hidden: the width of the residual stream.
    """

    ref: str
    tensors: Mapping[str, StoredTensor]
    absent: frozenset[str]
    names: CanonicalNames
    hidden: int | None

    @cached_property
    def canonical(self) -> dict[str, StoredTensor]:
        """Canonical name → tensor."""
        stored = self.names.stored
        return {text: self.tensors[name] for text, name in stored.items() if name in self.tensors}

    @cached_property
    def zero(self) -> frozenset[str]:
        """The canonical names of the absent ones."""
        return frozenset(text for text, name in self.names.stored.items() if name in self.absent)

    @cached_property
    def expert_layouts(self) -> dict[str, ExpertLayout]:
        """Canonical name → layout, of the tensors of experts."""
        return expert_layouts(self.canonical, self.hidden)

    @cached_property
    def expert_counts(self) -> dict[str, int]:
        """Block of experts → their number, where a tensor or a name tells it."""
        counts: dict[str, int] = {}
        places = [(one.block, one.first + (one.count or 1)) for one in self.expert_layouts.values()]
        places += [(place[0], place[1] + 1) for name in self.zero if (place := expert_of(name)) is not None]
        for block, count in places:
            counts[block] = max(counts.get(block, 0), count)
        return counts


@dataclass
class Regrouping:
    """What one model's tensors are made of in the other.

    tensors: name in the reference → the tensor, or None where all of it is zero.
    used: the names of the tensors that they are made of.
    problems: why others could not be made.
    """

    tensors: dict[str, StoredTensor | None] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Matrix:
    """A matrix of `own`: its tensor, or None if it is zero, and the name of the stored tensor that it is in."""

    tensor: StoredTensor | None
    holder: str


@dataclass(frozen=True)
class _Made:
    """A tensor in the reference's layout, or None if it is zero, and the matrices in it, with their canonical names."""

    tensor: StoredTensor | None
    keys: Sequence[str]
    pieces: Sequence[_Matrix]


def regroup_experts(own: NamedTensors, theirs: NamedTensors) -> Regrouping:
    """Make the reference's tensors of experts that `own` stores in another layout."""
    result = Regrouping()
    own_layouts, their_layouts = own.expert_layouts, theirs.expert_layouts
    wanted = {name: layout for name, layout in their_layouts.items() if own_layouts.get(name) != layout}
    # Where all is stored alike, or only under another name, nothing has to be made.
    wanted = {name: layout for name, layout in wanted.items() if name not in own.zero}
    matrices = _Matrices(own, own_layouts)
    made: dict[str, _Made] = {}
    for name, layout in wanted.items():
        pieces = _pieces(name, layout, matrices, own, theirs, result.problems)
        if pieces is not None:
            tensor, possible = _make(pieces, layout, theirs.canonical[name].shape)
            if possible:
                made[theirs.names.stored[name]] = _Made(tensor, layout.keys, pieces)
    for name in theirs.zero - own.zero - own.canonical.keys():
        # What the reference knows to be zero has no shape there; an expert's matrix has its own.
        if expert_of(name) is not None and (matrix := matrices.get(name)) is not None:
            made[theirs.names.stored[name]] = _Made(matrix.tensor, [name], [matrix])
    made = _without_remainders(made, own, own_layouts)
    result.tensors = {place: one.tensor for place, one in made.items()}
    result.used = {piece.holder for one in made.values() for piece in one.pieces}
    return result


def regroup_rows(own: NamedTensors, theirs: NamedTensors, wanted: Sequence[str], free: set[str]) -> Regrouping:
    """Make dense tensors that hold the rows of several matrices, or those matrices.

    Args:
        wanted: names in `theirs` that have no partner. free: names in `own` that are none's.
    """
    result = Regrouping()
    open_names = {theirs.names.by_name[name]: name for name in wanted if name in theirs.names.by_name}
    free_names = {own.names.by_name[name]: name for name in free if name in own.names.by_name}
    for canonical, name in open_names.items():
        parts = stacked_parts(canonical)
        if not parts or name not in theirs.tensors or not all(part in free_names for part in parts):
            continue
        found = [own.tensors.get(free_names[part]) for part in parts]
        shape = theirs.tensors[name].shape
        made = _joined_rows(found, shape)
        if made is not None or all(part in own.zero for part in parts):
            result.tensors[name] = made
            result.used |= {free_names[part] for part in parts}
    for canonical, name in free_names.items():
        parts = stacked_parts(canonical)
        if not parts or not all(part in open_names for part in parts):
            continue
        places = [open_names[part] for part in parts]
        if canonical in own.zero:
            result.tensors.update(dict.fromkeys(places))
        else:
            cut = _cut_rows(own.tensors[name], [theirs.tensors.get(place) for place in places])
            if cut is None:
                continue
            result.tensors.update(zip(places, cut, strict=True))
        result.used.add(name)
    return result


class _Matrices:
    """The matrices of the experts in a model, by canonical name."""

    def __init__(self, own: NamedTensors, layouts: Mapping[str, ExpertLayout]) -> None:
        self._own = own
        self._stored: dict[str, _Matrix] = {}
        for name, layout in layouts.items():
            holder = own.names.stored[name]
            for key, tensor in layout.take_apart(own.canonical[name]).items():
                self._stored[key] = _Matrix(tensor, holder)

    def get(self, key: str) -> _Matrix | None:
        """Return a matrix, which may be zero, or None where there is no such."""
        if key in self._stored:
            return self._stored[key]
        # Of a fused tensor that is zero nothing says how many experts it has: as many as are asked for.
        zero = next((name for name in (key, *fused_names(key)) if name in self._own.zero), None)
        return None if zero is None else _Matrix(None, self._own.names.stored[zero])


def _pieces(
    name: str,
    layout: ExpertLayout,
    matrices: _Matrices,
    own: NamedTensors,
    theirs: NamedTensors,
    problems: list[str],
) -> list[_Matrix] | None:
    """Return the matrices for the reference's tensor `name`; None, with the reason in `problems`, if it is another."""
    place = theirs.names.stored[name]
    n_own, n_theirs = (one.expert_counts.get(layout.block) for one in (own, theirs))
    if n_own is not None and n_own != n_theirs:
        problems.append(f'"{place}" is of {n_theirs} experts in {theirs.ref}, of {n_own} in {own.ref}.')
        return None
    pieces = [one for key in layout.keys if (one := matrices.get(key)) is not None]
    if len(pieces) < len(layout.keys):
        return None
    shape = next((t.shape for one in pieces if (t := one.tensor) and t.shape != layout.matrix_shape), None)
    if shape is not None:
        expected = list(layout.matrix_shape)
        problems.append(f'"{place}" is of matrices {expected} in {theirs.ref}, {list(shape)} in {own.ref}.')
        return None
    return pieces


def _make(pieces: Sequence[_Matrix], layout: ExpertLayout, shape: tuple[int, ...]) -> tuple[StoredTensor | None, bool]:
    """Return the tensor of `layout` made of `pieces`, None if all are zero; and whether their dtypes can be joined."""
    present = next((piece.tensor for piece in pieces if piece.tensor is not None), None)
    if present is None:
        return None, True
    tensors = [zeros_like(present, layout.matrix_shape) if one.tensor is None else one.tensor for one in pieces]
    made = layout.put_together(tensors, shape)
    return made, made is not None


def _without_remainders(
    made: dict[str, _Made], own: NamedTensors, layouts: Mapping[str, ExpertLayout]
) -> dict[str, _Made]:
    """Return `made` without what is cut out of tensors of which another part has no place: those stay as they are."""
    while True:
        taken = {key for one in made.values() for key in one.keys}
        kept = {own.names.stored[name] for name, layout in layouts.items() if not taken.issuperset(layout.keys)}
        rest = {place: one for place, one in made.items() if not any(piece.holder in kept for piece in one.pieces)}
        if len(rest) == len(made):
            return made
        made = rest


def _joined_rows(found: Sequence[StoredTensor | None], shape: tuple[int, ...]) -> StoredTensor | None:
    """Return a tensor of `shape` with the rows of `found` one below the other; None stands for rows of zeros."""
    present = [tensor for tensor in found if tensor is not None]
    if not present or any(tensor.shape[1:] != shape[1:] for tensor in present):
        return None
    missing = len(found) - len(present)
    left = shape[0] - sum(tensor.shape[0] for tensor in present)
    if left < 0 or (left > 0) != (missing > 0):
        return None
    rows = [0 if tensor is None else tensor.shape[0] for tensor in found]
    if missing == 1:
        rows[found.index(None)] = left
    elif missing:
        # Of queries, keys and values two did not move. Keys have as many rows as values.
        keys = max(rows[1:]) or left // 2
        rows = [rows[0] or left - keys, keys, keys]
        if sum(rows) != shape[0]:
            return None
    pieces = [
        zeros_like(present[0], (count, *shape[1:])) if tensor is None else tensor
        for tensor, count in zip(found, rows, strict=True)
    ]
    return concatenated(pieces, shape)


def _cut_rows(tensor: StoredTensor, places: Sequence[StoredTensor | None]) -> list[StoredTensor] | None:
    """Return the rows of `tensor` as tensors of the shapes of `places`; None where they are not exactly those."""
    shapes = [place.shape for place in places if place is not None]
    if tensor.dtype not in PLAIN_FLOATS:
        return None
    fits = all(shape[1:] == tensor.shape[1:] for shape in shapes)
    if len(shapes) < len(places) or not fits or sum(shape[0] for shape in shapes) != tensor.shape[0]:
        return None
    firsts = [sum(shape[0] for shape in shapes[:number]) for number in range(len(shapes))]
    return [rows_of(tensor, first, shape) for first, shape in zip(firsts, shapes, strict=True)]
