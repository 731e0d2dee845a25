"""Methods that select elements: by variance (sce), by how many models changed them (ram), by importance (fusion)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merges.config.settings import MethodSpec, ParameterSpec
from merges.methods.averages import weighted_sum
from merges.methods.measures import KEPT, measured_kernel
from merges.methods.registry import Params, register
from merges.methods.task_arithmetic import elect_sign
from merges.methods.topk import THRESHOLDS, as_floats, topk_passes
from surgery.checkpoint.dtypes import n_elements
from surgery.engine.kernel import Kernel, Pass, TensorSlice

# Entries of `TensorSlice.pass_results`.
_SHARES = "shares"
_FACTORS = "factors"
_DIVERGENCES = "divergences"
_NEGLIGIBLE = 1e-6  # sums of weights and of energies below this are not divided by, as in mergekit
_TINY_SHARE = 1e-8  # added to every softmax, as in mergekit: no logarithm of 0

Doubles = npt.NDArray[np.float64]


def sce(tensors: Sequence[Tensor], place: TensorSlice, *, select_topk: float, **_: Any) -> Tensor:
    """Return w + Σᵢ aᵢ·δᵢ / Σᵢ aᵢ over the δᵢ whose sign is that of their sum, where the models' variance is largest.

    arXiv 2408.07990: select the `select_topk` share of the elements that vary at all; calculate aᵢ ∝ mean δᵢ² of what
    is selected; erase minority signs (0 counts as +).   w, x₁ … xₖ: (…) → (…)
    """
    shares = place.pass_results[_SHARES]
    # The shares are the factors as well as what is divided by: a weighted mean over the models that agree.
    mixed, taken = elect_sign(_selected(tensors, place, select_topk), shares, shares)
    return mixed.div_(taken.clamp_(min=_NEGLIGIBLE)).add_(tensors[0])


def _selected(tensors: Sequence[Tensor], place: TensorSlice, select_topk: float) -> list[Tensor]:
    base, *models = tensors
    deltas = [model - base for model in models]
    if select_topk >= 1:
        return deltas
    # The variance is computed a second time rather than stored: a pass must not keep anything of a tensor's size.
    mask = place.pass_results[THRESHOLDS][0][0].largest(as_floats(_variance(deltas)), place.begin)
    # Booleans as bytes: multiplied at full speed, and without a copy on the way to torch.
    chosen = torch.from_numpy(mask.view(np.uint8)).to(base.device)
    return [delta.mul_(chosen) for delta in deltas]


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    """Return the variance of each element's k values, exactly 0 where they are equal.   k × (…) → (…)"""
    # Differences from the first model, not from the mean: the mean of equal values may be rounded to another value.
    # A few additions in cache; torch.var along the first dimension of a stack takes fifty times as long.
    first, *others = deltas
    apart = [delta - first for delta in others]
    mean = torch.zeros_like(first)
    for difference in apart:
        mean.add_(difference)
    mean.div_(len(deltas))
    total = mean * mean
    for difference in apart:
        away = difference.sub_(mean)
        total.addcmul_(away, away)
    return total.div_(len(deltas))


def _variances(tensors: Sequence[Tensor], place: TensorSlice, **_: Any) -> list[Tensor]:
    base, *models = tensors
    return [_variance([model - base for model in models])]


def _most_varied(place: TensorSlice, positive: Sequence[int], *, select_topk: float, **_: Any) -> list[tuple[int, ...]]:
    return [(int(positive[0] * select_topk),)] if positive else []


def _gather_energies(tensors: Sequence[Tensor], place: TensorSlice, *, select_topk: float, **_: Any) -> list[float]:
    return [_energy(delta.reshape(-1)) for delta in _selected(tensors, place, select_topk)]


def _energy(delta: Tensor) -> float:
    squares = torch.dot(delta, delta).item()
    # Beyond 3e38 only fp64 tells how the models compare.
    return squares if math.isfinite(squares) else torch.dot(delta.double(), delta.double()).item()


def _reduce_energies(
    gathered: Sequence[list[float]], place: TensorSlice, *, paper: bool, **_: Any
) -> Mapping[str, Any]:
    energies = np.sum(gathered, axis=0) / max(n_elements(place.shape), 1)
    total = float(np.sum(energies))
    count = np.size(energies)
    # mergekit calls shares even as soon as Σ mean δ² < 1e-6, which fine-tuning seldom exceeds.
    even = total == 0 if paper else total < _NEGLIGIBLE
    results: dict[str, Any] = {_SHARES: [1 / count] * count if even else list(energies / total)}
    if KEPT in place.pass_results:
        results[KEPT] = list(place.pass_results[KEPT]) * count
    return results


