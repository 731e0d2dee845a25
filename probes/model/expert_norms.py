"""How much single experts add to the residual stream: ‖w_e · E_e(x)‖ ÷ ‖x‖, on average over the tokens they fire at.

In come routers, texts and experts; out comes a number for each. x is the layer's input. The module that applies the
experts is run once more for each of them, with all other weights at 0; what a family does to the sum of its experts
behind that module (Granite scales it, Gemma 4 takes its norm) is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def norm_ratios(
    live: LoadedModel,
    routers: Sequence[Router],
    sequences: Sequence[TokenSequence],
    experts: Sequence[Expert],
    *,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> dict[Expert, float | None]:
    """Expert → its mean ratio; None where it never fires in `sequences`."""
    by_layer = {router.layer: router for router in routers}

    def work(batch: TokenBatch) -> dict[Expert, tuple[float, int]]:
        inputs: dict[int, Tensor] = {}
        found: dict[Expert, tuple[float, int]] = {}
        real = batch.mask.flatten().bool()

        def keep(layer: int) -> Any:
            def see(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                inputs[layer] = hidden_in(arguments, keywords).flatten(0, -2).float().norm(dim=-1)

            return see

        def apart(router: Router, wanted: Sequence[Expert]) -> Any:
            def see(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
                index, weights = (router.given(place, arguments, keywords) for place in (router.index, router.weights))
                for expert in wanted:
                    chosen = index == expert.index
                    fires = chosen.any(1) & real.to(chosen.device)
                    if not bool(fires.any()):
                        continue
                    given = router.replaced(arguments, keywords, index, weights * chosen)
                    alone = hidden_out(module.forward(*given[0], **given[1])).flatten(0, -2).float().norm(dim=-1)
                    ratios = alone[fires] / inputs[router.layer].to(alone.device)[fires]
                    found[expert] = float(ratios.double().sum()), int(fires.sum())

            return see

        wanted = {layer: [expert for expert in experts if expert.layer == layer] for layer in by_layer}
        handles = [
            live.layers[layer].register_forward_pre_hook(keep(layer), with_kwargs=True)
            for layer, named in wanted.items()
            if named
        ]
        handles += [
            by_layer[layer].experts.register_forward_hook(apart(by_layer[layer], named), with_kwargs=True)
            for layer, named in wanted.items()
            if named
        ]
        with torch.inference_mode(), hooks(*handles):
            live.body(**batch.inputs(live.device), use_cache=False)
        return found

    batches = make_batches([sequence.ids for sequence in sequences], max_tokens=max_tokens or CPU_TOKENS)
    parts = map_over_ranks(
        batches, work, label="Measuring experts", size=lambda batch: len(batch.numbers), progress=progress
    )
    sums = {expert: [part[expert] for part in parts if expert in part] for expert in experts}
    return {
        expert: sum(total for total, _ in rows) / sum(count for _, count in rows) if rows else None
        for expert, rows in sums.items()
    }
