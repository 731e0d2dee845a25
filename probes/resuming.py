"""A forward pass taken up again: at a layer, with what enters it; or behind a prefix, with its keys and values.

In come a live model, a probe and token ids; out come the probe's logits of passes that compute no more than they must,
and the reasons why a model cannot be run in such a way: both are tried against the plain pass, no family is listed.

Shapes: B rows of a batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgery.live import LiveModel, hidden_in, hidden_out, hooks

# Tokens that every layer is resumed on to see whether it can be: what layers hand each other shows on few.
TRIAL_TOKENS = 16
# How far a method's hidden state may be from the plain forward's, relative to its norm.
AGREEMENT = {torch.float32: 1e-4, torch.float64: 1e-8}


class Reader:
    """Reads the state and the probe's logit at the last position of every row, and what layers are resumed from."""

    def __init__(self, live: LiveModel, weight: Tensor, bias: float) -> None:
        self.live, self.weight, self.bias = live, weight, bias

    def logits(self, ids: Tensor, cache: Any = None) -> Tensor:
        """(B,) of a run over `ids` (B, T), behind `cache` where there is one."""
        return self._logits_of(self.states(ids, cache)).to(ids.device)

    def states(self, ids: Tensor, cache: Any = None) -> Tensor:
        """The final norm's output of the same run: (B, D) fp32, where that norm lies."""
        found: list[Tensor] = []

        def see(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            found.append(hidden_out(output)[:, -1].float())

        with hooks(self.live.final_norm.register_forward_hook(see)):
            self._run(ids, cache)
        return found[0]

    def inputs(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, list[Tensor], list[bool]]:
        """The logit; every layer's input (1, T, D); and whether each layer's output comes in a tuple."""
        states, entering, tupled = self.watch(ids, cache)
        return self._logits_of(states).to(ids.device), entering, tupled

    def watch(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, list[Tensor], list[bool]]:
        """As `inputs`, with the final norm's output instead of the logit."""
        entering: list[Tensor] = []
        tupled: list[bool] = []

        def see_in(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            entering.append(hidden_in(arguments, keywords).clone())  # some layers may add to it in place

        def see_out(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            tupled.append(isinstance(output, tuple))

        handles = [layer.register_forward_pre_hook(see_in, with_kwargs=True) for layer in self.live.layers]
        handles += [layer.register_forward_hook(see_out) for layer in self.live.layers]
        with hooks(*handles):
            states = self.states(ids, cache)
        return states, entering, tupled

    def _logits_of(self, states: Tensor) -> Tensor:
        return states @ self.weight.to(states.device) + self.bias

    def _run(self, ids: Tensor, cache: Any) -> None:
        before = cache.get_seq_length() if cache is not None else 0
        length = before + ids.shape[1]
        positions = torch.arange(before, length, device=ids.device).expand(len(ids), -1)
        mask = torch.ones(len(ids), length, dtype=torch.long, device=ids.device)
        self.live.body(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=cache is not None,
        )  # fmt: skip


@contextmanager
def resume_at(live: LiveModel, layer: int, entering: Tensor, tupled: Sequence[bool], rows: int) -> Iterator[None]:
    """Inside, the layers below `layer` are not computed: the last of them puts out `entering`, in so many rows."""
    skipped = live.layers[:layer]
    before = {module: vars(module).get("forward") for module in skipped}
    held = entering.expand(rows, -1, -1).contiguous()

    def standing_in(at: int) -> Callable[..., Any]:
        def forward(*arguments: Any, **keywords: Any) -> Any:
            out = held if at == layer - 1 else hidden_in(arguments, keywords)
            return (out,) if tupled[at] else out

        return forward

    for at, module in enumerate(skipped):
        module.forward = standing_in(at)
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:  # accelerate's hooks on models that are spread over devices stand here
                module.forward = forward


def prefix_cache(live: LiveModel, prefix: Tensor) -> Any:
    """The keys and values of `prefix` (1, T) in every layer."""
    from transformers import DynamicCache

    cache = DynamicCache(config=live.model.config.get_text_config())
    live.body(input_ids=prefix, attention_mask=torch.ones_like(prefix), past_key_values=cache, use_cache=True)
    return cache


def restore(cache: Any, kept: Sequence[dict[str, Any]], rows: int) -> None:
    """The cache as it was behind the prefix, in so many rows. Updates make new tensors, so the old ones are whole."""
    for layer, state in zip(cache.layers, kept, strict=True):
        vars(layer).clear()
        vars(layer).update(state)
        layer.keys = state["keys"].expand(rows, *state["keys"].shape[1:])
        layer.values = state["values"].expand(rows, *state["values"].shape[1:])


@torch.inference_mode()
def resuming_fault(reader: Reader, ids: Tensor) -> str | None:
    """Why layers cannot be resumed, seen on the first of `ids` (1, T), and at the last layer on all; None if they can.

    All layers on all tokens would cost half as many forward passes as there are layers, and show nothing more.
    """
    n_layers = len(reader.live.layers)
    few = _layers_fault(reader, ids[:, :TRIAL_TOKENS], range(1, n_layers), lambda: None)
    return few or _layers_fault(reader, ids, [n_layers - 1], lambda: None)


def _layers_fault(reader: Reader, ids: Tensor, layers: Iterable[int], cache: Callable[[], Any]) -> str | None:
    """Why some of `layers` cannot be resumed on `ids`, behind what `cache` gives, new for every pass."""
    plain, entering, tupled = reader.watch(ids, cache())
    if any(hidden.dim() != 3 for hidden in entering):
        return "it keeps another residual stream than one vector per token"
    for layer in layers:
        with resume_at(reader.live, layer, entering[layer], tupled, 1):
            try:
                near = _near(reader, plain, reader.states(ids, cache()))
            except (AttributeError, IndexError, KeyError, TypeError) as error:
                # Such as Gemma 4's later layers, which use the keys and values of earlier ones.
                return f"layer {layer} or a later one needs what those below compute ({error!r})"
            if not near:
                return "its layers take in more than the residual stream"
    return None


@torch.inference_mode()
def prefix_fault(reader: Reader, ids: Tensor, last: int) -> str | None:
    """Why the last tokens of `ids` (1, T) cannot be run behind a cached prefix; None where they can."""
    if reader.live.skipped:
        return f"layer {reader.live.skipped[0]} has no attention heads that are understood"
    try:
        cache = prefix_cache(reader.live, ids[:, :-last])
    except (TypeError, ValueError) as error:  # families with a cache of their own refuse ours (MiniMax)
        return str(error)
    if fault := _cache_fault(cache):
        return fault
    kept, tail = [dict(vars(layer)) for layer in cache.layers], ids[:, -last:]

    def whole_again() -> Any:
        restore(cache, kept, 1)
        return cache

    if not _near(reader, reader.states(ids), reader.states(tail, cache)):
        return "it gives another hidden state"
    return _layers_fault(reader, tail, range(1, len(reader.live.layers)), whole_again)


def _cache_fault(cache: Any) -> str | None:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    for index, layer in enumerate(cache.layers):
        # No subclasses: those hold more than keys and values, which `restore` knows nothing of.
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"layer {index} keeps other state than keys and values ({type(layer).__name__})"
        if not layer.is_initialized:
            return f"layer {index} keeps no keys and values of its own"
    return None


def _near(reader: Reader, plain: Tensor, states: Tensor) -> bool:
    tolerance = AGREEMENT.get(reader.live.model.dtype, 5e-2)
    return bool((states - plain).norm() <= tolerance * plain.norm())
