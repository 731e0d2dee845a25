"""The output's config.json: the template's, with the number of layers and what follows from it, and the vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from surgery.anatomy import Anatomy
from surgery.inspection import N_LAYERS, NESTED

_INDEX_LISTS = ("mlp_only_layers", "moe_layers", "no_rope_layer_indices")  # lists of layer numbers
_LEADING_DENSE = "first_k_dense_replace"


def with_layers(config: Mapping[str, Any], layers: Sequence[int], template: Anatomy) -> dict[str, Any]:
    """A config whose layer i is layer `layers[i]` of the template's.

    Changed are the number of layers, every list with one entry per layer, every list of layer numbers, and the number
    of leading dense layers.
    """
    changed = copy.deepcopy(dict(config))
    if list(layers) == list(range(template.layers)):
        return changed
    part = language_part(changed)
    for key, value in list(part.items()):
        if key in N_LAYERS and isinstance(value, int):
            part[key] = len(layers)
        elif key in _INDEX_LISTS and isinstance(value, list):
            part[key] = [new for new, old in enumerate(layers) if old in value]
        elif "layer" in key and isinstance(value, list) and len(value) == template.layers:
            part[key] = [value[old] for old in layers]
    if _LEADING_DENSE in part:
        dense = [old not in template.experts for old in layers]
        part[_LEADING_DENSE] = dense.index(False) if False in dense else len(dense)
    return changed


def language_part(config: dict[str, Any]) -> dict[str, Any]:
    """The dict inside `config`, not a copy, that holds the language model's numbers."""
    for key in NESTED:
        if isinstance(config.get(key), dict) and any(name in config[key] for name in N_LAYERS):
            return language_part(config[key])
    return config


def uneven_dense_layers(layers: Sequence[int], template: Anatomy) -> bool:
    """Whether a dense layer follows one with experts, which `first_k_dense_replace` cannot say."""
    dense = [old not in template.experts for old in layers]
    return False in dense and True in dense[dense.index(False) :]