def ram(tensors: Sequence[Tensor], place: TensorSlice, *, epsilon: float, **_: Any) -> Tensor:
    """Return w + Σᵢ fᵢ·δᵢ where one model changed an element; where several did, w + the mean of their δᵢ.

    arXiv 2601.13572: changed means |δ| > ε. fᵢ = 1 for ram; for ramplus_tl it is 1 + r·clamp(shared/unique, 0, α) with
    the tensor's counts of elements that model i changed with others and alone.   w, x₁ … xₖ: (…) → (…)
    """
    base = tensors[0]
    deltas, counts = _changed(tensors, epsilon)
    # Where one model changed an element the mean is its change alone.
    mixed = weighted_sum(deltas, [1.0] * len(deltas)).div_(counts.clamp(min=1))
    if _FACTORS in place.pass_results:
        # Masks are numbers of the compute dtype, so that every step is one fused multiplication.
        alone = torch.eq(counts, 1, out=torch.empty_like(counts))
        for delta, factor in zip(deltas, place.pass_results[_FACTORS], strict=True):
            mixed.addcmul_(delta, alone, value=factor - 1)
    return mixed.add_(base)


def _changed(tensors: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """Return each δ with zeros where its model changed nothing, and how many models changed each element."""
    base, *models = tensors
    deltas = [torch.nn.functional.hardshrink(model - base, epsilon) for model in models]
    counts = torch.zeros_like(base)
    for delta in deltas:
        counts.add_(delta.sign().abs_())
    return deltas, counts


def _count_changed(delta: Tensor, i: int, place: TensorSlice, *, epsilon: float, **_: Any) -> Tensor:
    return torch.nn.functional.hardshrink(delta, epsilon).sign_().abs_().sum()


def _gather_overlap(
    tensors: Sequence[Tensor], place: TensorSlice, *, epsilon: float, **_: Any
) -> list[tuple[int, int]]:
    """Return per model how many elements it changed with others, and how many alone."""
    deltas, counts = _changed(tensors, epsilon)
    alone = torch.eq(counts, 1, out=counts).view(-1)
    overlap = []
    for delta in deltas:
        changed = delta.sign_().abs_().view(-1)
        # Sums of ones are exact in fp32 up to 2^24, far beyond a piece on a CPU; a GPU's pieces are a segment.
        unique = int(torch.dot(changed, alone))
        overlap.append((int(changed.sum()) - unique, unique))
    return overlap


def _reduce_overlap(
    gathered: Sequence[list[tuple[int, int]]], place: TensorSlice, *, r: float, alpha: float, **_: Any
) -> Mapping[str, Any]:
    shared, unique = np.sum(gathered, axis=0).T
    # A model with no unique changes has none to amplify: its ratio does not matter, so long as it is a number.
    factors = 1 + r * np.clip(shared / np.maximum(unique, 1), 0, alpha)
    return {_FACTORS: factors.tolist(), KEPT: (shared + unique).tolist()}


def arcee_fusion(tensors: Sequence[Tensor], place: TensorSlice, **_: Any) -> Tensor:
    """Return x where it is important, and w elsewhere.

    Important: |δ|·KL(softmax(x) ‖ softmax(w)), KL being that of the row, is at least median + 1.5·(Q₃ − Q₁).
    The quartiles are exact; mergekit estimates them from a random million of a larger tensor's elements.
    w, x: (rows, width) → the same
    """
    base, model = tensors
    # The importance is computed again in every pass: to keep it would take as much memory as the tensor.
    important = _importance(base, model, place).ge_(_threshold(place))
    return torch.lerp(base, model, important)  # exact at both ends


def _importance(base: Tensor, model: Tensor, place: TensorSlice) -> Tensor:
    first = place.begin // base.shape[1]
    divergence = torch.from_numpy(place.pass_results[_DIVERGENCES][first : first + len(base)]).to(base)
    return (model - base).abs_().mul_(divergence[:, None])


def _gather_divergences(tensors: Sequence[Tensor], place: TensorSlice, **_: Any) -> Doubles:
    """Return KL(softmax(x) ‖ softmax(w)) of each row.   (rows, width) → (rows,)"""
    base, model = tensors
    # Rows are whole here, so a softmax over the row is exact in one piece.
    p, q = (torch.softmax(x, dim=-1).add_(_TINY_SHARE) for x in (model, base))
    # Below 0 there is only rounding; scores must not be negative, not even −0.
    return (p * torch.log(p / q)).sum(dim=-1).clamp_(min=0).abs_().double().cpu().numpy()


def _reduce_divergences(gathered: Sequence[Doubles], place: TensorSlice, **_: Any) -> Mapping[str, Any]:
    return {_DIVERGENCES: np.concatenate(gathered)}


def _importances(tensors: Sequence[Tensor], place: TensorSlice, **_: Any) -> list[Tensor]:
    base, model = tensors
    return [_importance(base, model, place)]


def _count_important(delta: Tensor, i: int, place: TensorSlice, **_: Any) -> int:
    width = place.width
    first, end = place.begin // width, place.begin + delta.numel()
    divergence = torch.from_numpy(place.pass_results[_DIVERGENCES][first : -(-end // width)]).to(delta)
    own = divergence[:, None].expand(-1, width).reshape(-1)[place.begin - first * width : end - first * width]
    return int(delta.abs_().mul_(own).ge_(_threshold(place)).sum())


def _threshold(place: TensorSlice) -> float:
    first, median, third = (float(one.value) for one in place.pass_results[THRESHOLDS][0])
    return median + 1.5 * (third - first)  # Tukey's distance for outliers, from the median instead of Q₃


def _quartiles(place: TensorSlice, positive: Sequence[int], **_: Any) -> list[tuple[int, ...]]:
    """Return the ranks from the top of the elements at ⌊q·(n − 1)⌋ in ascending order, for the three quartiles."""
    n = n_elements(place.shape)
    return [tuple(n - int(q * (n - 1)) for q in (0.25, 0.5, 0.75))]


def _build_sce(params: Params, models: int, based: bool) -> Kernel:
    share = params["select_topk"]
    assert isinstance(share, float)
    # With a share of 1 everything is selected, and no order is needed.
    ordered = topk_passes(_variances, _most_varied) if share < 1 else ()
    return measured_kernel("sce", sce, models, based=based, passes=(*ordered, Pass(_gather_energies, _reduce_energies)))


def _build_ram(params: Params, models: int, based: bool) -> Kernel:
    return measured_kernel("ram", ram, models, based=based, count=_count_changed)


def _build_ramplus(params: Params, models: int, based: bool) -> Kernel:
    overlap = Pass(_gather_overlap, _reduce_overlap)
    return measured_kernel("ramplus_tl", ram, models, based=based, passes=(overlap,))


def _build_fusion(params: Params, models: int, based: bool) -> Kernel:
    passes = (Pass(_gather_divergences, _reduce_divergences), *topk_passes(_importances, _quartiles))
    return measured_kernel(
        "arcee_fusion", arcee_fusion, models, based=based, rows=True, passes=passes, count=_count_important
    )


_EPSILON = ParameterSpec("epsilon", "number", 1e-5, low=0, summary="ε: a change of up to this is none")

register(
    MethodSpec(
        "sce",
        (ParameterSpec("select_topk", "number", 1.0, low=0, high=1, summary="share of the varying elements selected"),),
        base="required",
        summary="what varies most across models, weighted by energy, minority signs erased",
        paper="arXiv:2408.07990",
    ),
    _build_sce,
)
register(
    MethodSpec(
        "ram",
        (_EPSILON,),
        base="required",
        summary="for models trained by RL: what one changed is added whole, what several changed is averaged",
        paper="arXiv:2601.13572",
    ),
    _build_ram,
)
register(
    MethodSpec(
        "ramplus_tl",
        (
            _EPSILON,
            ParameterSpec("r", "number", 0.1, summary="how much unique changes are amplified"),
            ParameterSpec("alpha", "number", 0.2, low=0, summary="α: bound of the ratio that amplifies"),
        ),
        base="required",
        summary="as ram, with unique changes amplified where a model shares many",
        paper="arXiv:2601.13572",
    ),
    _build_ramplus,
)
register(
    MethodSpec(
        "arcee_fusion",
        base="required",
        models=(1, 1),
        summary="takes over from the other model what changed most in what it predicts",
        paper="arcee.ai",
    ),
    _build_fusion,
)
