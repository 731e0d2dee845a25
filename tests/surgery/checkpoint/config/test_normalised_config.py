"""Configs that say the same are equal however they are spelled, and those that do not differ."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.config_defaults import made
from transformers import CONFIG_MAPPING, PreTrainedConfig

from surgery.checkpoint.config.config_defaults import config_class
from surgery.checkpoint.config.normalised_config import SYNONYMS, is_text_of, normalise_config
from surgery.engine.config_differences import NamedConfig, told_differences
from surgery.engine.config_effects import NOT_TOLD, effect_of

TYPES = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_5_text", "gemma", "gemma2"),
    *("gemma3_text", "phi3", "gpt2", "gpt_neox", "gpt_oss", "deepseek_v3", "granite", "granitemoe", "cohere2", "olmo2"),
    *("olmo3", "olmoe", "smollm3", "starcoder2", "stablelm", "falcon", "bloom", "opt", "mamba", "jamba", "modernbert"),
    *("qwen2_5_vl_text", "qwen3_vl_text", "llama4_text", "glm4_moe", "exaone4", "apertus", "bert", "t5", "arcee"),
)
MULTIMODAL = ("gemma3", "qwen2_5_vl", "qwen3_vl", "llava", "mistral3", "llama4", "paligemma", "internvl", "glm4v")
# Said by `layer_types`, `sliding_window` and `no_rope_layers`.
READ = {
    "use_sliding_window",
    "max_window_layers",
    "sliding_window_pattern",
    "no_rope_layer_interval",
}


def told(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return told_differences(NamedConfig("A", normalise_config(a)), [NamedConfig("B", normalise_config(b))])


def saved(model_type: str, keys: Mapping[str, Any], *, diff: bool) -> dict[str, Any]:
    """The config.json that transformers 5 writes for `keys`."""
    config = CONFIG_MAPPING[model_type](**copy.deepcopy(dict(keys)))
    return json.loads(config.to_json_string(use_diff=diff))


def old_spelling(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as transformers 4 wrote it: theta beside its scaling, `torch_dtype`, `type`."""
    old = dict(config)
    rope = old.pop("rope_parameters", None)
    if isinstance(rope, dict) and "rope_theta" in rope:
        rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
        old["rope_theta"] = int(rope["rope_theta"]) if rope["rope_theta"] > 100 else rope["rope_theta"]
        partial = rest.pop("partial_rotary_factor", None)
        old |= {} if partial is None else {"partial_rotary_factor": partial}
        scaled = rope.get("rope_type", "default") != "default"
        old["rope_scaling"] = {"type": rope["rope_type"], **rest} if scaled else None
    elif rope is not None:
        old["rope_parameters"] = rope
    old["torch_dtype"] = old.pop("dtype", "bfloat16")
    return old | {"transformers_version": "4.40.0", "use_cache": False, "_name_or_path": "somebody/model"}


