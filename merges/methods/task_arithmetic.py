"""Task arithmetic and its variants: w + λ·Σᵢ aᵢ·sparse(δᵢ) with δᵢ = xᵢ − w, with or without a vote on signs.

| method | sparse(δ) | vote | paper |
|---|---|---|---|
| task_arithmetic | δ | no | arXiv 2212.04089 |
| ties | the d·n largest | yes | arXiv 2306.01708 |
| dare_linear, dare_ties | each kept with probability d | no, yes | arXiv 2311.03099 |
| breadcrumbs, breadcrumbs_ties | the largest except the γ·n very largest | no, yes | arXiv 2312.06795 |
| della_linear, della | kept with a probability that grows with its rank in the row | no, yes | arXiv 2406.11617 |

Deviations from the papers, as in mergekit (`compat: mergekit`, the default): the vote is taken on the weighted δ, and
with `rescale` the sparse δ is multiplied by the ratio of the L1 norms before and after. `compat: paper` votes on δ
before it is weighted, and with `rescale` divides elements that were kept at random by their probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from merges.config.settings import MethodSpec, ParameterSpec
from merges.methods.averages import weighted_sum
from merges.methods.measures import measured_kernel
from merges.methods.registry import Params, register
from merges.methods.sparsify import Sparsifier, counter, passes, sparsified
from surgery.engine.kernel import Kernel, Pass, TensorSlice

_NEGLIGIBLE = 1e-8  # a sum of weights below this is not divided by


def combine(
    tensors: Sequence[Tensor],
    place: TensorSlice,
    *,
    vote: bool,
    weight: Sequence[float],
    lambda_: float,
    normalize: bool,
    paper: bool,
    **sparsifier: Any,
) -> Tensor:
    """Return w + λ·Σᵢ aᵢ·sparse(δᵢ), over the sum of the weights with `normalize`.   w, x₁ … xₖ: (…) → (…)"""
    base, *models = tensors
    changes = [sparsified(model - base, i, place, paper=paper, **sparsifier) for i, model in enumerate(models)]
    if not vote:
        # Without a vote all models take part, so the divisor is the same for every element.
        mixed = weighted_sum(changes, weight)
        total = sum(weight)
        if normalize and abs(total) >= _NEGLIGIBLE:
            mixed.div_(total)
    else:
        if not paper:  # the weights then count in the vote, and not a second time in the sum
            changes = [change.mul_(a) for change, a in zip(changes, weight, strict=True)]
        # The paper averages unweighted votes; mergekit weights δ first and then divides by the weights that agreed.
        mixed, divisor = elect_sign(changes, weight if paper else [1.0] * len(changes), weight)
        if normalize:
            mixed.div_(divisor.add_(torch.eq(divisor, 0, out=torch.empty_like(divisor))))  # 0 → 1
    # A product by 1 is skipped: it changes nothing, and would read and write the piece once more.
    return mixed.mul_(lambda_).add_(base) if lambda_ != 1 else mixed.add_(base)


def _build(params: Params, models: int, based: bool, *, name: str, kind: Sparsifier, vote: bool) -> Kernel:
    density, rescale, paper = params["density"], bool(params["rescale"]), bool(params["paper"])
    assert isinstance(density, tuple)
    needed = passes(kind, [float(d) for d in density], rescale=rescale, paper=paper)
    return measured_kernel(
        name,
        partial(combine, vote=vote, kind=kind),
        models,
        based=based,
        # DELLA ranks elements within their row, and must see rows as a whole.
        rows=kind == "ranked",
        passes=tuple(Pass(partial(p.gather, kind=kind), partial(p.reduce, kind=kind)) for p in needed),
        count=counter(kind, needed),
    )


_WEIGHT = ParameterSpec("weight", "number", per_model=True, summary="a: how much of the model's δ is added")
_NORMALIZE = "divide by the sum of the weights that took part"
_LAMBDA = ParameterSpec("lambda", "number", 1.0, summary="λ: scales the merged δ before it is added to the base")
_DENSITY = ParameterSpec("density", "number", 1.0, per_model=True, low=0, high=1, summary="d: share of δ that is kept")
_GAMMA = ParameterSpec("gamma", "number", 0.01, per_model=True, low=0, high=1, summary="γ: share of outliers dropped")
_EPSILON = ParameterSpec(
    "epsilon", "number", 0.15, per_model=True, low=0, high=0.5, summary="ε: probabilities reach from d − ε to d + ε"
)


def _register(
    name: str,
    paper: str,
    summary: str,
    *,
    kind: Sparsifier,
    vote: bool,
    normalize: bool = False,
    rescale: bool = False,
    more: tuple[ParameterSpec, ...] = (),
) -> None:
    parameters = (
        _WEIGHT,
        _DENSITY,
        *more,
        ParameterSpec("normalize", "boolean", normalize, summary=_NORMALIZE),
        ParameterSpec("rescale", "boolean", rescale, summary="multiply what is kept until Σ|δ| is what it was"),
        _LAMBDA,
    )
    spec = MethodSpec(name, parameters, base="required", models=(1, None), summary=summary, paper=paper)
    register(spec, partial(_build, name=name, kind=kind, vote=vote))


_register("task_arithmetic", "arXiv:2212.04089", "base + λ · weighted sum of task vectors", kind="none", vote=False)
_register(
    "ties",
    "arXiv:2306.01708",
    "the largest of each task vector, then a vote on signs",
    kind="magnitude",
    vote=True,
    normalize=True,
)
_register(
    "dare_linear",
    "arXiv:2311.03099",
    "task vectors thinned at random and rescaled",
    kind="random",
    vote=False,
    rescale=True,
)
_register(
    "dare_ties", "arXiv:2311.03099", "as dare_linear, then a vote on signs", kind="random", vote=True, rescale=True
)
_register(
    "breadcrumbs",
    "arXiv:2312.06795",
    "task vectors without their smallest and their very largest",
    kind="outliers",
    vote=False,
    more=(_GAMMA,),
)
_register(
    "breadcrumbs_ties",
    "arXiv:2312.06795",
    "as breadcrumbs, then a vote on signs",
    kind="outliers",
    vote=True,
    more=(_GAMMA,),
)
_register(
    "della_linear",
    "arXiv:2406.11617",
    "task vectors thinned at random, the large kept likelier, rescaled",
    kind="ranked",
    vote=False,
    rescale=True,
    more=(_EPSILON,),
)
_register(
    "della",
    "arXiv:2406.11617",
    "as della_linear, then a vote on signs",
    kind="ranked",
    vote=True,
    normalize=True,
    rescale=True,
    more=(_EPSILON,),
)


def elect_sign(changes: Sequence[Tensor], factors: Sequence[float], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return Σ factorᵢ·changeᵢ and Σ shareᵢ over the changes whose sign is that of the sum of all (TIES' elect).

    A sum of 0 counts as positive. A change of 0 has no sign: it agrees with none and adds nothing to the shares.
    Overwrites `changes`.   k × (…) → (…), (…)
    """
    # The sum stands for TIES' comparison of positive and negative mass: it is positive where the first is larger.
    majority = changes[0].clone()
    for change in changes[1:]:
        majority.add_(change)
    # 0 or 1 → −1 or +1, in place.
    majority.ge_(0).mul_(2).sub_(1)
    mixed, taken = torch.zeros_like(majority), torch.zeros_like(majority)
    for change, factor, share in zip(changes, factors, shares, strict=True):
        agreeing = change.mul_(majority).relu_()  # |change| where the signs agree, else 0: no mask is needed
        mixed.add_(agreeing, alpha=factor)
        taken.add_(agreeing.sign_(), alpha=share)
    return mixed.mul_(majority), taken
