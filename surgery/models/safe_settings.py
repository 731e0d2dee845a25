"""Take out of a stranger's settings what would have transformers read, fetch or run anything else than was inspected.

`config.json`, `generation_config.json` and a tokenizer's settings go to transformers by way of this module only. What
says how a model computes stays; what names files, folders, repositories or code, and what decides for the caller how
the model is run, is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.quantised.quantisation import find_quantisation
from surgery.errors import SurgeryError

# Keys of a config that name another place of weights or code, kernels on the Hub, or how the caller wants it to run.
_CONFIG_KEYS = frozenset(
    {
        "adapter_config",
        "attn_implementation",
        "auto_map",
        "base_model_name_or_path",
        "custom_pipelines",
        "device_map",
        "distributed_config",
        "experts_implementation",
        "fusion_config",
        "gguf_file",
        "kernel_config",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "torchscript",
        "transformers_weights",
        "trust_remote_code",
        "use_kernels",
        "use_pretrained_backbone",
        "use_return_dict",
    }
)
_IMPLEMENTATION = re.compile(r"_(attn|experts)_implementation")
_NAMES_A_PLACE = re.compile(r"(?:^|_)(?:path|file|files|dir|folder|url|repo|repository|revision|commit_hash)$")
# Settings of a tokenizer that are arguments of its class: places, and objects that only a caller can have.
_TOKENIZER_KEYS = frozenset(
    {
        "cache_dir",
        "force_download",
        "gguf_file",
        "init_inputs",
        "local_files_only",
        "proxies",
        "source_spm",
        "subfolder",
        "target_spm",
        "token",
        "tokenizer_object",
        "trust_remote_code",
        "use_auth_token",
        "vocab",
        "merges",
    }
)
# What a generation config may say: how to choose tokens, and which tokens end a text.
_GENERATION_KEYS = frozenset(
    {
        "begin_suppress_tokens",
        "bos_token_id",
        "decoder_start_token_id",
        "do_sample",
        "eos_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "min_p",
        "pad_token_id",
        "repetition_penalty",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "transformers_version",
        "typical_p",
    }
)
# Formats of quantised weights that transformers reads from plain numbers alone, with no patterns or classes in them.
_QUANTISED = ("awq", "bitsandbytes", "fp8", "gptq", "mxfp4", "mxfp8", "nvfp4")
# Counts of a config: each layer and each expert has a tensor, or a row of one.
_COUNTS = re.compile(r"(?:^|_)n(?:um)?_.*(?:layers?|experts?|blocks?)$|^n_layers?$|(?:layers|experts|blocks)$|depth$")


def safe_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the config of `checkpoint` as transformers may read it.

    Raises:
        SurgeryError: it counts more layers or experts than there are tensors; its weights are quantised in a way that
            is not loaded here, or that it does not say.
    """
    where = "config.json" if checkpoint.folder is None else checkpoint.folder / "config.json"
    largest = max((size for tensor in checkpoint.tensors.values() for size in tensor.shape), default=0)
    # Built before a single weight is read, a thousand million layers would take all memory.
    most = max(len(checkpoint.tensors), largest)
    for key, value in _entries(checkpoint.config):
        if isinstance(value, int) and _COUNTS.search(key) and value > most:
            raise SurgeryError(f"{key} is {value:,}, more than its weights can hold", where=where)
        if key == "quantization_config" and value is not None:
            _check_quantisation(value, where)
    found = find_quantisation(checkpoint)
    if found is not None and not found.in_config:
        raise SurgeryError(
            f"does not say that its weights are quantised ({found.scheme}): their codes would run as weights. "
            f"Evidence: {found.evidence}",
            where=where,
            hint="Use the unquantised model, or put the quantization_config into config.json.",
        )
    config = _without_places(checkpoint.config)
    assert isinstance(config, dict)
    return config


def safe_tokenizer_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `tokenizer_config.json` or `special_tokens_map.json` says, without anything that names a place."""
    return {
        key: value
        for key, value in settings.items()
        if not (key in _TOKENIZER_KEYS or key.startswith("__") or _NAMES_A_PLACE.search(key))
    }


def safe_generation_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `generation_config.json` says about tokens and sampling."""
    return {key: value for key, value in settings.items() if key in _GENERATION_KEYS}


def _without_places(value: Any) -> Any:
    """Copy a config, its nested ones too (of text models, of an ensemble's members)."""
    if isinstance(value, Mapping):
        return {
            key: _without_places(item)
            for key, item in value.items()
            if not (key in _CONFIG_KEYS or _IMPLEMENTATION.match(key) or _NAMES_A_PLACE.search(key))
        }
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    return value


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key, item
            yield from _entries(item)
    elif isinstance(value, list):
        for item in value:
            yield from _entries(item)


def _check_quantisation(value: Any, where: object) -> None:
    method = value.get("quant_method") if isinstance(value, Mapping) else None
    # As transformers guesses it where old files do not say.
    if isinstance(value, Mapping) and method is None and (value.get("load_in_8bit") or value.get("load_in_4bit")):
        method = "bitsandbytes"
    if method not in _QUANTISED:
        raise SurgeryError(
            f"its weights are quantised as {str(method)[:40]!r}, and only {', '.join(_QUANTISED)} are loaded",
            where=where,
            hint="Use the unquantised model.",
        )