@st.composite
def changes(draw: st.DrawFn, model_type: str) -> dict[str, Any]:
    """Some keys of a family with other values than its defaults."""
    known = config_class(model_type)
    assert known is not None
    plain = {
        k: v for k, v in known.defaults.items() if isinstance(v, bool | int | float) and effect_of(k) not in NOT_TOLD
    }
    chosen = draw(st.lists(st.sampled_from(sorted(plain)), max_size=4, unique=True)) if plain else []
    keys: dict[str, Any] = {}
    for key in chosen:
        value = plain[key]
        keys[key] = (not value) if isinstance(value, bool) else value * 2 + 2
    if "num_hidden_layers" in known.defaults and draw(st.booleans()):
        keys["num_hidden_layers"] = draw(st.integers(2, 9))
    if known.rope is not None and not isinstance(known.rope["theta"], dict) and "old_names" not in known.rope:
        theta = draw(st.sampled_from([None, 10_000, 500_000.0, 1e6]))
        keys |= {} if theta is None else {"rope_theta": theta}
        scaling = draw(
            st.sampled_from([None, {"rope_type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 4}])
        )
        keys |= {} if scaling is None else {"rope_scaling": scaling}
    return keys


def function_of(model_type: str, keys: Mapping[str, Any]) -> dict[str, Any] | None:
    """What transformers makes of `keys`, without what changes nothing."""
    whole = made(CONFIG_MAPPING[model_type], keys)
    if whole is None:
        return None
    told_keys = {key for key in whole if effect_of(SYNONYMS.get(key, key)) not in NOT_TOLD} | {"rope_parameters"}
    return {key: whole.get(key) for key in sorted(told_keys - READ) if not key.startswith("_") and key != "rope_theta"}


@pytest.mark.parametrize("model_type", TYPES)
@settings(max_examples=8)
@given(data=st.data())
def test_one_config_in_all_its_spellings_is_equal(model_type: str, data: st.DataObject) -> None:
    keys = data.draw(changes(model_type))
    if function_of(model_type, keys) is None:
        return  # transformers refuses it
    written = {**keys, "model_type": model_type}
    short, whole = (saved(model_type, keys, diff=diff) for diff in (True, False))
    for other in (short, whole, old_spelling(written)):
        assert told(written, other) == []
        assert told(other, written) == []
    if "rope_parameters" not in whole or "rope_theta" in whole["rope_parameters"]:
        assert told(whole, old_spelling(short)) == []


@pytest.mark.parametrize("model_type", TYPES)
@settings(max_examples=12)
@given(data=st.data())
def test_two_configs_differ_exactly_where_transformers_makes_others_of_them(
    model_type: str, data: st.DataObject
) -> None:
    first, second = data.draw(changes(model_type)), data.draw(changes(model_type))
    if "num_hidden_layers" in CONFIG_MAPPING[model_type]().to_dict():
        # Another number is another shape.
        first["num_hidden_layers"] = second["num_hidden_layers"] = 6
    a, b = function_of(model_type, first), function_of(model_type, second)
    if a is None or b is None:
        return
    lines = told({**first, "model_type": model_type}, {**second, "model_type": model_type})
    assert bool(lines) == (a != b), (first, second, lines)


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_configs_inside_others_are_filled_in_and_compared(model_type: str) -> None:
    config: PreTrainedConfig = CONFIG_MAPPING[model_type]()
    short, whole = (json.loads(config.to_json_string(use_diff=diff)) for diff in (True, False))
    assert told({"model_type": model_type}, whole) == told(short, whole) == told(whole, short) == []
    text, vision = copy.deepcopy(whole), copy.deepcopy(whole)
    text["text_config"]["rms_norm_eps"] = 0.125
    assert [line.split(" ")[0] for line in told(whole, text)] == ["rms_norm_eps"]
    eps = next(key for key in vision["vision_config"] if key.endswith(("_eps", "hidden_act")))
    vision["vision_config"][eps] = "relu" if eps == "hidden_act" else 0.125
    assert [line.split(" ")[0] for line in told(whole, vision)] == [f"vision_config.{eps}"]


def test_a_flat_config_of_before_is_that_with_the_text_inside() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    scaling = {"type": "mrope", "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "hidden_size": 32}
    flat = {**sizes, "rope_theta": 1e6, "rope_scaling": scaling, "max_window_layers": 28, "use_sliding_window": False}
    flat |= {"model_type": "qwen2_5_vl", "vision_config": vision, "image_token_id": 7, "tie_word_embeddings": False}
    new = saved("qwen2_5_vl", {k: v for k, v in flat.items() if k != "model_type"}, diff=False)
    assert "text_config" in new and told(flat, new) == told(new, flat) == []
    assert normalise_config(flat).language["hidden_size"] == 64
    changed = {**flat, "rope_theta": 5e5}
    assert [line.split(" ")[0] for line in told(changed, new)] == ["rope_theta"]


GEMMA = {"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window": 512}


@pytest.mark.parametrize(
    ("a", "b"),
    [
        # Gemma 3: a pattern and two thetas, or lists and parameters by kind of layer.
        (
            {**GEMMA, "sliding_window_pattern": 3, "rope_theta": 1_000_000, "rope_local_base_freq": 10_000},
            {
                **GEMMA,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
        ),
        # Qwen2: what windows would be where none is used.
        (
            {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28},
            {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": None, "max_window_layers": 21},
        ),
        # Names of families.
        ({"model_type": "gpt2", "n_positions": 512}, {"model_type": "gpt2", "max_position_embeddings": 512}),
        ({"model_type": "mixtral", "num_local_experts": 4}, {"model_type": "mixtral", "num_experts": 4}),
        ({"model_type": "gpt_neox", "rotary_pct": 0.25}, {"model_type": "gpt_neox", "rotary_emb_base": 10000}),
        ({"model_type": "bloom", "n_embed": 64}, {"model_type": "bloom", "hidden_size": 64}),
        # Numbers, nulls, names of functions, and infinities.
        ({"model_type": "llama", "rope_theta": 10000}, {"model_type": "llama", "rope_theta": 1e4}),
        ({"model_type": "llama", "rope_scaling": None}, {"model_type": "llama"}),
        ({"model_type": "llama", "hidden_act": "swish"}, {"model_type": "llama", "hidden_act": "silu"}),
        (
            {"model_type": "llama", "rope_scaling": {"type": "default"}, "head_dim": None},
            {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        ),
        # A length of before that is left out is the whole.
        (
            {"model_type": "llama", "rope_scaling": {"type": "yarn", "factor": 2.0}, "max_position_embeddings": 64},
            {
                "model_type": "llama",
                "max_position_embeddings": 64,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 2,
                    "original_max_position_embeddings": 64,
                    "rope_theta": 1e4,
                },
            },
        ),
        # Of nobody that transformers knows.
        ({"model_type": "mine", "num_local_experts": 4}, {"model_type": "mine", "num_experts": 4, "torch_dtype": "x"}),
        ({"model_type": "mine", "rope_theta": 5}, {"model_type": "mine", "rope_parameters": {"rope_theta": 5.0}}),
    ],
)
def test_spellings_of_one_value_are_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert told(a, b) == told(b, a) == []


def test_what_follows_from_others_is_filled_in() -> None:
    values = normalise_config({"model_type": "llama", "hidden_size": 96, "num_attention_heads": 6}).language
    assert (values["head_dim"], values["num_key_value_heads"], values["rope_theta"]) == (16, 6, 10_000.0)
    kinds = normalise_config({"model_type": "gpt_oss", "num_hidden_layers": 3}).language["layer_types"]
    assert kinds == ["sliding_attention", "full_attention", "sliding_attention"]


def test_a_text_model_is_that_of_a_multimodal_one_where_its_sizes_are() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 96, "head_dim": 16}
    text = {"model_type": "gemma3_text", **sizes}
    whole = {"model_type": "gemma3", "text_config": dict(text)}
    assert is_text_of(text, whole) and is_text_of(whole, text)
    assert not is_text_of({**text, "hidden_size": 32}, whole)
    assert not is_text_of({**text, "intermediate_size": 32}, whole)
    assert not is_text_of(text, text) and not is_text_of(whole, whole)
    qwen = {key: value for key, value in sizes.items() if key != "head_dim"}
    assert is_text_of({"model_type": "qwen2", **qwen}, {"model_type": "qwen2_5_vl", **qwen, "vision_config": {}})
    assert is_text_of({"model_type": "qwen3", **sizes}, {"model_type": "qwen3_vl", "text_config": sizes})
    assert is_text_of(
        {"model_type": "mistral", **sizes},
        {"model_type": "mistral3", "text_config": {"model_type": "mistral", **sizes}},
    )
    assert is_text_of(
        {"model_type": "llama", **sizes}, {"model_type": "llava", "text_config": {"model_type": "llama", **sizes}}
    )
    assert not is_text_of({"model_type": "llama", **sizes}, {"model_type": "qwen3_vl", "text_config": sizes})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["rope_theta", "rope_scaling", "rope_parameters", "layer_types", "text_config", "num_hidden_layers"]
)


@settings(max_examples=100)
@given(st.sampled_from([*TYPES, *MULTIMODAL, "mine"]), st.dictionaries(KEYS | st.text(max_size=8), JSON, max_size=6))
def test_any_values_are_compared(model_type: str, config: dict[str, Any]) -> None:
    config["model_type"] = model_type
    assert told(config, copy.deepcopy(config)) == []
    told(config, {"model_type": model_type})


def test_transformers_is_not_imported() -> None:
    code = (
        "import sys\nfrom surgery.checkpoint.config.normalised_config import normalise_config\n"
        "assert normalise_config({'model_type': 'llama'}).language['hidden_size'] == 4096\n"
        "assert not {'transformers', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
