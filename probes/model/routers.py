"""Where a mixture-of-experts model routes: which experts each token is sent to, and with what final weight.

In comes a live model, out come its `Router`s, one per layer with experts. They are found by watching one short run: the
module that is handed, beside hidden states, whole numbers below the number of experts and as many weights, is the one
that applies the experts. No family is listed; transformers 5 hands all of them the same two tensors, after selection
and after whatever renormalisation the family has.
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

TRIAL_TOKENS = 7  # odd and small: no number of experts, heads or widths is mistaken for it

# (indices, weights), both (tokens, k) → what the experts are given instead, or None to leave them.
Rewrite = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class Router:
    """A layer's routing. experts: the module that applies them. names: where among its arguments indices and weights
    are: a keyword, or a place. top_k: experts per token."""

    layer: int
    experts: nn.Module
    n_experts: int
    top_k: int
    index: str | int
    weights: str | int

    def given(self, place: str | int, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
        """The tensor at `place` among the arguments of `experts`."""
        value = arguments[place] if isinstance(place, int) else keywords[place]
        assert isinstance(value, Tensor)
        return value

    def replaced(
        self, arguments: tuple[Any, ...], keywords: Mapping[str, Any], index: Tensor, weights: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of `experts` with other indices and weights."""
        held, named = list(arguments), dict(keywords)
        for place, value in ((self.index, index), (self.weights, weights)):
            if isinstance(place, int):
                held[place] = value
            else:
                named[place] = value
        return tuple(held), named


def find_routers(live: LoadedModel) -> tuple[Router, ...]:
    """The routers of a model, by layer.

    Raises:
        SurgeryError: it has none: the model is dense, or routes in a way that no module shows.
    """
    found: dict[int, Router] = {}

    def watch(layer: int) -> Callable[..., None]:
        def see(module: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
            router = _read(layer, module, arguments, keywords)
            if router is not None:
                found[layer] = router  # an inner module that is handed the same tensors is the one that applies them

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
    """One forward pass over `TRIAL_TOKENS` tokens."""
    tokens = torch.arange(1, TRIAL_TOKENS + 1, device=live.device).unsqueeze(0)
    live.body(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)


@contextmanager
def intercept_routing(routers: Sequence[Router], rewrite: Rewrite) -> Iterator[None]:
    """Inside, `rewrite` sees every routing decision of every layer, and may change it."""

    def hooked(router: Router) -> Callable[..., Any]:
        def see(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            index, weights = (router.given(place, arguments, keywords) for place in (router.index, router.weights))
            changed = rewrite(router.layer, index, weights)
            return None if changed is None else router.replaced(arguments, keywords, *changed)

        return see

    with hooks(*(r.experts.register_forward_pre_hook(hooked(r), with_kwargs=True) for r in routers)):
        yield


def _read(layer: int, module: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Router | None:
    places: list[tuple[str | int, Any]] = [*enumerate(arguments), *keywords.items()]
    given = {
        place: value
        for place, value in places
        if isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == TRIAL_TOKENS
    }
    for index, numbers in given.items():
        if numbers.is_floating_point() or numbers.dtype == torch.bool:
            continue
        for place, weights in given.items():
            if weights.is_floating_point() and weights.shape == numbers.shape:
                count = _n_experts(module)
                if count is not None and int(numbers.min()) >= 0:
                    return Router(layer, module, count, int(numbers.shape[1]), index, place)
    return None


def _n_experts(module: nn.Module) -> int | None:
    stated = getattr(module, "num_experts", None)
    if isinstance(stated, int) and stated > 0:
        return stated
    solid = [int(parameter.shape[0]) for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    if solid:
        # LongCat's first matrices have rows for its zero experts, too, which compute nothing; its last have none.
        return min(solid)
    listed = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    if isinstance(module, nn.ModuleList):
        return len(module)
    return len(listed[0]) if len(listed) == 1 else None
