"""Find the routers of a mixture-of-experts model, and intercept its routing: each token's experts and final weights.

Routers are found by hooks on one short run: the module whose arguments are, beside hidden states, whole numbers below
the number of experts and as many weights, is the one that applies the experts. No family is listed; in transformers 5
all of them pass these two tensors, after selection and after whatever renormalisation the family has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import usage_error
from surgery.models.loaded_model import LoadedModel, hooks

# Odd and small: no number of experts, heads or widths is mistaken for it.
TRIAL_TOKENS = 7

# (layer, indices, weights), both (tokens, k) → what the experts get instead; None leaves them unchanged.
Rewrite = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class Router:
    """The routing of one layer.

    experts: the module that applies the experts.
    top_k: experts per token.
    index, weights: which of the module's arguments are the experts' indices and weights: a position, or a keyword.
    """

    layer: int
    experts: nn.Module
    n_experts: int
    top_k: int
    index: str | int
    weights: str | int

    def argument(self, place: str | int, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
        """Return the tensor at `place` among the arguments of `experts`."""
        value = arguments[place] if isinstance(place, int) else keywords[place]
        assert isinstance(value, Tensor)
        return value

    def replace_arguments(
        self, arguments: tuple[Any, ...], keywords: Mapping[str, Any], index: Tensor, weights: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of `experts` with other indices and weights."""
        positional, named = list(arguments), dict(keywords)
        for place, value in ((self.index, index), (self.weights, weights)):
            if isinstance(place, int):
                positional[place] = value
            else:
                named[place] = value
        return tuple(positional), named


def find_routers(live: LoadedModel) -> tuple[Router, ...]:
    """Return the routers of a model, by layer.

    Raises:
        SurgeryError: it has none: the model is dense, or no module has the routing among its arguments.
    """
    found: dict[int, Router] = {}

    def watch(layer: int) -> Callable[..., None]:
        def see(module: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
            router = _router_of(layer, module, arguments, keywords)
            if router is not None:
                # Outer modules come first: an inner one with the same arguments is the one that applies the experts.
                found[layer] = router

        return see

    handles = [
        module.register_forward_pre_hook(watch(index), with_kwargs=True)
        for index, layer in enumerate(live.layers)
        for module in layer.modules()
    ]
    with hooks(*handles):
        run_trial_forward(live)
    if not found:
        raise usage_error(
            "no layer routes tokens to experts in a way that can be watched: no module is handed experts' numbers and "
            "their weights",
            where=live.name,
            hint="Give a mixture-of-experts model; `surgery inspect` lists a model's experts.",
        )
    return tuple(found[layer] for layer in sorted(found))


@torch.inference_mode()
def run_trial_forward(live: LoadedModel) -> None:
    """Run one forward pass over `TRIAL_TOKENS` tokens."""
    # From 1: 0 is the padding of many vocabularies, and its embedding may be all zeros.
    tokens = torch.arange(1, TRIAL_TOKENS + 1, device=live.device).unsqueeze(0)
    live.body(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)


@contextmanager
def intercept_routing(routers: Sequence[Router], rewrite: Rewrite) -> Iterator[None]:
    """Call `rewrite` with every routing decision of every layer in the block; it may change them."""

    def hooked(router: Router) -> Callable[..., Any]:
        def see(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            index, weights = (router.argument(place, arguments, keywords) for place in (router.index, router.weights))
            changed = rewrite(router.layer, index, weights)
            return None if changed is None else router.replace_arguments(arguments, keywords, *changed)

        return see

    with hooks(*(r.experts.register_forward_pre_hook(hooked(r), with_kwargs=True) for r in routers)):
        yield


def _router_of(layer: int, module: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Router | None:
    places: list[tuple[str | int, Any]] = [*enumerate(arguments), *keywords.items()]
    candidates = {
        place: value
        for place, value in places
        if isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == TRIAL_TOKENS
    }
    for index, numbers in candidates.items():
        # A boolean mask of this shape is no list of experts.
        if numbers.is_floating_point() or numbers.dtype == torch.bool:
            continue
        for place, weights in candidates.items():
            if weights.is_floating_point() and weights.shape == numbers.shape:
                count = _n_experts(module)
                if count is not None and int(numbers.min()) >= 0:
                    return Router(layer, module, count, int(numbers.shape[1]), index, place)
    return None


def _n_experts(module: nn.Module) -> int | None:
    """Return how many experts `module` applies; None if it has none."""
    declared = getattr(module, "num_experts", None)
    if isinstance(declared, int) and declared > 0:
        return declared
    stacked = [int(parameter.shape[0]) for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    if stacked:
        # LongCat's first matrices have rows for its zero experts, too, which compute nothing; its last have none.
        return min(stacked)
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    if isinstance(module, nn.ModuleList):
        return len(module)
    return len(lists[0]) if len(lists) == 1 else None
