"""Run a part of a model's layers: from a layer on, given its input, or up to a layer.

The forward pass is the model's own, with the layers that are not needed replaced, so that masks, rotary embeddings and
all else are what its family makes of them. Whether layers need more than the hidden states of those below is tested
against a full pass (`resume_obstacle`): no family is listed.

Shapes: B rows of a batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import usage_error
from surgery.models.loaded_model import LoadedModel, hidden_in, hidden_out, hooks

# Tokens on which every layer is tested: what layers pass to each other shows on few.
TRIAL_TOKENS = 16
# How far the final hidden states may be from those of a full pass, relative to their norm.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}

Forward = Callable[..., Any]


@contextmanager
def replace_input(live: LoadedModel, at: int, hidden: Tensor, tupled: Sequence[bool]) -> Iterator[None]:
    """Replace the input of layer `at` by `hidden` in the block, where forward passes skip the layers below `at`.

    Works under autograd and autocast, and with the model inside another module (DDP). The embedding is still computed,
    but not used.

    Args:
        at: 0 to the number of layers; the latter leaves only the final norm, whose input is then `hidden`.
        hidden: (B, T, D), on the device of layer `at`. Families that add to the stream in place write into it.
        tupled: from `tupled_layers`.

    Raises:
        SurgeryError: there is no such layer.
    """
    _check_layers(live, at, at)
    with _replaced_forwards(_skips_below(live, at, hidden, tupled)), _replaced_first_input(live, at, hidden):
        yield


@torch.no_grad()
def partial_forward(
    live: LoadedModel,
    ids: Tensor,
    start: int,
    hidden: Tensor | None,
    stop: int,
    *,
    tupled: Sequence[bool],
) -> Tensor:
    """Return the input of layer `stop`, (B, T, D), given that of layer `start`, without gradients.

    Layers from `stop` on and the output head are not computed.

    Args:
        ids: (B, T).
        hidden: (B, T, D), the input of layer `start`; None takes it from `ids`, and `start` must be 0.
        stop: 0 to the number of layers; the latter gives the input of the final norm.
        tupled: from `tupled_layers`.

    Raises:
        SurgeryError: there is no such layer; `stop` is below `start`.
    """
    _check_layers(live, start, stop)
    if hidden is None and start:
        raise usage_error(f"layer {start} cannot be started from token ids", where="start")
    if hidden is not None and start == stop:
        return hidden
    captured: list[Tensor] = []

    def capture(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        captured.append(hidden_in(arguments, keywords))

    # Layers above are skipped, not left out: the family's own forward pass goes through all of them.
    forwards = {layer: _skip(tupled[at]) for at, layer in enumerate(live.layers) if at >= stop}
    if hidden is not None:
        forwards |= _skips_below(live, start, hidden, tupled)
    with (
        hooks(_module_at(live, stop).register_forward_pre_hook(capture, with_kwargs=True)),
        _replaced_forwards(forwards),
        _replaced_first_input(live, start, hidden),
    ):
        _run_body(live, ids)
    return captured[0]


@torch.no_grad()
def tupled_layers(live: LoadedModel) -> tuple[bool, ...]:
    """Return for each layer whether its output is a tuple, found by one short run."""
    # Any ids do that every vocabulary has: only the type of outputs is looked at.
    ids = torch.tensor([[1, 2, 3]], device=live.device)
    with isolated_rng(live):
        return tuple(trace_layers(live, partial(_run_body, live, ids))[2])


def trace_layers(live: LoadedModel, run: Callable[[], object]) -> tuple[Tensor, list[Tensor], list[bool]]:
    """Record a forward pass `run`.

    Returns the final norm's output (B, T, D), every layer's input (B, T, D), and whether each layer returns a tuple.
    """
    inputs: list[Tensor] = []
    tupled: list[bool] = []

    def record_input(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        inputs.append(hidden_in(arguments, keywords).clone())  # some layers may add to it in place

    def record_output(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        tupled.append(isinstance(output, tuple))

    handles = [layer.register_forward_pre_hook(record_input, with_kwargs=True) for layer in live.layers]
    handles += [layer.register_forward_hook(record_output) for layer in live.layers]
    with hooks(*handles):
        states = final_states(live, run)
    return states, inputs, tupled


def final_states(live: LoadedModel, run: Callable[[], object]) -> Tensor:
    """Return the final norm's output in a forward pass `run`: (B, T, D)."""
    captured: list[Tensor] = []

    def capture(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        captured.append(hidden_out(output))

    with hooks(live.final_norm.register_forward_hook(capture)):
        run()
    return captured[0]


@torch.no_grad()
def resume_obstacle(live: LoadedModel, ids: Tensor, run: Callable[[Tensor], object] | None = None) -> str | None:
    """Return why the model cannot be resumed at some layer; None if it can be at all of them.

    Every layer is tested on the first `TRIAL_TOKENS` of `ids` (1, T), and the last layer on all of them. Testing every
    layer on all tokens would cost half as many full passes as there are layers, and show nothing more.

    Args:
        run: the forward pass over ids; by default that of the model's body, as in training.
    """
    forward, n_layers = run or partial(_run_body, live), len(live.layers)
    obstacle = resume_obstacle_at(live, lambda: forward(ids[:, :TRIAL_TOKENS]), range(1, n_layers))
    return obstacle or resume_obstacle_at(live, lambda: forward(ids), [n_layers - 1])


def resume_obstacle_at(live: LoadedModel, run: Callable[[], object], layers: Iterable[int]) -> str | None:
    """Return why a forward pass `run`, repeatable, cannot be resumed at some of `layers`; None if it can."""
    plain, inputs, tupled = trace_layers(live, run)
    if any(hidden.dim() != 3 for hidden in inputs):
        return "it keeps another residual stream than one vector per token"
    for layer in layers:
        with replace_input(live, layer, inputs[layer], tupled):
            try:
                matches = is_close(live, plain, final_states(live, run))
            except (AttributeError, IndexError, KeyError, TypeError) as error:
                # For example Gemma 4's later layers, which use the keys and values of earlier ones.
                return f"layer {layer} or a later one needs what those below compute ({error!r})"
            if not matches:
                return "its layers take in more than the residual stream"
    return None


def is_close(live: LoadedModel, plain: Tensor, states: Tensor) -> bool:
    """Return whether final hidden states are those of the full pass `plain`, up to rounding in the model's dtype."""
    # bf16 has 8 bits: rounding adds up over the layers, and what a layer lacks shows as more than that.
    tolerance = TOLERANCE.get(live.model.dtype, 5e-2)
    return bool((states.float() - plain.float()).norm() <= tolerance * plain.float().norm())


@contextmanager
def isolated_rng(live: LoadedModel) -> Iterator[None]:
    """Restore torch's random state after the block, so that dropout in it changes no later draw."""
    with torch.random.fork_rng([live.device] if live.device.type == "cuda" else []):
        yield


def _skips_below(live: LoadedModel, at: int, hidden: Tensor, tupled: Sequence[bool]) -> dict[nn.Module, Forward]:
    """Return forwards for the layers below `at`: the last of them returns `hidden`, the others their input."""
    return {
        layer: _skip(tupled[below], hidden if below == at - 1 else None) for below, layer in enumerate(live.layers[:at])
    }


def _skip(tupled: bool, instead: Tensor | None = None) -> Forward:
    def forward(*arguments: Any, **keywords: Any) -> Any:
        out = hidden_in(arguments, keywords) if instead is None else instead
        return (out,) if tupled else out

    return forward


@contextmanager
def _replaced_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    # The forward of the instance, not of its class, which comes back once the instance's is deleted.
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, earlier in before.items():
            if earlier is None:
                del module.forward
            else:  # accelerate sets a forward of its own on models that are spread over devices
                module.forward = earlier


@contextmanager
def _replaced_first_input(live: LoadedModel, at: int, hidden: Tensor | None) -> Iterator[None]:
    """Replace the input of layer 0 by `hidden` if `at` is 0: there is no layer below that could return it."""
    if at or hidden is None:
        yield
        return

    def replace(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if arguments:
            return (hidden, *arguments[1:]), keywords
        return arguments, keywords | {"hidden_states": hidden}

    with hooks(live.layers[0].register_forward_pre_hook(replace, with_kwargs=True)):
        yield


def _module_at(live: LoadedModel, at: int) -> nn.Module:
    return live.layers[at] if at < len(live.layers) else live.final_norm


def _run_body(live: LoadedModel, ids: Tensor) -> None:
    # With a cache, the layers that are skipped would be missing in it.
    live.body(input_ids=ids, use_cache=False)


def _check_layers(live: LoadedModel, start: int, stop: int) -> None:
    if not 0 <= start <= stop <= len(live.layers):
        raise usage_error(
            f"got layers {start} to {stop}, expected two numbers from 0 to {len(live.layers)}, in that order",
            where=live.name,
        )
