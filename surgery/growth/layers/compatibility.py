"""Whether layers stay what they are when they get other numbers: read off the modules that transformers makes of them.

In come the configs of a model before and after, and which old layer stands where; out come sentences on what would
change. Both models are made without memory for their weights. Two layers are alike if they have the same modules, with
parameters of the same shapes, and the same plain settings in them (a window, a kind of attention, whether positions are
used) but for their own numbers.
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
_NOT_SETTINGS = ("training",)


def layer_changes(before: Mapping[str, Any], after: Mapping[str, Any], order: Sequence[int], stack: str) -> list[str]:
    """What of the layers, or beside them, would not be what it was; nothing where all is well.

    Args:
        before, after: the configs, whole.
        order: for each layer afterwards the one before that it is.
        stack: where the layers lie in the names.

    Raises:
        SurgeryError: transformers cannot build the models, so that nothing is known.
    """
    old, new = _made(before, max(order) + 1, stack), _made(after, len(order), stack)
    found = []
    if beside := _different(old.beside, new.beside):
        found.append(f"{listing(beside, 3)} beside the layers would have to grow with their number.")
    for number, origin in enumerate(order):
        theirs, ours = _settings(old.layers[origin]), _settings(new.layers[number])
        differing = [
            key
            for key in _different(theirs, ours)
            if not _is_number(theirs.get(key), origin) or not _is_number(ours.get(key), number)
        ]
        if differing:
            found.append(
                f"layer {origin} would stand at {number}, and there be of another kind ({listing(differing, 3)}). "
                "Choose another place, or number of layers."
            )
            break
    return found


@dataclass(frozen=True)
class _Made:
    """A model's layers, and the shapes of the parameters that lie elsewhere in it."""

    layers: Sequence[nn.Module]
    beside: Mapping[str, object]


def _made(config: Mapping[str, Any], count: int, stack: str) -> _Made:
    with torch.device("meta"):
        model = build_model(text_config(config), seed=0)
    path, layers = layers_in(model, stack, count)
    beside = {name: tuple(x.shape) for name, x in model.named_parameters() if not name.startswith(f"{path}.")}
    return _Made(layers, beside)


def _is_number(value: object, number: int) -> bool:
    """Whether a setting is the layer's own number, which it may know."""
    return type(value) is int and value == number


def _settings(layer: nn.Module) -> dict[str, object]:
    found: dict[str, object] = {}
    for path, module in layer.named_modules():
        start = f"{path}." if path else ""
        found[path] = type(module).__name__
        found |= {
            start + key: value
            for key, value in vars(module).items()
            if isinstance(value, _PLAIN) and not key.startswith("_") and key not in _NOT_SETTINGS
        }
    return found | {name: tuple(x.shape) for name, x in layer.named_parameters()}


def _different(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    return sorted(key for key in one.keys() | other.keys() if one.get(key, "–") != other.get(key, "–"))
