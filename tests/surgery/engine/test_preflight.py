"""What differs between configs is told where it changes the function, once for each key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.architectures import build

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.config_differences import compared_configs
from surgery.engine.preflight import Preflight, check_config, check_configs

# A key that each family of section B has, and another value of it.
DIFFERENCES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_theta": 1_000_000.0}, "rope_theta"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling"),
    ("llama", {"max_position_embeddings": 4096}, "max_position_embeddings"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"rms_norm_eps": 1e-3}, "rms_norm_eps"),
    ("llama", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
    ("gemma2", {"attn_logit_softcapping": 20.0}, "attn_logit_softcapping"),
    ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping"),
    ("gemma2", {"sliding_window": 16}, "sliding_window"),
    ("gemma2", {"layer_types": ["full_attention"] * 26}, "layer_types"),
    ("gemma3_text", {"sliding_window_pattern": 2}, "layer_types"),
    ("gemma3_text", {"rope_local_base_freq": 500.0}, "rope_theta"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}, "sliding_window"),
    ("granite", {"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ("granite", {"attention_multiplier": 0.5}, "attention_multiplier"),
    ("granite", {"residual_multiplier": 0.22}, "residual_multiplier"),
    ("granite", {"logits_scaling": 8.0}, "logits_scaling"),
    ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok"),
    ("qwen3_moe", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("deepseek_v3", {"routed_scaling_factor": 1.0}, "routed_scaling_factor"),
    ("gpt_neox", {"rotary_pct": 1.0}, "partial_rotary_factor"),
    ("gpt2", {"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon"),
    ("phi3", {"original_max_position_embeddings": 2048}, "original_max_position_embeddings"),
    ("of_somebody", {"a_key_of_theirs": 3}, "a_key_of_theirs"),
]
HARMLESS: list[dict[str, Any]] = [
    {"use_cache": False, "transformers_version": "4.1", "_name_or_path": "x", "initializer_range": 0.5},
    {"attention_dropout": 0.1, "torch_dtype": "float16", "architectures": ["X"], "pretraining_tp": 2},
    {"eos_token_id": 7, "bos_token_id": [1, 2], "pad_token_id": None, "vocab_size": 9},
    {"output_router_logits": True, "router_aux_loss_coef": 0.5, "unsloth_version": "2024"},
    {"rope_theta": 10_000, "rope_scaling": None, "hidden_act": "silu", "mlp_bias": False},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(build("llama", tmp_path_factory.mktemp("model")))


def told(model: Checkpoint, ours: dict[str, Any], *others: dict[str, Any]) -> Preflight:
    preflight = Preflight()
    target = replace(model, ref="target", config=ours)
    check_configs(preflight, target, [(f"donor {i}", config) for i, config in enumerate(others, start=1)])
    return preflight


@pytest.mark.parametrize(("family", "change", "key"), DIFFERENCES)
@pytest.mark.parametrize("inside", [False, True])
def test_a_difference_is_told_with_both_values(
    family: str, change: dict[str, Any], key: str, inside: bool, model: Checkpoint
) -> None:
    plain, changed = {"model_type": family}, {"model_type": family, **change}
    if inside:
        # LLaVA takes any language model, of a type that it does not know as well.
        plain, changed = ({"model_type": "llava", "text_config": config} for config in (plain, changed))
    for ours, theirs in ((plain, changed), (changed, plain)):
        preflight = told(model, ours, theirs)
        assert list(preflight.errors) == []
        lines = [line for line in preflight.warnings if line.startswith(key)]
        assert len(lines) == 1
        assert "in target" in lines[0] and "in donor 1" in lines[0] and "OUT gets" in lines[0]


@pytest.mark.parametrize("change", HARMLESS)
@pytest.mark.parametrize("inside", [False, True])
def test_what_changes_nothing_is_not_told(change: dict[str, Any], inside: bool, model: Checkpoint) -> None:
    plain, changed = {"model_type": "llama"}, {"model_type": "llama", **change}
    if inside:
        plain, changed = ({"model_type": "llava", "text_config": config} for config in (plain, changed))
    assert told(model, plain, changed).warnings == told(model, changed, plain).warnings == []


def test_the_line_says_what_it_changes_and_what_the_output_gets(model: Checkpoint) -> None:
    ours, theirs = {"model_type": "llama"}, {"model_type": "llama", "rope_theta": 1e6}
    assert told(model, ours, theirs).warnings == [
        "rope_theta differs (changes positions): 10,000 in target; 1,000,000 in donor 1. "
        "OUT gets 10,000, as target has it."
    ]
    scaled = {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    assert told(model, scaled, ours).warnings == [
        'rope_scaling (rope_parameters) differs (changes positions): {"factor": 4.0, "rope_type": "linear"} in target; '
        'none in donor 1. OUT gets {"factor": 4.0, "rope_type": "linear"}, as target has it.'
    ]
    unknown = told(model, {"model_type": "llama", "new_thing": 3}, ours).warnings
    assert unknown == [
        "new_thing differs (may change the function): 3 in target; none in donor 1. OUT gets 3, as target has it."
    ]


def test_where_nothing_is_written_nothing_is_said_of_it() -> None:
    models = [("a", {"model_type": "llama"}), ("b", {"model_type": "llama", "tie_word_embeddings": True})]
    assert compared_configs(models) == ["tie_word_embeddings differs (changes the output head): false in a; true in b"]
    assert compared_configs([*models, ("c", {})]) == []


def test_many_models_are_grouped_by_value(model: Checkpoint) -> None:
    configs = [{"model_type": "llama", "rms_norm_eps": eps} for eps in (1e-5, 1e-6, 1e-5, 1e-4)]
    assert told(model, *configs).warnings == [
        "rms_norm_eps differs (changes numerics): 1e-05 in target, donor 2; 1e-06 in donor 1; 0.0001 in donor 3. "
        "OUT gets 1e-05, as target has it."
    ]


def test_long_lists_are_told_by_where_they_differ(model: Checkpoint) -> None:
    kinds = ["full_attention"] * 40
    ours, theirs = ({"model_type": "llama", "layer_types": kinds} for kinds in (kinds, [*kinds[:-1], "sliding"]))
    line = told(model, ours, theirs).warnings[0]
    assert "full_attention at 39 in target; sliding at 39 in donor 1" in line


def test_sizes_are_errors_wherever_they_lie(model: Checkpoint) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    ours, theirs = {"model_type": "llama", **sizes}, {"model_type": "llama", **sizes, "hidden_size": 96}
    assert list(told(model, ours, theirs).errors) == [
        "configs differ between target and donor 1: hidden_size 64 / 96, head_dim 16 / 24."
    ]
    inside = [{"model_type": "llava", "text_config": config} for config in (ours, theirs)]
    assert "hidden_size 64 / 96" in next(iter(told(model, *inside).errors))
    deeper = {**ours, "num_hidden_layers": 3}
    assert "num_hidden_layers 2 / 3" in next(iter(told(model, ours, deeper).errors))
    preflight = Preflight()
    check_config(preflight, replace(model, config=ours), deeper, "donor", any_depth=True)
    assert list(preflight.errors) == [] and preflight.warnings == []


def test_kinds_of_layers_are_compared_as_far_as_both_go_where_depths_differ(model: Checkpoint) -> None:
    ours = {"model_type": "gemma3_text", "num_hidden_layers": 6}
    preflight = Preflight()
    check_config(preflight, replace(model, config=ours), {**ours, "num_hidden_layers": 9}, "donor", any_depth=True)
    assert preflight.warnings == []
    other = {**ours, "num_hidden_layers": 9, "sliding_window_pattern": 2}
    check_config(preflight, replace(model, config=ours), other, "donor", any_depth=True)
    assert [line.split(" ")[0] for line in preflight.warnings] == ["layer_types"]


def test_other_families_are_refused(model: Checkpoint) -> None:
    errors = list(told(model, {"model_type": "llama"}, {"model_type": "gemma2"}).errors)
    assert errors == ["architectures differ: target is llama, donor 1 is gemma2. Use models of one family."]


def test_a_text_model_is_taken_beside_the_multimodal_one_that_holds_it(model: Checkpoint) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text = {"model_type": "qwen2", **sizes, "intermediate_size": 96, "vocab_size": 99, "rope_theta": 1e6}
    scaling = {"type": "mrope", "mrope_section": [2, 3, 3]}
    whole = {**text, "model_type": "qwen2_5_vl", "vision_config": {"depth": 2}, "rope_scaling": scaling}
    for ours, theirs in ((text, whole), (whole, text)):
        preflight = told(model, ours, theirs)
        assert list(preflight.errors) == []
        # The default of rms_norm_eps is 1e-6 in the one and 1e-5 in the other.
        assert [line.split(" ")[0] for line in preflight.warnings] == ["rms_norm_eps"]
    other = told(model, text, {**whole, "rope_theta": 5e5, "rms_norm_eps": 1e-6})
    assert [line.split(" ")[0] for line in other.warnings] == ["rope_theta"]
    refused = told(model, text, {**whole, "hidden_size": 96})
    assert "architectures differ: target is qwen2, donor 1 is qwen2_5_vl" in next(iter(refused.errors))


def test_models_without_a_config_are_not_compared(model: Checkpoint, tmp_path: Path) -> None:
    preflight = told(model, {"model_type": "llama"}, {})
    assert preflight.facts["architecture"] == "not compared: no config.json on both sides"
    assert preflight.warnings == [] and list(preflight.errors) == []
