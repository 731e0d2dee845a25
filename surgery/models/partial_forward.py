"""A part of a model's stack is run: from a layer on, with what enters it, or up to one.

In come a live model and hidden states; a forward pass of the model itself then leaves out the layers that are not
asked for, so that masks, rotary embeddings and all else are what its family makes of them. Whether layers need more
than hidden states from those below is tried against the plain pass (`fault`): no family is listed.

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

# Tokens that every layer is resumed on to see whether it can be: what layers hand each other shows on few.
TRIAL_TOKENS = 16
# How far the final hidden states may be from the plain forward's, relative to their norm.
AGREEMENT = {torch.float32: 1e-4, torch.float64: 1e-8}

Forward = Callable[..., Any]


@contextmanager
def replace_input(live: LoadedModel, at: int, hidden: Tensor, tupled: Sequence[bool]) -> Iterator[None]:
    """Inside, forward passes do not compute the layers below `at`, and layer `at` takes in `hidden`.

    Works under autograd and autocast, and where the model lies inside another module (DDP). The embedding is still
    computed, and not used.

    Args:
        at: 0 to the number of layers; the latter leaves the final norm, which then takes in `hidden`.
        hidden: (B, T, D), where layer `at` lies. Families that add to the stream in place write into it.
        tupled: from `tupled_layers`.

    Raises:
        SurgeryError: there is no such layer.
    """
    _check(live, at, at)
    with _standing_in(_below(live, at, hidden, tupled)), _put_in(live, at, hidden):
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
    """The input of layer `stop` (B, T, D), given that of layer `start`, without gradients.

    Layers from `stop` on and the output head are not computed.

    Args:
        ids: (B, T).
        hidden: (B, T, D), the input of layer `start`; None takes it from `ids`, and `start` must be 0.
        stop: 0 to the number of layers; the latter gives the input of the final norm.
        tupled: from `tupled_layers`.

    Raises:
        SurgeryError: there is no such layer; `stop` is below `start`.
    """
    _check(live, start, stop)
    if hidden is None and start:
        raise usage_error(f"layer {start} cannot be started from token ids", where="start")
    if hidden is not None and start == stop:
        return hidden
    seen: list[Tensor] = []

    def see(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append(hidden_in(arguments, keywords))

    forwards = {layer: _passing(tupled[at]) for at, layer in enumerate(live.layers) if at >= stop}
    if hidden is not None:
        forwards |= _below(live, start, hidden, tupled)
    with (
        hooks(_part(live, stop).register_forward_pre_hook(see, with_kwargs=True)),
        _standing_in(forwards),
        _put_in(live, start, hidden),
    ):
        _run_body(live, ids)
    return seen[0]


@torch.no_grad()
def tupled_layers(live: LoadedModel) -> tuple[bool, ...]:
    """Whether each layer's output comes in a tuple, seen in one short run."""
    ids = torch.tensor([[1, 2, 3]], device=live.device)
    with own_draws(live):
        return tuple(watch(live, partial(_run_body, live, ids))[2])


