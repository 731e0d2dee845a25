"""Measure how much single experts add to the residual stream: ‖w_e · E_e(x)‖ ÷ ‖x‖, averaged over their tokens.

x is the layer's input. The module that applies the experts is run again for each expert, with all other weights at 0.
What a family does to the sum of its experts behind that module (Granite scales it, Gemma 4 takes its norm) is not
included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from probes.data.examples import TokenSequence
from probes.model.activations import CPU_TOKENS, TokenBatch, make_batches
from probes.model.routers import Router
from surgery.checkpoint.selectors import Expert
from surgery.models.loaded_model import LoadedModel, hidden_in, hidden_out, hooks
from surgery.runtime.collectives import map_over_ranks
from surgery.runtime.progress import Progress, silent


@dataclass(frozen=True)
class _RatioSum:
    """The sum of an expert's ratios over the `count` tokens that it fires at."""

    total: float
    count: int


def norm_ratios(
    live: LoadedModel,
    routers: Sequence[Router],
    sequences: Sequence[TokenSequence],
    experts: Sequence[Expert],
    *,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> dict[Expert, float | None]:
    """Return expert → its mean ratio; None if it never fires in `sequences`."""
    by_layer = {router.layer: router for router in routers}
    wanted: dict[int, list[Expert]] = {}
    for expert in experts:
        wanted.setdefault(expert.layer, []).append(expert)

    def measure(batch: TokenBatch) -> dict[Expert, _RatioSum]:
        measurement = _Measurement(batch)
        handles = []
        for layer, of_layer in wanted.items():
            router = by_layer[layer]
            handles.append(
                live.layers[layer].register_forward_pre_hook(measurement.input_hook(layer), with_kwargs=True)
            )
            handles.append(
                router.experts.register_forward_hook(measurement.experts_hook(router, of_layer), with_kwargs=True)
            )
        with torch.inference_mode(), hooks(*handles):
            live.body(**batch.inputs(live.device), use_cache=False)
        return measurement.sums

    batches = make_batches([sequence.ids for sequence in sequences], max_tokens=max_tokens or CPU_TOKENS)
    parts = map_over_ranks(
        batches, measure, label="Measuring experts", size=lambda batch: len(batch.numbers), progress=progress
    )
    return {expert: _mean([part[expert] for part in parts if expert in part]) for expert in experts}


class _Measurement:
    """The hooks of one forward pass, and the sums that they find."""

    def __init__(self, batch: TokenBatch) -> None:
        self.is_token = batch.mask.flatten().bool()  # padding is routed, too, and must not count
        self.input_norms: dict[int, Tensor] = {}
        self.sums: dict[Expert, _RatioSum] = {}

    def input_hook(self, layer: int) -> Callable[..., None]:
        """Return a hook that keeps ‖x‖ of each token."""

        def see(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self.input_norms[layer] = hidden_in(arguments, keywords).flatten(0, -2).float().norm(dim=-1)

        return see

    def experts_hook(self, router: Router, experts: Sequence[Expert]) -> Callable[..., None]:
        """Return a hook that runs the experts' module again for each of `experts` alone."""

        def see(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            index, weights = (router.argument(place, arguments, keywords) for place in (router.index, router.weights))
            for expert in experts:
                chosen = index == expert.index
                fires = chosen.any(1) & self.is_token.to(chosen.device)
                if not bool(fires.any()):
                    continue
                inputs = router.replace_arguments(arguments, keywords, index, weights * chosen)
                # forward(), not a call of the module, which would run this hook again.
                alone = hidden_out(module.forward(*inputs[0], **inputs[1])).flatten(0, -2).float().norm(dim=-1)
                ratios = alone[fires] / self.input_norms[router.layer].to(alone.device)[fires]
                self.sums[expert] = _RatioSum(float(ratios.double().sum()), int(fires.sum()))

        return see


def _mean(sums: Sequence[_RatioSum]) -> float | None:
    if not sums:
        return None
    # A mean over tokens, not over batches: batches differ in how often the expert fires.
    return sum(part.total for part in sums) / sum(part.count for part in sums)
