"""Take fused tensors apart into the matrices that they hold, and put such tensors together.

A layer's experts are stored one by one (`experts.3.gate_proj.weight`, (I, H)) or fused: gate and up projections of all
n as (n, 2·I, H), or as (n, H, 2·I) in models that compute x·W (Llama 4, Qwen3-VL); gpt-oss takes its gate and up
columns in turn. A dense layer may hold its gate and up projection, or queries, keys and values, one below the other.
All these forms are layouts of the same matrices, each of which has a canonical name of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surgery.checkpoint.layouts.tensor_views import PLAIN_FLOATS, concatenated, strided
from surgery.checkpoint.stored_tensor import StoredTensor

GATE_UP = ("gate_proj", "up_proj")
# Tensors of dense layers that hold several matrices one below the other → these.
STACKED_ROWS: dict[str, tuple[str, ...]] = {
    "gate_up_proj": GATE_UP,
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "conv1d": ("q_conv1d", "k_conv1d", "v_conv1d"),
}

# In canonical names; see `surgery.checkpoint.layouts.canonical_names`.
_ONE = re.compile(r"(?P<block>.+\.experts)\.(?P<index>[0-9]{1,6})\.(?P<part>[a-z_]+_proj)\.(?P<leaf>weight|bias)")
_FUSED = re.compile(r"(?P<block>.+\.experts)\.(?P<part>(gate_up|gate|up|down)_proj)(?P<bias>_bias)?")


@dataclass(frozen=True)
class ExpertLayout:
    """How a tensor holds matrices of experts (or their biases): those of `parts` of the experts `first` to `first` + n.

    count: n; None for a single expert's own tensor. rows, columns: of each matrix; columns is None for biases.
    transposed: matrices are (columns, rows). interleaved: rows of the parts take turns.
    """

    block: str
    parts: tuple[str, ...]
    leaf: str
    first: int
    count: int | None
    rows: int
    columns: int | None
    transposed: bool = False
    interleaved: bool = False

    @property
    def keys(self) -> list[str]:
        """The canonical names of the matrices, in the order of a fused tensor that is not interleaved."""
        return [
            f"{self.block}.{index}.{part}.{self.leaf}"
            for index in range(self.first, self.first + (self.count or 1))
            for part in self.parts
        ]

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of one matrix as it is stored alone."""
        return (self.rows,) if self.columns is None else (self.rows, self.columns)

    def take_apart(self, tensor: StoredTensor) -> dict[str, StoredTensor]:
        """Return the matrices by their canonical names."""
        if self.count is None:
            return {self.keys[0]: tensor}
        n_parts, width = len(self.parts), self.columns or 1
        step = n_parts if self.interleaved else 1  # rows from one of a matrix to its next
        row, column = (1, n_parts * self.rows) if self.transposed else (width, 1)
        matrices = {}
        for number, key in enumerate(self.keys):
            expert, part = divmod(number, n_parts)
            offset = expert * n_parts * self.rows * width + part * (1 if self.interleaved else self.rows) * row
            strides = (step * row,) if self.columns is None else (step * row, column)
            matrices[key] = strided(tensor, offset, self.matrix_shape, strides)
        return matrices

    def put_together(self, matrices: Sequence[StoredTensor], shape: Sequence[int]) -> StoredTensor | None:
        """Return a tensor of this layout made of `matrices`, in the order of `keys`; None if their dtypes forbid it."""
        if self.count is None:
            return matrices[0]
        n, n_parts, rows, width = self.count, len(self.parts), self.rows, self.columns or 1
        joined = concatenated(matrices, shape)
        if joined is None or not (self.transposed or self.interleaved):
            return joined
        # Axes of `joined` are (expert, part, row, column).
        expert, part, row, column = (
            (n, n_parts * rows * width),
            (n_parts, rows * width),
            (rows, width),
            (width, 1),
        )
        output_rows = (row, part) if self.interleaved else (part, row)
        axes = (expert, column, *output_rows) if self.transposed else (expert, *output_rows, column)
        return strided(joined, 0, [size for size, _ in axes], [stride for _, stride in axes], shape)


