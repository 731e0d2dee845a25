"""Edit config.json for another selection of layers, another vocabulary, or an output head of its own.

Configs state the kinds of layers in four ways: a list with one entry per layer, a list of layer numbers, a number of
dense layers before those with experts, or a period. The first three can be rewritten for any order of layers. A period
cannot, but a period of layers with experts can be replaced by a list of the dense layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from surgery.checkpoint.config.model_config import N_LAYERS, NESTED
from surgery.checkpoint.structure import ModelStructure

VOCAB_SIZE = "vocab_size"
# Lists with one entry per layer whose key does not contain "layer".
_PER_LAYER = ("block_types", "attention_types", "block_configs", "activation_sparsity_pattern", "intermediate_size")
_NUMBERS = ("mlp_only_layers", "moe_layers", "no_rope_layer_indices", "cross_attention_layers", "attn_layer_indices")
_LEADING_DENSE = "first_k_dense_replace"
_EXPERTS_EVERY, _DENSE = "decoder_sparse_step", "mlp_only_layers"
# Every n-th layer is of another kind, unless a list says otherwise.
_PERIODS = (
    *("sliding_window_pattern", "full_attention_interval", "no_rope_layer_interval", "global_attn_every_n_layers"),
    *("attn_layer_period", "expert_layer_period", "moe_layer_freq", "interleave_moe_layer_step"),
)
_KINDS = ("layer_types", "layers_block_type", "block_types")
# With these, what a layer does depends on its number, or on the number of layers, so that it cannot be moved.
_BY_NUMBER = ("num_kv_shared_layers", "scale_attn_by_inverse_layer_idx")


def with_layers(config: Mapping[str, Any], layers: Sequence[int], template: ModelStructure) -> dict[str, Any]:
    """Return a config whose layer i is layer `layers[i]` of the template's.

    Changed are the number of layers, every list with one entry per layer, every list of layer numbers, the number of
    leading dense layers, and the period of layers with experts, which becomes a list.
    """
    changed = copy.deepcopy(dict(config))
    if _in_order(layers, template):
        return changed
    part = language_part(changed)
    dense = [old not in template.experts for old in layers]
    for key, value in list(part.items()):
        if key in N_LAYERS and isinstance(value, int):
            part[key] = len(layers)
        elif key in _NUMBERS and isinstance(value, list):
            part[key] = [new for new, old in enumerate(layers) if old in value]
        elif _is_per_layer(key, value) and len(value) == template.layers:
            part[key] = [value[old] for old in layers]
    if _LEADING_DENSE in part:
        part[_LEADING_DENSE] = dense.index(False) if False in dense else len(dense)
    if _EXPERTS_EVERY in part:
        part |= {_EXPERTS_EVERY: 1, _DENSE: [new for new, is_dense in enumerate(dense) if is_dense]}
    return changed


def with_count(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return a config of the first `count` layers of `config`.

    If it has fewer, or `count` is 0, the lists of the layers' kinds are dropped: new layers are then of the kinds that
    the family has by default.
    """
    changed = copy.deepcopy(dict(config))
    part = language_part(changed)
    n_layers = next((part[key] for key in N_LAYERS if type(part.get(key)) is int), 0)
    for key, value in list(part.items()):
        if key in N_LAYERS and isinstance(value, int):
            part[key] = count
        elif not (_is_per_layer(key, value) or (key in _NUMBERS and isinstance(value, list))):
            continue
        # A list that is too short would leave layers without a kind; one that is missing means the family's default.
        elif not count or count > n_layers:
            del part[key]
        elif key in _NUMBERS:
            part[key] = [number for number in value if number < count]
        elif len(value) == n_layers:
            part[key] = value[:count]
    return changed


def with_explicit_layer_kinds(config: Mapping[str, Any], whole: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return a config with every list of the layers' kinds in it, those that `config` leaves to defaults included.

    Args:
        whole: the language part with every default filled in by the family's own code.
        layers: the number of layers of the model.
    """
    changed = copy.deepcopy(dict(config))
    part = language_part(changed)
    for key, value in whole.items():
        per_layer = _is_per_layer(key, value) and len(value) == layers
        if part.get(key) is None and (per_layer or (key in _NUMBERS and isinstance(value, list) and value)):
            part[key] = copy.deepcopy(value)
    return changed


def language_part(config: dict[str, Any]) -> dict[str, Any]:
    """Return the dict inside `config`, not a copy, with the language model's numbers."""
    for key in NESTED:
        if isinstance(config.get(key), dict) and any(name in config[key] for name in N_LAYERS):
            return language_part(config[key])
    return config


def with_tie(config: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """Return a config whose output head is the token embedding, or a tensor of its own."""
    changed = copy.deepcopy(dict(config))
    for part in (changed, language_part(changed)):
        # transformers 5 reads the outer flag of a multimodal model, older versions the inner one.
        if part is changed or "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = tied
    return changed


def resize_vocabulary(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return config.json with `vocab_size` = `size` rows wherever the language model's settings are."""

    def within(values: Mapping[str, Any]) -> dict[str, Any]:
        inner = {
            key: within(value) if key in NESTED and isinstance(value, dict) else value for key, value in values.items()
        }
        return {**inner, VOCAB_SIZE: size} if VOCAB_SIZE in inner else inner

    out = within(config)
    # Some configs leave the size to a default of their class, which would be the old one.
    return out if _states_size(out) else {**out, VOCAB_SIZE: size}


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose output head is a tensor of its own."""
    return with_tie(config, tied=False)


def inexpressible_layers(config: Mapping[str, Any], layers: Sequence[int], template: ModelStructure) -> list[str]:
    """Return why no config of this architecture can describe `layers`, as sentences; empty if `with_layers` can.

    Args:
        config: the template's.
    """
    if _in_order(layers, template):
        return []
    part = language_part(dict(config))
    dense = [old not in template.experts for old in layers]
    reasons = []
    if _LEADING_DENSE in part and False in dense and True in dense[dense.index(False) :]:
        reasons.append(
            f"a dense layer would follow one with experts, which {_LEADING_DENSE} cannot say. "
            "Choose other layer ranges."
        )
    reasons += [
        f"{key} {part[key]} makes layers depend on where they stand, so none can be moved or added."
        for key in _BY_NUMBER
        if part.get(key)
    ]
    # A list of the layers' kinds overrides any period, and `with_layers` rewrites it.
    if any(isinstance(part.get(key), list) for key in _KINDS):
        return reasons
    for key in _PERIODS:
        period = part.get(key)
        # A period of 1 makes all layers alike. Some families have a list under the same key, which can be rewritten.
        if type(period) is not int or period < 2:
            continue
        # A layer keeps its kind where its old and its new number have the same remainder.
        moved = [(new, old) for new, old in enumerate(layers) if new % period != old % period]
        if moved:
            new, old = moved[0]
            reasons.append(
                f"layer {old} would stand at {new}, where {key} {period} makes it one of another kind. "
                f"Move layers by multiples of {period}."
            )
    return reasons


def _is_per_layer(key: str, value: object) -> bool:
    return ("layer" in key or key in _PER_LAYER) and isinstance(value, list)


def _in_order(layers: Sequence[int], template: ModelStructure) -> bool:
    return list(layers) == list(range(template.layers))


def _states_size(config: Mapping[str, Any]) -> bool:
    return VOCAB_SIZE in config or any(
        _states_size(v) for k, v in config.items() if k in NESTED and isinstance(v, dict)
    )
