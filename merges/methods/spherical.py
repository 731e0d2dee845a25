"""Methods that treat tensors as vectors with a direction: slerp and its kin, Karcher means, model stock.

The result of each of these is in the span of the models: Σᵢ cᵢ vᵢ. The coefficients follow from the vectors' inner
products alone, so one streaming pass finds the Gram matrix G = (vᵢ·vⱼ), the geometry is done on k numbers in fp64, and
a second pass adds the models up. With an angle per row or column the same is done for all of them at once: G then has
a last axis, and so have the coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merges.config.settings import MethodSpec, ParameterSpec
from merges.methods.averages import weighted_sum
from merges.methods.measures import measured_kernel
from merges.methods.registry import Params, register
from surgery.engine.kernel import Kernel, Pass, TensorSlice
from surgery.errors import SurgeryError

Matrix = npt.NDArray[np.float64]  # (k, k) or (k, k, vectors)
Coefficients = Callable[..., Matrix]  # (k,) or (k, vectors)
Axis = Literal["whole", "rows", "columns"]

COEFFICIENTS = "coefficients"
# |cos| above which slerp is a straight line, as in mergekit: sin θ, by which the arc divides, is below 0.032 there.
_SAME_DIRECTION = 0.9995
_PARALLEL = 1e-12  # sin² of the angle up to which nuslerp takes two vectors to lie on one line
_TINY = 1e-8  # a vector up to this length has no direction for slerp, as in mergekit


def combine(
    tensors: Sequence[Tensor], place: TensorSlice, *, origin: bool, axis: Axis, formula: Coefficients, **params: Any
) -> Tensor:
    """Return o + Σᵢ cᵢ·(xᵢ − o) with the coefficients of the tensor, of each row, or of each column.

    tensors: o first where `origin`, then x: (…), or (rows, width) → the same
    """
    base, models = (tensors[0], tensors[1:]) if origin else (None, tensors)
    vectors = list(models) if base is None else [model - base for model in models]
    axis = _axis_of(axis, place)
    if axis == "whole":
        total = weighted_sum(vectors, place.pass_results[COEFFICIENTS].tolist())
    else:
        # Rows are whole in every piece, and need no pass; columns are not.
        by_row = axis == "rows"
        values = formula(gram(vectors, axis), place, **params) if by_row else place.pass_results[COEFFICIENTS]
        shaped = torch.from_numpy(values).to(vectors[0]).unsqueeze(2 if by_row else 1)
        total = vectors[0] * shaped[0]
        for vector, coefficient in zip(vectors[1:], shaped[1:], strict=True):
            total.addcmul_(vector, coefficient)
    return total if base is None else total.add_(base)


def gram(vectors: Sequence[Tensor], axis: Axis) -> Matrix:
    """Return inner products in fp64: (k, k), with a last axis over rows or columns.   k × (…) or k × (rows, width)"""
    k = len(vectors)
    # Where directions cancel, only the rounding errors of the products are left: those of fp32 would be in the result.
    exact = [vector.double() for vector in vectors]
    products: list[list[Any]] = [[None] * k for _ in range(k)]
    for i in range(k):
        for j in range(i + 1):
            products[i][j] = products[j][i] = _inner(exact[i], exact[j], axis)
    return np.array(products, np.float64)


def _axis_of(axis: Axis, place: TensorSlice) -> Axis:
    """Return the axis to use: a vector is one row, as its columns are single numbers, which have no angle."""
    return "rows" if axis == "columns" and len(place.shape) < 2 else axis


def _inner(a: Tensor, b: Tensor, axis: Axis) -> Any:
    if axis == "whole":
        return torch.dot(a.reshape(-1), b.reshape(-1)).item()
    return (a * b).sum(dim=1 if axis == "rows" else 0).cpu().numpy()


def slerp(g: Matrix, place: TensorSlice, *, t: float, **_: Any) -> Matrix:
    """Return sin((1−t)θ)/sin θ and sin(tθ)/sin θ, θ between base and model; 1 − t and t where |cos θ| > 0.9995.

    mergekit's form: the angle is that of the directions, the vectors keep their lengths.
    """
    lengths = np.sqrt(np.diagonal(g))
    scale = np.where(lengths > _TINY, lengths, 1.0)
    # Rounding can take a cosine beyond ±1, where arccos is NaN.
    cos = np.clip(g[0, 1] / (scale[0] * scale[1]), -1, 1)
    return _between(cos, t, straight=np.abs(cos) > _SAME_DIRECTION)


def nuslerp(g: Matrix, place: TensorSlice, *, weight: Sequence[float], **_: Any) -> Matrix:
    """Return the coefficients of `slerp` for t = a₂/(a₁ + a₂), ½ where these cancel; straight only along one line.

    mergekit goes straight where sin² θ ≤ 1e-16. That is below what rounding leaves of two opposite vectors, whose sum
    over sin θ would then be noise times 1e8; at 1e-12 arc and chord still agree to 12 digits where θ is small.

    g: (2, 2) or (2, 2, vectors) → (2,) or (2, vectors)
    """
    total = sum(weight)
    # Weights that cancel give no ratio.
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    # A vector of zeros has a cosine of 0 to any other, not 0/0.
    lengths = np.sqrt(np.maximum(np.stack([g[0, 0], g[1, 1]]), 1e-14))
    cos = np.clip(g[0, 1] / (lengths[0] * lengths[1]), -1, 1)
    return _between(cos, t, straight=1 - cos * cos <= _PARALLEL)


def multislerp(
    g: Matrix, place: TensorSlice, *, weight: Sequence[float], normalize_weights: bool, eps: float, **_: Any
) -> Matrix:
    """Return the coefficients of exp_m(v) times the mean length: m the directions' weighted mean, v their mean tangent.

    One model alone stays as it is, and vectors that are all zero (tensors that no model changed) stay zero.

    Raises:
        SurgeryError: the directions of three or more models cancel. Two are then added up by their weights.
    """
    if len(weight) == 1:
        return np.ones(1)
    a = np.array(weight, np.float64)
    if normalize_weights:
        # That the sum is not 0 was checked when the merge was planned.
        a /= a.sum()
    lengths = np.sqrt(np.diagonal(g))
    padded = lengths + eps
    unit = np.diag(np.where(padded > 0, 1 / np.where(padded > 0, padded, 1), 0))  # row i: direction i's coefficients
    mean = a @ unit
    size = _length(mean, g)
    if size <= eps:
        if len(a) == 2 or not lengths.any():
            return a
        raise SurgeryError(
            "the models' directions cancel under these weights, so their mean has none",
            where=place.tensor,
            hint="Use other weights, or another method for this tensor.",
        )
    mean /= size
    tangent = a @ (unit - np.outer(unit @ g @ mean, mean))
    step = _length(tangent, g) + eps
    # numpy's sinc(x) is sin(πx)/(πx), and 1 at 0.
    result: Matrix = (mean * np.cos(step) + tangent * np.sinc(step / np.pi)) * (lengths @ a)
    return result


def karcher(g: Matrix, place: TensorSlice, *, max_iter: int, tol: float, **_: Any) -> Matrix:
    """Return the coefficients of the point whose tangents to all directions cancel, times the mean length.

    Follows the mean tangent until it is shorter than `tol`, at most `max_iter` times. All models count alike, as in
    mergekit; those no longer than `tol` have no direction but count for the mean length, and if all are such their mean
    is taken (mergekit: zero). A direction opposite to the point has no shortest way to it, and adds no tangent.
    """
    k = len(g)
    lengths = np.sqrt(np.diagonal(g))
    valid = np.flatnonzero(lengths > tol)
    if k == 1 or not len(valid):
        return np.full(k, 1 / k)
    # Row i holds a direction as coefficients of the models: vectors of the tensor's size are never made.
    units = np.zeros((len(valid), k))
    units[np.arange(len(valid)), valid] = 1 / lengths[valid]
    mean = units.mean(axis=0)
    size = _length(mean, g)
    mean = units[0] if size < tol else mean / size  # where directions cancel, any of them will do to start from
    for _step in range(max_iter):
        cos = np.clip(units @ g @ mean, -1, 1)
        theta = np.arccos(cos)
        has_tangent = np.sin(theta) >= tol  # neither at the point nor opposite to it
        scale = np.where(has_tangent, theta / np.where(has_tangent, np.sin(theta), 1), 0) / len(valid)
        tangent = scale @ (units - np.outer(cos, mean))
        step = _length(tangent, g)
        if step < tol:
            break
        mean = np.cos(step) * mean + np.sin(step) / step * tangent
        mean /= _length(mean, g)  # back onto the sphere, before rounding errors add up
    result: Matrix = mean * lengths.mean()
    return result


def model_stock(g: Matrix, place: TensorSlice, **_: Any) -> Matrix:
    """Return t/k for each δ, t = k·c/(1 + (k − 1)·c), c the mean cosine of pairs of δ (arXiv 2403.19522, equation 3).

    Where 1 + (k − 1)·c vanishes no t exists, and the base stays.   g: (k, k, …) → (k, …)
    """
    k = len(g)
    lengths = np.sqrt(np.stack([g[i, i] for i in range(k)]))
    # The least product of lengths keeps a task vector of zeros at a cosine of 0 to the others, and not at 0/0.
    pairs = [
        np.clip(g[i, j] / np.maximum(lengths[i] * lengths[j], 1e-6), -1, 1) for i in range(k) for j in range(i + 1, k)
    ]
    cos = np.asarray(np.mean(pairs, axis=0))
    below = 1 + (k - 1) * cos
    # Only where the directions of all δ cancel, as Σᵢⱼ cosᵢⱼ = k·(1 + (k − 1)·c) is the square of their sum.
    singular = np.abs(below) < 1e-6
    share = np.where(singular, 0, k * cos / np.where(singular, 1, below)) / k
    return np.stack([share] * k)


def _between(cos: Any, t: float, *, straight: Any) -> Matrix:
    # Where the line is straight θ is not used; 0 in place of cos keeps sin θ from being 0.
    theta = np.arccos(np.where(straight, 0, cos))
    sin = np.sin(theta)
    return np.stack(
        [
            np.where(straight, 1 - t, np.sin((1 - t) * theta) / sin),
            np.where(straight, t, np.sin(t * theta) / sin),
        ]
    )


def _length(coefficients: Matrix, g: Matrix) -> float:
    # The form is never negative, except for rounding.
    return math.sqrt(max(float(coefficients @ g @ coefficients), 0.0))


def _gather(tensors: Sequence[Tensor], place: TensorSlice, *, origin: bool, axis: Axis, **_: Any) -> Matrix:
    base, models = (tensors[0], tensors[1:]) if origin else (None, tensors)
    return gram(list(models) if base is None else [model - base for model in models], _axis_of(axis, place))


def _reduce(
    gathered: Sequence[Matrix], place: TensorSlice, *, formula: Coefficients, **params: Any
) -> Mapping[str, Any]:
    # An empty tensor has no pieces, and nothing to merge.
    return {COEFFICIENTS: formula(np.sum(gathered, axis=0), place, **params)} if gathered else {}


def _kernel(
    name: str, formula: Coefficients, models: int, based: bool, *, origin: bool, axis: Axis = "whole"
) -> Kernel:
    fixed: dict[str, Any] = {"origin": origin, "axis": axis, "formula": formula}
    one = Pass(partial(_gather, origin=origin, axis=axis), partial(_reduce, formula=formula))
    return measured_kernel(
        name,
        partial(combine, **fixed),
        models,
        based=based,
        rows=axis != "whole",
        passes=() if axis == "rows" else (one,),
    )


def _build_slerp(params: Params, models: int, based: bool) -> Kernel:
    return _kernel("slerp", slerp, models, based, origin=False)


def _build_nuslerp(params: Params, models: int, based: bool) -> Kernel:
    axis: Axis = "columns" if params["nuslerp_row_wise"] else "rows"
    return _kernel("nuslerp", nuslerp, models, based, origin=based, axis="whole" if params["nuslerp_flatten"] else axis)


def _build_multislerp(params: Params, models: int, based: bool) -> Kernel:
    return _kernel("multislerp", multislerp, models, based, origin=based)


def _build_karcher(params: Params, models: int, based: bool) -> Kernel:
    return _kernel("karcher", karcher, models, based, origin=False)


def _build_model_stock(params: Params, models: int, based: bool) -> Kernel:
    axis: Axis = "rows" if params["filter_wise"] else "whole"
    return _kernel("model_stock", model_stock, models, based, origin=True, axis=axis)


_WEIGHT = ParameterSpec("weight", "number", per_model=True, summary="a: the model's share")

register(
    MethodSpec(
        "slerp",
        (ParameterSpec("t", "number", summary="0 is the base, 1 the other model"),),
        base="required",
        models=(1, 1),
        summary="along the arc from the base to one other model",
        paper="en.wikipedia.org/wiki/Slerp",
    ),
    _build_slerp,
)
register(
    MethodSpec(
        "nuslerp",
        (
            _WEIGHT,
            ParameterSpec("nuslerp_flatten", "boolean", True, summary="one angle for the whole tensor"),
            ParameterSpec(
                "nuslerp_row_wise", "boolean", False, summary="without flatten: an angle per column, else row"
            ),
        ),
        base="optional",
        models=(2, 2),
        summary="slerp between two models by their weights; with a base, between their task vectors",
    ),
    _build_nuslerp,
)
register(
    MethodSpec(
        "multislerp",
        (
            _WEIGHT,
            ParameterSpec("normalize_weights", "boolean", True, summary="divide the weights by their sum"),
            ParameterSpec("eps", "number", 1e-8, low=0, summary="lengths below this count as none"),
        ),
        base="optional",
        summary="slerp between any number of models; with a base, between their task vectors",
        paper="goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    ),
    _build_multislerp,
)
register(
    MethodSpec(
        "karcher",
        (
            ParameterSpec("max_iter", "integer", 10, low=0, summary="steps at most"),
            ParameterSpec("tol", "number", 1e-5, low=0, low_open=True, summary="the step at which to stop"),
        ),
        joins_base=True,
        summary="the models' mean on the sphere",
        paper="arXiv:2603.04972",
    ),
    _build_karcher,
)
register(
    MethodSpec(
        "model_stock",
        (ParameterSpec("filter_wise", "boolean", False, summary="an angle per row instead of per tensor"),),
        base="required",
        models=(2, None),
        summary="as far from the base towards the mean as the task vectors' angle says",
        paper="arXiv:2403.19522",
    ),
    _build_model_stock,
)
