"""Configs of tiny mixtures of experts of 18 families, with 8 experts in a layer and 2 to a token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import transformers
from transformers import PretrainedConfig

EXPERTS, TOP_K, HIDDEN, VOCABULARY = 8, 2, 32, 96

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 1,
    "num_experts_per_tok": TOP_K,
}
NARROW = {**_COMMON, "moe_intermediate_size": 24}
_ROUTED = {
    **NARROW,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_LONGCAT = {
    "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 24,
    "num_layers": 2,
    "num_hidden_layers": 4,
    "moe_topk": TOP_K,
    "zero_expert_num": 2,
    "head_dim": 4,
    "n_routed_experts": EXPERTS,
    **_LATENT,
}


def _config(kind: str, values: Mapping[str, Any]) -> Callable[[], PretrainedConfig]:
    return lambda: getattr(transformers, kind)(**values)


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "mixtral": _config("MixtralConfig", {**_COMMON, "num_local_experts": EXPERTS}),
    "qwen2_moe": _config("Qwen2MoeConfig", {**NARROW, "num_experts": EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": _config("Qwen3MoeConfig", {**NARROW, "num_experts": EXPERTS, "norm_topk_prob": True, "head_dim": 16}),
    "olmoe": _config("OlmoeConfig", {**_COMMON, "num_experts": EXPERTS}),
    "deepseek_v2": _config("DeepseekV2Config", {**_ROUTED, **_LATENT, "q_lora_rank": None}),
    "deepseek_v3": _config("DeepseekV3Config", {**_ROUTED, **_LATENT, "head_dim": 4}),
    "glm4_moe": _config("Glm4MoeConfig", {**_ROUTED, "head_dim": 8}),
    "dots1": _config("Dots1Config", {**_ROUTED, "head_dim": 8}),
    "gpt_oss": _config(
        "GptOssConfig",
        {
            **_COMMON,
            "head_dim": 16,
            "num_local_experts": EXPERTS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "phimoe": _config("PhimoeConfig", {**_COMMON, "num_local_experts": EXPERTS}),
    "granitemoe": _config("GraniteMoeConfig", {**_COMMON, "num_local_experts": EXPERTS}),
    "ernie4_5_moe": _config(
        "Ernie4_5_MoeConfig",
        {
            **NARROW,
            "moe_num_experts": EXPERTS,
            "moe_k": TOP_K,
            "moe_layer_start_index": 0,
        },
    ),
    "hunyuan_v1_moe": _config(
        "HunYuanMoEV1Config",
        {
            **_COMMON,
            "num_experts": EXPERTS,
            "moe_topk": TOP_K,
            "head_dim": 8,
        },
    ),
    "minimax_m2": _config("MiniMaxM2Config", {**_COMMON, "num_local_experts": EXPERTS, "head_dim": 8}),
    "qwen3_next": _config(
        "Qwen3NextConfig",
        {
            **NARROW,
            **_LINEAR,
            "num_experts": EXPERTS,
            "shared_expert_intermediate_size": 40,
            "head_dim": 8,
        },
    ),
    "lfm2_moe": _config(
        "Lfm2MoeConfig",
        {
            **NARROW,
            "num_experts": EXPERTS,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention"],
        },
    ),
    "flex_olmo": _config("FlexOlmoConfig", {**_COMMON, "num_experts": EXPERTS}),
    "longcat_flash": _config("LongcatFlashConfig", {**_COMMON, **_LONGCAT}),
}
# Those that choose among experts that compute nothing, too, whose numbers are beyond those of the others.
WITH_ZERO_EXPERTS = ("longcat_flash",)
