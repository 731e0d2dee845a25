"""Check that layers keep their kind when their numbers change, by comparing the modules that transformers creates.

Both models are created on the meta device, without memory for their weights. Two layers are of one kind if they have
the same modules, with parameters of the same shapes, and the same plain settings in them (a window, a kind of
attention, whether positions are used), except for their own numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.errors import listing
from surgery.growth.layers.random_init import build_model, layers_in, text_config

_PLAIN = (bool, int, float, str, type(None))
# State of a module, not of its layer's kind.
_NOT_SETTINGS = ("training",)


def layer_changes(before: Mapping[str, Any], after: Mapping[str, Any], order: Sequence[int], stack: str) -> list[str]:
    """Return sentences on what would change in the layers or outside them; none if everything stays the same.

    Args:
        before, after: the full configs.
        order: for each layer of the new model the old one that it is.
        stack: what stands before the number in the names of layers.

    Raises:
        SurgeryError: transformers cannot build the models, so that nothing is known.
    """
    old, new = _model_layers(before, max(order) + 1, stack), _model_layers(after, len(order), stack)
    changes = []
    if beside := _different(old.outside, new.outside):
        changes.append(f"{listing(beside, 3)} beside the layers would have to grow with their number.")
    for number, origin in enumerate(order):
        theirs, ours = _settings(old.layers[origin]), _settings(new.layers[number])
        # A layer may store its own number (for cache slots); that difference is meant.
        differing = [
            key
            for key in _different(theirs, ours)
            if not _is_number(theirs.get(key), origin) or not _is_number(ours.get(key), number)
        ]
        if differing:
            changes.append(
                f"layer {origin} would stand at {number}, and there be of another kind ({listing(differing, 3)}). "
                "Choose another place, or number of layers."
            )
            break  # the others would say the same
    return changes


@dataclass(frozen=True)
class _ModelLayers:
    """A model's layers, and the shapes of the parameters outside them."""

    layers: Sequence[nn.Module]
    outside: Mapping[str, object]


def _model_layers(config: Mapping[str, Any], count: int, stack: str) -> _ModelLayers:
    # A 70B model must be comparable on a laptop.
    with torch.device("meta"):
        model = build_model(text_config(config), seed=0)
    path, layers = layers_in(model, stack, count)
    outside = {name: tuple(x.shape) for name, x in model.named_parameters() if not name.startswith(f"{path}.")}
    return _ModelLayers(layers, outside)


def _is_number(value: object, number: int) -> bool:
    """Return whether a setting is the layer's own number, which a layer may store."""
    return type(value) is int and value == number


def _settings(layer: nn.Module) -> dict[str, object]:
    """Return the classes of a layer's modules, their plain attributes and the shapes of its parameters, by path."""
    settings: dict[str, object] = {}
    for path, module in layer.named_modules():
        start = f"{path}." if path else ""
        settings[path] = type(module).__name__
        settings |= {
            start + key: value
            for key, value in vars(module).items()
            if isinstance(value, _PLAIN) and not key.startswith("_") and key not in _NOT_SETTINGS
        }
    return settings | {name: tuple(x.shape) for name, x in layer.named_parameters()}


def _different(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    return sorted(key for key in one.keys() | other.keys() if one.get(key, "–") != other.get(key, "–"))
