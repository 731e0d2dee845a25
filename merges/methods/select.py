"""Methods that pick elements: by variance (sce), by how many models changed them (ram), by importance (fusion)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merges.methods.measures import KEPT, Measures
from merges.methods.ranks import CUTS, order_passes
from merges.methods.registry import Params, register
from merges.settings import MethodSpec, ParameterSpec
from surgery.dtypes import n_elements
from surgery.plan import Kernel, Pass, Place

_SHARES = "shares"
_FACTORS = "factors"
_NEGLIGIBLE = 1e-6


def sce(tensors: Sequence[Tensor], place: Place, *, select_topk: float, **_: Any) -> Tensor:
    """w + Σᵢ aᵢ·δᵢ / Σᵢ aᵢ over the δᵢ whose sign is that of their sum, where variance across models is largest.

    arXiv 2408.07990: select the `select_topk` share of the elements that vary at all; calculate aᵢ ∝ mean δᵢ² of what
    is selected; erase minority signs (0 counts as +).   w, x₁ … xₖ: (…) → (…)
    """
    base, deltas = tensors[0], _selected(tensors, place, select_topk)
    total = torch.stack(deltas).sum(dim=0)
    majority = (total >= 0).to(total.dtype).mul_(2).sub_(1)
    mixed, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for delta, share in zip(deltas, place.known[_SHARES], strict=True):
        agreeing = delta.mul_(majority).relu_()
        mixed.add_(agreeing, alpha=share)
        divisor.add_(agreeing.sign_(), alpha=share)
    return mixed.div_(divisor.clamp_(min=_NEGLIGIBLE)).mul_(majority).add_(base)


def _selected(tensors: Sequence[Tensor], place: Place, select_topk: float) -> list[Tensor]:
    base, *models = tensors
    deltas = [model - base for model in models]
    if select_topk >= 1:
        return deltas
    scores = _variance(deltas).cpu().float().numpy()
    mask = place.known[CUTS][0][0].largest(scores, place.begin)
    chosen = torch.from_numpy(mask.view(np.uint8)).to(base.device)
    return [delta.mul_(chosen) for delta in deltas]


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    return torch.var(torch.stack(list(deltas)), dim=0, unbiased=False)


def _variances(tensors: Sequence[Tensor], place: Place, **_: Any) -> list[Tensor]:
    base, *models = tensors
    return [_variance([model - base for model in models])]


def _most_varied(place: Place, positive: Sequence[int], *, select_topk: float, **_: Any) -> list[tuple[int, ...]]:
    return [(int(positive[0] * select_topk),)] if positive else []


def _gather_energies(tensors: Sequence[Tensor], place: Place, *, select_topk: float, **_: Any) -> list[float]:
    return [float(torch.dot(delta, delta)) for delta in _selected(tensors, place, select_topk)]


def _settle_energies(gathered: Sequence[list[float]], place: Place, *, paper: bool, **_: Any) -> Mapping[str, Any]:
    energies = np.sum(gathered, axis=0) / max(n_elements(place.shape), 1)
    total = float(np.sum(energies))
    count = np.size(energies)
    # mergekit calls shares even as soon as Σ mean δ² < 1e-6, which fine-tuning seldom exceeds.
    even = total == 0 if paper else total < _NEGLIGIBLE
    found: dict[str, Any] = {_SHARES: [1 / count] * count if even else list(energies / total)}
    if KEPT in place.known:
        found[KEPT] = list(place.known[KEPT]) * count
    return found


def ram(tensors: Sequence[Tensor], place: Place, *, epsilon: float, **_: Any) -> Tensor:
    """w + Σᵢ fᵢ·δᵢ where one model changed an element, + the mean of the δᵢ of those that did where several have.

    arXiv 2601.13572: changed means |δ| > ε. fᵢ = 1 for ram; for ramplus_tl it is 1 + r·clamp(shared/unique, 0, α) with
    the tensor's counts of elements that model i changed with others and alone.   w, x₁ … xₖ: (…) → (…)
    """
    base = tensors[0]
    deltas, counts = _changed(tensors, epsilon)
    factors = place.known.get(_FACTORS, [1.0] * len(deltas))
    alone = (counts == 1).to(base.dtype)
    shared = (counts > 1).to(base.dtype).div_(counts.clamp(min=1))
    for delta, factor in zip(deltas, factors, strict=True):
        base = base + delta * (alone * factor + shared)
    return base


def _changed(tensors: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """Each δ with zeros where its model changed nothing, and how many models changed each element."""
    base, *models = tensors
    deltas = [torch.nn.functional.hardshrink(model - base, epsilon) for model in models]
    counts = torch.stack([delta.abs().sign_() for delta in deltas]).sum(dim=0)
    return deltas, counts


def _gather_overlap(tensors: Sequence[Tensor], place: Place, *, epsilon: float, **_: Any) -> list[tuple[int, int]]:
    deltas, counts = _changed(tensors, epsilon)
    flags = [delta != 0 for delta in deltas]
    return [(int((flag & (counts > 1)).sum()), int((flag & (counts == 1)).sum())) for flag in flags]


def _settle_overlap(
    gathered: Sequence[list[tuple[int, int]]], place: Place, *, epsilon: float, r: float, alpha: float, **_: Any
) -> Mapping[str, Any]:
    totals = np.sum(gathered, axis=0)  # (models, 2)
    if not np.ndim(totals):
        return {}
    ratio = totals[:, 0] / np.maximum(totals[:, 1], epsilon)
    return {_FACTORS: [float(f) for f in 1 + r * np.clip(ratio, 0, alpha)], KEPT: [int(n) for n in totals.sum(axis=1)]}


def arcee_fusion(tensors: Sequence[Tensor], place: Place, **_: Any) -> Tensor:
    """x where it is important, w elsewhere: |δ|·KL(softmax(x) ‖ softmax(w)) of the row ≥ median + 1.5·(Q₃ − Q₁).

    The quartiles are exact; mergekit estimates them from a random million of a larger tensor's elements.
    w, x: (rows, width) → the same
    """
    base, model = tensors
    first, median, third = (cut.value for cut in place.known[CUTS][0])
    important = _importance(base, model) >= median + 1.5 * (third - first)
    return torch.where(important, model, base)


def _importance(base: Tensor, model: Tensor) -> Tensor:
    p, q = (torch.softmax(x, dim=-1).add_(_TINY_SHARE) for x in (model, base))
    divergence = (p * torch.log(p / q)).sum(dim=-1, keepdim=True)
    return (model - base).abs_().mul_(divergence)


_TINY_SHARE = 1e-8


def _importances(tensors: Sequence[Tensor], place: Place, **_: Any) -> list[Tensor]:
    return [_importance(*tensors)]


def _quartiles(place: Place, positive: Sequence[int], **_: Any) -> list[tuple[int, ...]]:
    """Counts from the top whose smallest members stand at ⌊q·(n − 1)⌋ in ascending order."""
    n = n_elements(place.shape)
    return [tuple(n - int(q * (n - 1)) for q in (0.25, 0.5, 0.75))]


def _build_sce(params: Params, models: int, based: bool) -> Kernel:
    share = params["select_topk"]
    assert isinstance(share, float)
    ordered = order_passes(_variances, _most_varied) if share < 1 else ()
    passes = (*ordered, Pass(_gather_energies, _settle_energies))
    return _kernel("sce", sce, models, passes)


def _build_ram(params: Params, models: int, based: bool) -> Kernel:
    return _kernel("ram", ram, models, ())


def _build_ramplus(params: Params, models: int, based: bool) -> Kernel:
    return _kernel("ramplus_tl", ram, models, (Pass(_gather_overlap, _settle_overlap),))


def _build_fusion(params: Params, models: int, based: bool) -> Kernel:
    return _kernel("arcee_fusion", arcee_fusion, models, order_passes(_importances, _quartiles), rows=True)


def _kernel(name: str, fn: Any, models: int, passes: tuple[Pass, ...], *, rows: bool = False) -> Kernel:
    measures = Measures(models, based=True)
    return Kernel(
        name,
        fn,
        kind="rows" if rows else "elementwise",
        measures=measures.names,
        measure=measures.measure,
        placed=True,
        passes=passes,
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
