"""Scale experts while a model runs (arXiv 2505.14681): multiply a chosen expert's final routing weight by β.

Within `scaled_routing` every forward pass runs with the scaled weights; afterwards the model is what it was. The result
is that of scaling the expert's down projection in the checkpoint (`surgery.edits.experts`), to the bit if β is a power
of two. The other methods (`ScalingMethod`) have no equivalent in weights, and cannot be baked.

Legend: T tokens, k experts per token, E experts, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from probes.data.choices import Phase, ScalingMethod
from probes.model.routers import Router, intercept_routing, run_trial_forward
from surgery.checkpoint.selectors import Expert
from surgery.errors import usage_error
from surgery.models.loaded_model import LoadedModel, hooks

# Renormalised weights have the same sum at every token, up to this share of it, which rounding may leave.
SAME_SUM = 1e-2


@dataclass(frozen=True)
class ExpertScaling:
    """Which experts are scaled, by how much, and how.

    scales: expert → β ≥ 0.
    way: `weight`: the final routing weight × β, after selection and renormalisation (the paper's method).
        `renormalised`: × β, then the token's weights are scaled back to their former sum: β before renormalisation.
        `logit`: log β is added to the router's logit, so that selection changes too.
        `forced`: as `weight`; where the expert was not chosen it replaces the weakest chosen one that is not in
        `scales`, and takes over its weight, × β.
    phase: `generated` does not change the prompt: only passes behind a cache are changed. Texts scored in one pass, as
        log-likelihoods are, are then not changed at all: see `AppliedScaling`.

    Raises:
        SurgeryError: β is negative or not finite, or 0 for `logit`; `way` or `phase` is unknown.
    """

    scales: Mapping[Expert, float]
    way: ScalingMethod = "weight"
    phase: Phase = "all"

    def __post_init__(self) -> None:
        if self.way not in get_args(ScalingMethod):
            raise usage_error(f"got {self.way!r}, expected {' or '.join(get_args(ScalingMethod))}", where="--way")
        if self.phase not in get_args(Phase):
            raise usage_error(f"got {self.phase!r}, expected {' or '.join(get_args(Phase))}", where="--phase")
        # log 0 cannot be added to a logit: the smallest allowed β is then the smallest positive number.
        least = 0.0 if self.way != "logit" else math.ulp(0.0)
        for expert, scale in self.scales.items():
            if not (math.isfinite(scale) and scale >= least):
                rule = "a finite number above 0" if least else "a finite number from 0 on"
                raise usage_error(f"{expert}: got β = {scale:g}, expected {rule}")


@dataclass
class AppliedScaling:
    """The state of a scaling in use.

    active: whether the current pass is changed. passes: how many passes of layers have been changed.
    """

    active: bool
    passes: int = 0

    def check(self, where: str) -> None:
        """Raise SurgeryError if nothing was changed, so that the unchanged model was measured."""
        if not self.passes:
            raise usage_error(
                "no token was generated one by one, so that --phase generated changed nothing",
                where=where,
                hint="Use --phase all for what is scored in one pass, such as log-likelihoods and perplexity.",
            )


@contextmanager
def scaled_routing(live: LoadedModel, routers: Sequence[Router], scaling: ExpertScaling) -> Iterator[AppliedScaling]:
    """Run `live` with `scaling` in the block; on exit it is exactly what it was.

    Raises:
        SurgeryError: an expert is not there; weights are not renormalised by this model (`renormalised`); a layer has
            fewer places than experts to be forced; its router's logits cannot be reached (`logit`); once it runs, β is
            too large for the weights' dtype.
    """
    check_experts(routers, scaling.scales, live.name)
    by_layer: dict[int, dict[int, float]] = {}
    # Sorted, because `forced` places experts one after the other: the result must not depend on the user's order.
    for expert, scale in sorted(scaling.scales.items()):
        by_layer.setdefault(expert.layer, {})[expert.index] = scale
    scaled = [router for router in routers if router.layer in by_layer]
    if scaling.way == "renormalised":
        _check_renormalises(live, scaled)
    for router in scaled if scaling.way == "forced" else ():
        if len(by_layer[router.layer]) > router.top_k:
            raise usage_error(
                f"{len(by_layer[router.layer])} experts of layer {router.layer} are to be forced, where a token has "
                f"{router.top_k}",
                where=live.name,
            )
    state = AppliedScaling(active=scaling.phase == "all")

    def rewrite(layer: int, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor] | None:
        if not state.active:
            return None
        state.passes += 1
        return _scaled_decisions(scaling.way, by_layer[layer], index, weights)

    with ExitStack() as stack:
        if scaling.phase == "generated":
            stack.enter_context(hooks(live.body.register_forward_pre_hook(_phase_hook(state), with_kwargs=True)))
        if scaling.way == "logit":
            for router in scaled:
                stack.enter_context(_shifted_logits(live, router, by_layer[router.layer], state))
        else:
            stack.enter_context(intercept_routing(scaled, rewrite))
        yield state


def check_experts(routers: Sequence[Router], experts: Mapping[Expert, float], where: str) -> None:
    """Raise SurgeryError if one of `experts` does not exist."""
    if not experts:
        raise usage_error("no expert was given.")
    counts = {router.layer: router.n_experts for router in routers}
    for expert in experts:
        if expert.layer not in counts:
            layers = ", ".join(map(str, counts))
            raise usage_error(f"layer {expert.layer} has no experts; those that have: {layers}", where=where)
        if not 0 <= expert.index < counts[expert.layer]:
            raise usage_error(
                f"{expert}: layer {expert.layer} has the experts 0 to {counts[expert.layer] - 1}", where=where
            )


def _phase_hook(state: AppliedScaling) -> Any:
    """Return a hook that makes `state` active in passes behind a cache: those that generate."""

    def see(module: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        cache = keywords.get("past_key_values")
        state.active = cache is not None and bool(cache.get_seq_length() > 0)

    return see


def _scaled_decisions(
    way: ScalingMethod, scales: Mapping[int, float], index: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the routing decisions, index and weights (T, k), with the experts scaled."""
    # In float16 a large β would become infinite, and the layer's output NaN.
    largest = torch.finfo(weights.dtype).max
    if too_large := [scale for scale in scales.values() if scale > largest]:
        raise usage_error(f"β = {too_large[0]:g} does not fit the routing weights' dtype, {weights.dtype}")
    if way == "forced":
        index = _with_forced(scales, index, weights)
    changed = weights
    for expert, scale in scales.items():
        # Not in place: the same tensor may be read elsewhere, such as for the auxiliary loss.
        changed = torch.where(index == expert, changed * scale, changed)
    if way == "renormalised":
        before, after = (each.sum(1, keepdim=True, dtype=torch.float32) for each in (weights, changed))
        # A token whose experts are all scaled to 0 has no sum that could be restored.
        factor = torch.where(after > 0, before / after, torch.ones_like(after))
        changed = (changed.float() * factor).to(weights.dtype)
    return index, changed


def _with_forced(scales: Mapping[int, float], index: Tensor, weights: Tensor) -> Tensor:
    """Return index (T, k) with all of `scales` in every row, in the place of the weakest others."""
    # Rows are not always sorted by weight: the weakest is searched for.
    index = index.clone()
    for expert in scales:
        # A place taken by another expert of `scales` must not be taken away again.
        free = torch.stack([index != other for other in scales]).all(0)
        weakest = weights.masked_fill(~free, math.inf).argmin(1, keepdim=True)
        absent = ~(index == expert).any(1, keepdim=True)
        index.scatter_(1, weakest, torch.where(absent, expert, index.gather(1, weakest)))
    return index


def _check_renormalises(live: LoadedModel, routers: Sequence[Router]) -> None:
    """Raise SurgeryError if the weights of different tokens have different sums."""
    sums: list[Tensor] = []

    def see(layer: int, index: Tensor, weights: Tensor) -> None:
        sums.append(weights.sum(1, dtype=torch.float32))

    # Measured rather than read from the config, where families name it differently.
    with intercept_routing(routers, see):
        run_trial_forward(live)
    if any(bool(total.max() - total.min() > SAME_SUM * total.abs().max()) for total in sums):
        raise usage_error(
            "does not renormalise its routing weights, so that there is no β before renormalisation",
            where=live.name,
            hint="Use --way weight.",
        )


@contextmanager
def _shifted_logits(
    live: LoadedModel, router: Router, scales: Mapping[int, float], state: AppliedScaling
) -> Iterator[None]:
    """Add log β to the output of the linear map by which the layer's router makes its logits, weight (E, D)."""
    owners = _router_modules(live, router)
    if len(owners) != 1:
        raise usage_error(
            f"the router of layer {router.layer} is not one matrix over its experts, so that its logits cannot be "
            "reached",
            where=live.name,
            hint="Use --way weight.",
        )
    offsets = torch.zeros(router.n_experts)
    for expert, scale in scales.items():
        offsets[expert] = math.log(scale)
    modes: list[_ShiftLogits] = []

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        mode = _ShiftLogits(offsets, live.width, state)
        modes.append(mode)
        mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        mode = modes.pop()
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        # No output means that the forward pass raised an error, which must not be replaced by this one.
        if output is not None and not mode.seen:
            raise usage_error(
                f"the router of layer {router.layer} makes its logits in a way that cannot be watched",
                where=live.name,
                hint="Use --way weight.",
            )

    with hooks(owners[0].register_forward_pre_hook(enter), owners[0].register_forward_hook(leave, always_call=True)):
        yield


def _router_modules(live: LoadedModel, router: Router) -> list[nn.Module]:
    """Return the modules with a matrix (E, D) nearest to the experts: attention may have one of that shape, too."""
    layer = live.layers[router.layer]
    shape = (router.n_experts, live.width)
    paths = {
        path: module
        for path, module in layer.named_modules()
        if module is not router.experts and any(tuple(p.shape) == shape for p in module.parameters(recurse=False))
    }
    (ancestor,) = (path for path, module in layer.named_modules() if module is router.experts)
    while ancestor:
        ancestor = ancestor.rpartition(".")[0]
        if near := [m for path, m in paths.items() if not ancestor or f"{path}.".startswith(f"{ancestor}.")]:
            return near
    return []


class _ShiftLogits(TorchFunctionMode):
    """Adds `offsets` (E,) to the output of linear maps from D to E, in the block.

    A hook on the router would run after the selection of experts, which raised logits must change.
    """

    def __init__(self, offsets: Tensor, width: int, state: AppliedScaling) -> None:
        super().__init__()
        self.offsets, self.width, self.state = offsets, width, state
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and tuple(args[1].shape) == (len(self.offsets), self.width):
            self.seen = True
            if self.state.active:
                self.state.passes += 1
                out = out + self.offsets.to(out)
        return out