def expert_layouts(tensors: Mapping[str, StoredTensor], hidden: int | None) -> dict[str, ExpertLayout]:
    """Return the layouts of the tensors of experts among `tensors`, as far as their shapes tell them.

    Quantised ones have none: their values mean nothing without scales that would have to go with them.

    Args:
        tensors: canonical name → tensor.
        hidden: the width of the residual stream, where it is known.

    Returns:
        canonical name → layout.
    """
    layouts: dict[str, ExpertLayout] = {}
    blocks: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in PLAIN_FLOATS:
            continue
        if one := _ONE.fullmatch(name):
            shape = tensor.shape
            if len(shape) == (2 if one["leaf"] == "weight" else 1):
                columns = shape[1] if len(shape) == 2 else None
                index = int(one["index"])
                layouts[name] = ExpertLayout(one["block"], (one["part"],), one["leaf"], index, None, shape[0], columns)
        elif fused := _FUSED.fullmatch(name):
            blocks.setdefault(fused["block"], {})[name] = tensor
    for block, members in blocks.items():
        shapes = {name.removeprefix(f"{block}."): tensor.shape for name, tensor in members.items()}
        transposed = _is_transposed(shapes, hidden)
        for name, tensor in members.items():
            layout = _fused_layout(name, tensor.shape, transposed, f"{block}.gate_up_proj_bias" in tensors)
            if layout is not None:
                layouts[name] = layout
    return layouts


def expert_of(name: str) -> tuple[str, int] | None:
    """Return the block and the number of the expert that a canonical name is of; None for all others."""
    match = _ONE.fullmatch(name)
    return None if match is None else (match["block"], int(match["index"]))


def fused_names(name: str) -> list[str]:
    """Return the canonical names of the fused tensors that could hold the expert's matrix `name`."""
    match = _ONE.fullmatch(name)
    if match is None:
        return []
    bias = "_bias" if match["leaf"] == "bias" else ""
    words = [match["part"], *(["gate_up_proj"] if match["part"] in GATE_UP else [])]
    return [f"{match['block']}.{word}{bias}" for word in words]


def _fused_layout(name: str, shape: tuple[int, ...], transposed: bool | None, interleaved: bool) -> ExpertLayout | None:
    match = _FUSED.fullmatch(name)
    assert match is not None
    parts = GATE_UP if match["part"] == "gate_up_proj" else (match["part"],)
    # Only the family of gpt-oss has biases on fused experts, and it interleaves gate and up.
    interleaved = interleaved and len(parts) > 1
    if match["bias"]:
        if len(shape) != 2 or shape[1] % len(parts):
            return None
        rows = shape[1] // len(parts)
        return ExpertLayout(match["block"], parts, "bias", 0, shape[0], rows, None, False, interleaved)
    if len(shape) != 3 or transposed is None:
        return None
    n, rows, columns = (shape[0], shape[2], shape[1]) if transposed else shape
    if rows % len(parts):
        return None
    return ExpertLayout(match["block"], parts, "weight", 0, n, rows // len(parts), columns, transposed, interleaved)


def _is_transposed(shapes: Mapping[str, tuple[int, ...]], hidden: int | None) -> bool | None:
    """Return whether the fused matrices of a layer are (in, out); None where shapes do not decide it."""
    reads, writes = shapes.get("gate_up_proj"), shapes.get("down_proj")
    count = 2
    if reads is None:
        reads, count = shapes.get("up_proj") or shapes.get("gate_proj"), 1

    def fits(transposed: bool) -> bool:
        order = (2, 1) if transposed else (1, 2)
        # Rows and columns of both, as matrices of x ↦ W·x.
        inner, width = (reads[order[0]], reads[order[1]]) if reads and len(reads) == 3 else (None, None)
        out, back = (writes[order[0]], writes[order[1]]) if writes and len(writes) == 3 else (None, None)
        return (
            (hidden is None or width in (None, hidden))
            and (hidden is None or out in (None, hidden))
            and (width is None or out is None or width == out)
            and (inner is None or back is None or inner == count * back)
        )

    possible = [transposed for transposed in (False, True) if fits(transposed)]
    return possible[0] if len(possible) == 1 else None


def stacked_parts(name: str) -> list[str] | None:
    """Return the canonical names of the matrices that the dense tensor `name` holds one below the other, or None."""
    module, _, leaf = name.rpartition(".")
    before, _, word = module.rpartition(".")
    if leaf not in ("weight", "bias") or word not in STACKED_ROWS:
        return None
    return [f"{before}.{part}.{leaf}" if before else f"{part}.{leaf}" for part in STACKED_ROWS[word]]


def rows_of(tensor: StoredTensor, first: int, shape: tuple[int, ...]) -> StoredTensor:
    """Return the part of `tensor` of `shape` that begins at row `first`."""
    width = tensor.n_elements // tensor.shape[0] if tensor.shape[0] else 0
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return strided(tensor, first * width, shape, strides)
