"""Read a model's config.json: check the types of what is used of it, and find numbers under the keys of families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.io.input_files import MB
from surgery.io.json_fields import (
    COUNT,
    FLAG,
    LIST,
    TABLE,
    TEXT,
    TEXTS,
    FieldKind,
    check_fields,
    whole_number,
)
from surgery.io.json_io import read_json

# For each number, the keys under which configs have it.
N_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LAYER_KINDS = ("layer_types", "layers_block_type")
N_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
N_KV_HEADS = ("num_key_value_heads", "n_head_kv", "kv_n_heads", "n_kv_heads", "num_kv_heads")
HEAD_DIM = ("v_head_dim", "head_dim")  # MLA's head_dim is the rotary part of the keys; values decide
HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
N_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_top_k",
    "moe_k",
)
NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "ffn_config", "attn_config")

CONFIG = "config.json"
# Of an ensemble, which has the configs of its members and the names of the tensors that they share. Others have 5 kB.
MAX_CONFIG_BYTES = 16 * MB
MAX_CONFIG_VALUES = 1_000_000

# Ten times and more of what any model has. What builds a model of a config counts to these numbers, so that a damaged
# one would keep it busy for ever. Some families give a number for each layer, or for each kind of input.
_MOST = {N_LAYERS: 10_000, N_EXPERTS: 100_000, HIDDEN: 10_000_000, ("vocab_size",): 50_000_000}
_MOST |= dict.fromkeys((("intermediate_size",), ("moe_intermediate_size",), ("n_inner",)), 10_000_000)
_MOST |= dict.fromkeys((N_HEADS, N_KV_HEADS, HEAD_DIM, EXPERTS_PER_TOKEN), 1_000_000)

_KINDS: Mapping[str, FieldKind] = {
    **{key: whole_number(most, or_several=keys != N_LAYERS) for keys, most in _MOST.items() for key in keys},
    "num_nextn_predict_layers": COUNT,
    "first_k_dense_replace": COUNT,
    "decoder_sparse_step": COUNT,
    "mlp_only_layers": LIST,
    **dict.fromkeys(LAYER_KINDS, LIST),
    "architectures": TEXTS,
    "model_type": TEXT,
    "tie_word_embeddings": FLAG,
    "quantization_config": TABLE,
    "auto_map": TABLE,
    **dict.fromkeys(NESTED, TABLE),
}


def read_config(path: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the config in `path`, or `missing` if there is no such file.

    Raises:
        SurgeryError: it cannot be read, is too large, or a value in it is of a type that it cannot have.
    """
    config = read_json(path, missing=missing, limit=MAX_CONFIG_BYTES, max_values=MAX_CONFIG_VALUES)
    _check(config, path, "")
    return config


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of the language model: in a multimodal one, nested values override outer ones."""
    for key in NESTED:
        if isinstance(nested := config.get(key), Mapping):
            rest = {name: value for name, value in config.items() if name != key}
            inner = {name: value for name, value in nested.items() if value is not None}
            return language_config({**rest, **inner})
    return config


def stated_tie(config: Mapping[str, Any]) -> bool | None:
    """Return whether the config says that the output head is the token embedding; None where it says nothing.

    Of a multimodal model either flag counts: transformers 5 reads the outer one, older versions the inner one.
    """
    stated = {config.get("tie_word_embeddings"), language_config(config).get("tie_word_embeddings")}
    return True if True in stated else False if False in stated else None


def number(config: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """Return the first of the keys `names` that is a positive whole number in the config."""
    # `type … is int`: true would pass for 1.
    values = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Return the number of layers that the config states, as a number or by a list of their kinds."""
    kinds = next((config[key] for key in LAYER_KINDS if isinstance(config.get(key), list)), None)
    return number(config, N_LAYERS) or (len(kinds) if kinds else None)


def _check(config: Mapping[str, Any], path: Path, inside: str) -> None:
    check_fields(config, _KINDS, where=path, inside=inside)
    for key in NESTED:
        if config.get(key) is not None:
            _check(config[key], path, f"{inside}.{key}" if inside else key)
