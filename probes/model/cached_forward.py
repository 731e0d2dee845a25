"""A forward pass taken up again: at a layer, with what enters it; or behind a prefix, with its keys and values.

In come a live model, a probe and token ids; out come the probe's logits of passes that compute no more than they must,
and the reasons why a model cannot be run in such a way: both are tried against the plain pass, no family is listed.

Shapes: B rows of a batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from surgery.models import partial_forward as splice
from surgery.models.loaded_model import LoadedModel


class ProbeForward:
    """Reads the state and the probe's logit at the last position of every row, and what layers are resumed from."""

    def __init__(self, live: LoadedModel, weight: Tensor, bias: float) -> None:
        self.live, self.weight, self.bias = live, weight, bias

    def logits(self, ids: Tensor, cache: Any = None) -> Tensor:
        """(B,) of a run over `ids` (B, T), behind `cache` where there is one."""
        return self._logits_of(self.states(ids, cache)).to(ids.device)

    def states(self, ids: Tensor, cache: Any = None) -> Tensor:
        """The final norm's output of the same run: (B, D) fp32, where that norm lies."""
        return splice.final_states(self.live, partial(self.run, ids, cache))[:, -1].float()

    def inputs(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, list[Tensor], list[bool]]:
        """The logit; every layer's input (1, T, D); and whether each layer's output comes in a tuple."""
        states, inputs, tupled = splice.watch(self.live, partial(self.run, ids, cache))
        return self._logits_of(states[:, -1].float()).to(ids.device), inputs, tupled

    def _logits_of(self, states: Tensor) -> Tensor:
        return states @ self.weight.to(states.device) + self.bias

    def run(self, ids: Tensor, cache: Any = None) -> None:
        """A forward pass over `ids` (B, T), behind `cache` where there is one."""
        before = cache.get_seq_length() if cache is not None else 0
        length = before + ids.shape[1]
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
    """The keys and values of `prefix` (1, T) in every layer."""
    from transformers import DynamicCache

    cache = DynamicCache(config=live.model.config.get_text_config())
    live.body(input_ids=prefix, attention_mask=torch.ones_like(prefix), past_key_values=cache, use_cache=True)
    return cache


def restore_cache(cache: Any, kept: Sequence[dict[str, Any]], rows: int) -> None:
    """The cache as it was behind the prefix, in so many rows. Updates make new tensors, so the old ones are whole."""
    for layer, state in zip(cache.layers, kept, strict=True):
        vars(layer).clear()
        vars(layer).update(state)
        layer.keys = state["keys"].expand(rows, *state["keys"].shape[1:])
        layer.values = state["values"].expand(rows, *state["values"].shape[1:])


def why_not_resumable(reader: ProbeForward, ids: Tensor) -> str | None:
    """Why layers cannot be resumed on `ids` (1, T); None if they can."""
    return splice.fault(reader.live, ids, reader.run)


@torch.inference_mode()
def why_not_cacheable(reader: ProbeForward, ids: Tensor, last: int) -> str | None:
    """Why the last tokens of `ids` (1, T) cannot be run behind a cached prefix; None where they can."""
    if reader.live.skipped:
        return f"layer {reader.live.skipped[0]} has no attention heads that are understood"
    try:
        cache = prefill(reader.live, ids[:, :-last])
    except (TypeError, ValueError) as error:  # families with a cache of their own refuse ours (MiniMax)
        return str(error)
    if fault := _cache_fault(cache):
        return fault
    kept, tail = [dict(vars(layer)) for layer in cache.layers], ids[:, -last:]

    def over_tail() -> None:
        restore_cache(cache, kept, 1)
        reader.run(tail, cache)

    if not splice.is_near(reader.live, reader.states(ids), reader.states(tail, cache)):
        return "it gives another hidden state"
    return splice.layers_fault(reader.live, over_tail, range(1, len(reader.live.layers)))


def _cache_fault(cache: Any) -> str | None:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    for index, layer in enumerate(cache.layers):
        # No subclasses: those hold more than keys and values, which `restore_cache` knows nothing of.
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"layer {index} keeps other state than keys and values ({type(layer).__name__})"
        if not layer.is_initialized:
            return f"layer {index} keeps no keys and values of its own"
    return None