def watch(live: LoadedModel, run: Callable[[], object]) -> tuple[Tensor, list[Tensor], list[bool]]:
    """What a forward pass `run` shows: the final norm's output (B, T, D); every layer's input (B, T, D); and whether
    each layer's output comes in a tuple."""
    inputs: list[Tensor] = []
    tupled: list[bool] = []

    def see_in(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        inputs.append(hidden_in(arguments, keywords).clone())  # some layers may add to it in place

    def see_out(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        tupled.append(isinstance(output, tuple))

    handles = [layer.register_forward_pre_hook(see_in, with_kwargs=True) for layer in live.layers]
    handles += [layer.register_forward_hook(see_out) for layer in live.layers]
    with hooks(*handles):
        states = final_states(live, run)
    return states, inputs, tupled


def final_states(live: LoadedModel, run: Callable[[], object]) -> Tensor:
    """The final norm's output in a forward pass `run`: (B, T, D)."""
    found: list[Tensor] = []

    def see(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        found.append(hidden_out(output))

    with hooks(live.final_norm.register_forward_hook(see)):
        run()
    return found[0]


@torch.no_grad()
def fault(live: LoadedModel, ids: Tensor, run: Callable[[Tensor], object] | None = None) -> str | None:
    """Why layers cannot be entered, seen on the first of `ids` (1, T), and at the last layer on all; None if they can.

    All layers on all tokens would cost half as many forward passes as there are layers, and show nothing more.

    Args:
        run: makes the forward pass over ids; by default that of the model's body, as in training.
    """
    forward, n_layers = run or partial(_run_body, live), len(live.layers)
    few = layers_fault(live, lambda: forward(ids[:, :TRIAL_TOKENS]), range(1, n_layers))
    return few or layers_fault(live, lambda: forward(ids), [n_layers - 1])


def layers_fault(live: LoadedModel, run: Callable[[], object], layers: Iterable[int]) -> str | None:
    """Why some of `layers` cannot be entered in the forward pass `run`, which is the same each time."""
    plain, inputs, tupled = watch(live, run)
    if any(hidden.dim() != 3 for hidden in inputs):
        return "it keeps another residual stream than one vector per token"
    for layer in layers:
        with replace_input(live, layer, inputs[layer], tupled):
            try:
                near = is_near(live, plain, final_states(live, run))
            except (AttributeError, IndexError, KeyError, TypeError) as error:
                # Such as Gemma 4's later layers, which use the keys and values of earlier ones.
                return f"layer {layer} or a later one needs what those below compute ({error!r})"
            if not near:
                return "its layers take in more than the residual stream"
    return None


def is_near(live: LoadedModel, plain: Tensor, states: Tensor) -> bool:
    """Whether final hidden states are the plain pass's, up to what the model's dtype rounds."""
    tolerance = AGREEMENT.get(live.model.dtype, 5e-2)
    return bool((states.float() - plain.float()).norm() <= tolerance * plain.float().norm())


@contextmanager
def own_draws(live: LoadedModel) -> Iterator[None]:
    """Inside, dropout draws random numbers that are not missing afterwards."""
    with torch.random.fork_rng([live.device] if live.device.type == "cuda" else []):
        yield


def _below(live: LoadedModel, at: int, hidden: Tensor, tupled: Sequence[bool]) -> dict[nn.Module, Forward]:
    """Forwards for the layers below `at`: the last of them puts out `hidden`, the others what they take in."""
    return {
        layer: _passing(tupled[below], hidden if below == at - 1 else None)
        for below, layer in enumerate(live.layers[:at])
    }


def _passing(tupled: bool, instead: Tensor | None = None) -> Forward:
    def forward(*arguments: Any, **keywords: Any) -> Any:
        out = hidden_in(arguments, keywords) if instead is None else instead
        return (out,) if tupled else out

    return forward


@contextmanager
def _standing_in(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, earlier in before.items():
            if earlier is None:
                del module.forward
            else:  # accelerate's hooks on models that are spread over devices stand here
                module.forward = earlier


@contextmanager
def _put_in(live: LoadedModel, at: int, hidden: Tensor | None) -> Iterator[None]:
    """Inside, layer 0 takes in `hidden`, if it is `at`: no layer below could put it out."""
    if at or hidden is None:
        yield
        return

    def put(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if arguments:
            return (hidden, *arguments[1:]), keywords
        return arguments, keywords | {"hidden_states": hidden}

    with hooks(live.layers[0].register_forward_pre_hook(put, with_kwargs=True)):
        yield


def _part(live: LoadedModel, at: int) -> nn.Module:
    return live.layers[at] if at < len(live.layers) else live.final_norm


def _run_body(live: LoadedModel, ids: Tensor) -> None:
    live.body(input_ids=ids, use_cache=False)


def _check(live: LoadedModel, start: int, stop: int) -> None:
    if not 0 <= start <= stop <= len(live.layers):
        raise usage_error(
            f"got layers {start} to {stop}, expected two numbers from 0 to {len(live.layers)}, in that order",
            where=live.name,
        )
