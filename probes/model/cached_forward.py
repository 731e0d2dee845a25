"""Forward passes that compute only what is needed to read a probe: resumed at a layer, or behind a cached prefix.

Whether a model can be run in these ways is tested against its plain forward pass; no family is listed.

Shapes: B rows of a batch, T tokens, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from surgery.models import forward_pass
from surgery.models.loaded_model import LoadedModel

CacheState = list[dict[str, Any]]  # the attributes of each layer of a cache


class ProbeForward:
    """Run a model, and read a linear probe (`weight` (D,), `bias`) on the final norm's output at the last position."""

    def __init__(self, live: LoadedModel, weight: Tensor, bias: float) -> None:
        self.live, self.weight, self.bias = live, weight, bias

    def logits(self, ids: Tensor, cache: Any = None) -> Tensor:
        """Return the probe's logits (B,) of a run over `ids` (B, T), behind `cache` if there is one."""
        return self._logits_of(self.states(ids, cache)).to(ids.device)

    def states(self, ids: Tensor, cache: Any = None) -> Tensor:
        """Return the final norm's output of the same run: (B, D) fp32, on that norm's device."""
        return forward_pass.final_states(self.live, partial(self.run, ids, cache))[:, -1].float()

    def inputs(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, list[Tensor], list[bool]]:
        """Return the logit, every layer's input (1, T, D), and whether each layer's output comes in a tuple."""
        states, inputs, tupled = forward_pass.trace_layers(self.live, partial(self.run, ids, cache))
        return self._logits_of(states[:, -1].float()).to(ids.device), inputs, tupled

    def _logits_of(self, states: Tensor) -> Tensor:
        return states @ self.weight.to(states.device) + self.bias

    def run(self, ids: Tensor, cache: Any = None) -> None:
        """Run a forward pass over `ids` (B, T), behind `cache` if there is one."""
        before = cache.get_seq_length() if cache is not None else 0
        length = before + ids.shape[1]
        # Given explicitly, they continue behind the cache whatever a family would derive from the mask.
        positions = torch.arange(before, length, device=ids.device).expand(len(ids), -1)
        mask = torch.ones(len(ids), length, dtype=torch.long, device=ids.device)
        self.live.body(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )


def prefill(live: LoadedModel, prefix: Tensor) -> Any:
    """Return a cache with the keys and values of `prefix` (1, T) in every layer."""
    from transformers import DynamicCache

    cache = DynamicCache(config=live.model.config.get_text_config())
    live.body(input_ids=prefix, attention_mask=torch.ones_like(prefix), past_key_values=cache, use_cache=True)
    return cache


def cache_state(cache: Any) -> CacheState:
    """Return what `restore_cache` needs; tensors are not copied, because updates of a cache make new ones."""
    return [dict(vars(layer)) for layer in cache.layers]


def restore_cache(cache: Any, state: CacheState, rows: int) -> None:
    """Set `cache` back to `state`, with its single row expanded to so many rows."""
    for layer, attributes in zip(cache.layers, state, strict=True):
        vars(layer).clear()
        vars(layer).update(attributes)
        layer.keys = attributes["keys"].expand(rows, *attributes["keys"].shape[1:])
        layer.values = attributes["values"].expand(rows, *attributes["values"].shape[1:])


def why_not_resumable(forward: ProbeForward, ids: Tensor) -> str | None:
    """Return why layers cannot be resumed on `ids` (1, T); None if they can."""
    return forward_pass.resume_obstacle(forward.live, ids, forward.run)


@torch.inference_mode()
def why_not_cacheable(forward: ProbeForward, ids: Tensor, last: int) -> str | None:
    """Return why the last tokens of `ids` (1, T) cannot be run behind a cached prefix; None if they can."""
    live = forward.live
    if live.skipped:
        return f"layer {live.skipped[0]} has no attention heads that are understood"
    try:
        cache = prefill(live, ids[:, :-last])
    except (TypeError, ValueError) as error:  # families with a cache of their own reject ours (MiniMax)
        return str(error)
    if reason := _why_not_restorable(cache):
        return reason
    state, tail = cache_state(cache), ids[:, -last:]

    def run_tail() -> None:
        restore_cache(cache, state, 1)
        forward.run(tail, cache)

    if not forward_pass.is_close(live, forward.states(ids), forward.states(tail, cache)):
        return "it gives another hidden state"
    return forward_pass.resume_obstacle_at(live, run_tail, range(1, len(live.layers)))


def _why_not_restorable(cache: Any) -> str | None:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    for index, layer in enumerate(cache.layers):
        # No subclasses: they have more state than keys and values, which `restore_cache` would not expand.
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"layer {index} keeps other state than keys and values ({type(layer).__name__})"
        if not layer.is_initialized:
            return f"layer {index} keeps no keys and values of its own"
    return None
