"""Experts reinforced while a model runs (arXiv 2505.14681): where a chosen expert is among a token's experts, its final
routing weight is multiplied by β; nothing else changes, and nothing is left behind.

In come a model's routers and expert → β; inside `scaled_routing` every forward pass runs with them. This is what
scaling the expert's down projection in the checkpoint does (`surgery.edits.experts`), to the bit where β is a power of
two. The alternatives by name are other things, and cannot be baked.

Legend: T tokens, k experts per token, E experts, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from probes.model.routers import Router, intercept_routing, run_trial_forward
from surgery.checkpoint.selectors import Expert
from surgery.errors import usage_error
from surgery.models.loaded_model import LoadedModel, hooks

ScalingMethod = Literal["weight", "renormalised", "logit", "forced"]
Phase = Literal["all", "generated"]
# The weights of a token that are renormalised have one sum; what rounding leaves of that.
SAME_SUM = 1e-2


@dataclass(frozen=True)
class ExpertScaling:
    """What becomes of chosen experts.

    scales: expert → β ≥ 0.
    way: `weight`: the final routing weight × β, after selection and renormalisation (the paper's). `renormalised`: × β,
        and the token's weights then brought back to the sum they had: β before renormalisation. `logit`: log β is added
        to the router's logit, so that selection changes too. `forced`: as `weight`, and where the expert was not chosen
        it takes the place, and β times the weight, of the weakest that was and is none of `scales`.
    phase: `generated` leaves the prompt alone: only passes behind a cache are changed, so that what is scored in one
        pass, as log-likelihoods are, is not touched at all: see `AppliedScaling`.

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
        least = 0.0 if self.way != "logit" else math.ulp(0.0)
        for expert, scale in self.scales.items():
            if not (math.isfinite(scale) and scale >= least):
                rule = "a finite number above 0" if least else "a finite number from 0 on"
                raise usage_error(f"{expert}: got β = {scale:g}, expected {rule}")


@dataclass
class AppliedScaling:
    """What has become of a reinforcement. active: whether the pass that is running is changed. passes: how many layers'
    passes have been."""

    active: bool
    passes: int = 0

    def check(self, where: str) -> None:
        """Raises SurgeryError where nothing was changed: what was measured is then the model as it is."""
        if not self.passes:
            raise usage_error(
                "no token was generated one by one, so that --phase generated changed nothing",
                where=where,
                hint="Use --phase all for what is scored in one pass, such as log-likelihoods and perplexity.",
            )


@contextmanager
def scaled_routing(live: LoadedModel, routers: Sequence[Router], how: ExpertScaling) -> Iterator[AppliedScaling]:
    """Inside, `live` runs with `how`; on exit it is exactly what it was.

    Raises:
        SurgeryError: an expert is not there; weights are not renormalised by this model (`renormalised`); a layer has
            fewer places than experts to be forced; its router's logits cannot be reached (`logit`); once it runs, β is
            too large for the weights' dtype.
    """
    check_experts(routers, how.scales, live.name)
    by_layer: dict[int, dict[int, float]] = {}
    for expert, scale in sorted(how.scales.items()):
        by_layer.setdefault(expert.layer, {})[expert.index] = scale
    concerned = [router for router in routers if router.layer in by_layer]
    if how.way == "renormalised":
        _check_renormalises(live, concerned)
    for router in concerned if how.way == "forced" else ():
        if len(by_layer[router.layer]) > router.top_k:
            raise usage_error(
                f"{len(by_layer[router.layer])} experts of layer {router.layer} are to be forced, where a token has "
                f"{router.top_k}",
                where=live.name,
            )
    state = AppliedScaling(active=how.phase == "all")

    def rewrite(layer: int, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor] | None:
        if not state.active:
            return None
        state.passes += 1
        return _rewritten(how.way, by_layer[layer], index, weights)

    with ExitStack() as stack:
        if how.phase == "generated":
            stack.enter_context(hooks(live.body.register_forward_pre_hook(_watching(state), with_kwargs=True)))
        if how.way == "logit":
            for router in concerned:
                stack.enter_context(_logits_raised(live, router, by_layer[router.layer], state))
        else:
            stack.enter_context(intercept_routing(concerned, rewrite))
        yield state


def check_experts(routers: Sequence[Router], experts: Mapping[Expert, float], where: str) -> None:
    """Raises SurgeryError where one of `experts` is not there."""
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


def _watching(state: AppliedScaling) -> Any:
    def see(module: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        cache = keywords.get("past_key_values")
        state.active = cache is not None and bool(cache.get_seq_length() > 0)

    return see


def _rewritten(
    way: ScalingMethod, scales: Mapping[int, float], index: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """index, weights: (T, k) → the same, changed."""
    most = torch.finfo(weights.dtype).max
    if too_large := [scale for scale in scales.values() if scale > most]:
        raise usage_error(f"β = {too_large[0]:g} does not fit the routing weights' dtype, {weights.dtype}")
    if way == "forced":
        index = _forced(scales, index, weights)
    changed = weights
    for expert, scale in scales.items():
        changed = torch.where(index == expert, changed * scale, changed)
    if way == "renormalised":
        before, after = (held.sum(1, keepdim=True, dtype=torch.float32) for held in (weights, changed))
        # Where all of a token's experts are scaled to 0 there is nothing to bring back.
        factor = torch.where(after > 0, before / after, torch.ones_like(after))
        changed = (changed.float() * factor).to(weights.dtype)
    return index, changed


def _forced(scales: Mapping[int, float], index: Tensor, weights: Tensor) -> Tensor:
    """index (T, k) with all of `scales` in every row. The last of a row is not always the weakest: that gives way."""
    index = index.clone()
    for expert in scales:
        free = torch.stack([index != other for other in scales]).all(0)
        weakest = weights.masked_fill(~free, math.inf).argmin(1, keepdim=True)
        absent = ~(index == expert).any(1, keepdim=True)
        index.scatter_(1, weakest, torch.where(absent, expert, index.gather(1, weakest)))
    return index


def _check_renormalises(live: LoadedModel, routers: Sequence[Router]) -> None:
    """Raises SurgeryError where the weights of different tokens have different sums."""
    sums: list[Tensor] = []

    def see(layer: int, index: Tensor, weights: Tensor) -> None:
        sums.append(weights.sum(1, dtype=torch.float32))

    with intercept_routing(routers, see):
        run_trial_forward(live)
    if any(bool(found.max() - found.min() > SAME_SUM * found.abs().max()) for found in sums):
        raise usage_error(
            "does not renormalise its routing weights, so that there is no β before renormalisation",
            where=live.name,
            hint="Use --way weight.",
        )


@contextmanager
def _logits_raised(
    live: LoadedModel, router: Router, scales: Mapping[int, float], state: AppliedScaling
) -> Iterator[None]:
    """Adds log β where the layer's router multiplies its states with its weight, (experts, D)."""
    owners = _owners(live, router)
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
    modes: list[_RaiseLogits] = []

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        mode = _RaiseLogits(offsets, live.width, state)
        modes.append(mode)
        mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        mode = modes.pop()
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        # Without output it was left by an error, which is the one to be told.
        if output is not None and not mode.seen:
            raise usage_error(
                f"the router of layer {router.layer} makes its logits in a way that cannot be watched",
                where=live.name,
                hint="Use --way weight.",
            )

    with hooks(owners[0].register_forward_pre_hook(enter), owners[0].register_forward_hook(leave, always_call=True)):
        yield


def _owners(live: LoadedModel, router: Router) -> list[nn.Module]:
    """The modules with a matrix (E, D), nearest to the experts: attention may have one of that shape, too."""
    layer = live.layers[router.layer]
    shape = (router.n_experts, live.width)
    paths = {
        path: module
        for path, module in layer.named_modules()
        if module is not router.experts and any(tuple(p.shape) == shape for p in module.parameters(recurse=False))
    }
    (place,) = (path for path, module in layer.named_modules() if module is router.experts)
    while place:
        place = place.rpartition(".")[0]
        if near := [module for path, module in paths.items() if not place or f"{path}.".startswith(f"{place}.")]:
            return near
    return []


class _RaiseLogits(TorchFunctionMode):
    """Adds `offsets` (E,) to what linear maps from D to E put out while it is entered."""

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
