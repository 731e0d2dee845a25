"""config.json of a merge whose layers stand elsewhere than in its models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.architectures import ARCHITECTURES, build
from support.merges import config_of, logits_of, run
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from surgery.checkpoint.config.config_layers import (
    inexpressible_layers,
    resize_vocabulary,
    untied,
    with_count,
    with_explicit_layer_kinds,
    with_layers,
)
from surgery.checkpoint.config.model_config import N_LAYERS
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.structure import ModelStructure, model_structure

STACKED = """\
merge_method: passthrough
slices:
- sources: [{model: ⟨a⟩, layer_range: [0, 2]}]
- sources: [{model: ⟨a⟩, layer_range: [1, 2]}]
- sources: [{model: ⟨a⟩, layer_range: [1, 2]}]
"""


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> ModelStructure:
    """Two layers, the first dense, the second with experts."""
    return model_structure(open_checkpoint(build("deepseek_v3", tmp_path_factory.mktemp("deepseek"))))


def test_layers_in_their_own_order_leave_the_config_as_it_is(shape: ModelStructure) -> None:
    config = {"num_hidden_layers": 2, "layer_types": ["a", "b"], "decoder_sparse_step": 2, "sliding_window_pattern": 6}
    assert with_layers(config, [0, 1], shape) == config
    assert inexpressible_layers(config, [0, 1], shape) == []


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 2}, {"num_hidden_layers": 4}),
        ({"n_layer": 2, "hidden_size": 2}, {"n_layer": 4, "hidden_size": 2}),
        ({"layer_types": ["s", "f"]}, {"layer_types": ["s", "f", "f", "s"]}),
        ({"block_types": ["s", "f"]}, {"block_types": ["s", "f", "f", "s"]}),
        ({"intermediate_size": [4, 8]}, {"intermediate_size": [4, 8, 8, 4]}),
        ({"eos_token_id": [1, 2]}, {"eos_token_id": [1, 2]}),
        ({"mlp_only_layers": [0]}, {"mlp_only_layers": [0, 3]}),
        ({"mlp_only_layers": []}, {"mlp_only_layers": []}),
        ({"moe_layers": [1]}, {"moe_layers": [1, 2]}),
        ({"decoder_sparse_step": 2}, {"decoder_sparse_step": 1, "mlp_only_layers": [0, 3]}),
        (
            {"text_config": {"num_hidden_layers": 2, "layer_types": ["s", "f"]}, "layer_types": ["x"]},
            {"text_config": {"num_hidden_layers": 4, "layer_types": ["s", "f", "f", "s"]}, "layer_types": ["x"]},
        ),
    ],
)
def test_what_follows_from_the_layers(config: dict[str, Any], expected: dict[str, Any], shape: ModelStructure) -> None:
    before = repr(config)
    assert with_layers(config, [0, 1, 1, 0], shape) == expected
    assert repr(config) == before, "the template's own config stays"


@pytest.mark.parametrize(("layers", "dense"), [([0, 1, 1], 1), ([0, 0, 1], 2), ([1, 1, 1], 0), ([0, 0, 0], 3)])
def test_dense_layers_that_lead_are_counted(layers: list[int], dense: int, shape: ModelStructure) -> None:
    config = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
    assert with_layers(config, layers, shape) == {"num_hidden_layers": 3, "first_k_dense_replace": dense}
    assert inexpressible_layers(config, layers, shape) == []


def test_what_no_config_can_say_is_said(shape: ModelStructure) -> None:
    assert inexpressible_layers({"first_k_dense_replace": 1}, [0, 1, 0], shape) == [
        "a dense layer would follow one with experts, which first_k_dense_replace cannot say. "
        "Choose other layer ranges."
    ]
    config: dict[str, Any] = {"sliding_window_pattern": 2}
    assert inexpressible_layers(config, [0, 1, 0, 1], shape) == []
    assert inexpressible_layers(config, [0, 1, 1], shape) == [
        "layer 1 would stand at 2, where sliding_window_pattern 2 makes it one of another kind. "
        "Move layers by multiples of 2."
    ]
    assert inexpressible_layers({**config, "layer_types": ["s", "f"]}, [0, 1, 1], shape) == []
    assert inexpressible_layers({"moe_layer_freq": 1}, [0, 1, 1], shape) == []


def test_an_untied_head_is_said_wherever_ties_are() -> None:
    assert untied({"vocab_size": 3}) == {"vocab_size": 3, "tie_word_embeddings": False}
    inner = {"num_hidden_layers": 2, "tie_word_embeddings": True}
    expected = {"tie_word_embeddings": False, "text_config": {"num_hidden_layers": 2, "tie_word_embeddings": False}}
    assert untied({"text_config": inner}) == expected
    assert inner["tie_word_embeddings"] is True


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_stack_of_twice_the_layers_runs(name: str, tmp_path: Path) -> None:
    build(name, tmp_path / "a")
    run(STACKED, tmp_path, tmp_path / "out")
    config, before = config_of(tmp_path / "out"), config_of(tmp_path / "a")
    depth = next(key for key in N_LAYERS if key in config)
    assert config[depth] == 4
    if "layer_types" in config:
        kinds = before["layer_types"]
        assert config["layer_types"] == [kinds[i] for i in (0, 1, 1, 1)]
    if "first_k_dense_replace" in config:
        assert config["first_k_dense_replace"] == 1
    logits_of(tmp_path / "out")


def test_layers_with_experts_by_a_period_become_a_list(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    config = Qwen3MoeConfig(
        **sizes, **heads, num_hidden_layers=2, num_experts=3, num_experts_per_tok=2, decoder_sparse_step=2
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "a")
    run(STACKED, tmp_path, tmp_path / "out")
    made = config_of(tmp_path / "out")
    assert (made["decoder_sparse_step"], made["mlp_only_layers"]) == (1, [0])
    logits_of(tmp_path / "out")


@pytest.mark.parametrize("key", ["num_kv_shared_layers", "scale_attn_by_inverse_layer_idx"])
def test_layers_that_hang_on_their_number_cannot_be_moved(key: str, shape: ModelStructure) -> None:
    assert inexpressible_layers({key: 1}, [0, 1], shape) == []
    assert inexpressible_layers({key: 0}, [0, 1, 1], shape) == []
    assert inexpressible_layers({key: 1}, [0, 1, 1], shape) == [
        f"{key} 1 makes layers depend on where they stand, so none can be moved or added."
    ]


def test_a_config_of_fewer_layers_keeps_the_first() -> None:
    config = {"num_hidden_layers": 3, "layer_types": ["s", "f", "s"], "mlp_only_layers": [0, 2], "eos_token_id": [1, 2]}
    assert with_count(config, 2) == {
        "num_hidden_layers": 2,
        "layer_types": ["s", "f"],
        "mlp_only_layers": [0],
        "eos_token_id": [1, 2],
    }


@pytest.mark.parametrize("count", [0, 4])
def test_a_config_of_no_layers_or_more_leaves_their_kinds_to_the_family(count: int) -> None:
    config = {"n_layer": 3, "layer_types": ["s", "f", "s"], "mlp_only_layers": [0, 2], "n_embd": 3}
    assert with_count(config, count) == {"n_layer": count, "n_embd": 3}
    assert config["n_layer"] == 3, "the config itself stays"


def test_kinds_that_a_family_fills_in_are_written_down() -> None:
    whole = {
        "layer_types": ["s", "f"],
        "moe_layers": [1],
        "layers_of_something_else": [1, 2, 3],
        "eos_token_id": [1, 2],
    }
    assert with_explicit_layer_kinds({"num_hidden_layers": 2}, whole, 2) == {
        "num_hidden_layers": 2,
        "layer_types": ["s", "f"],
        "moe_layers": [1],
    }
    own = {"text_config": {"num_hidden_layers": 2, "layer_types": ["f", "f"]}}
    assert with_explicit_layer_kinds(own, whole, 2) == {"text_config": {**own["text_config"], "moe_layers": [1]}}


def test_the_number_of_rows_is_stated_wherever_it_was() -> None:
    assert resize_vocabulary({"vocab_size": 5, "hidden_size": 4}, 8) == {"vocab_size": 8, "hidden_size": 4}
    nested = {"text_config": {"vocab_size": 5}, "vision_config": {"vocab_size": 7}}
    assert resize_vocabulary(nested, 8) == {"text_config": {"vocab_size": 8}, "vision_config": {"vocab_size": 7}}
    both = {"vocab_size": 5, "text_config": {"vocab_size": 5}}
    assert resize_vocabulary(both, 8) == {"vocab_size": 8, "text_config": {"vocab_size": 8}}
    assert resize_vocabulary({"text_config": {"hidden_size": 4}}, 8) == {
        "text_config": {"hidden_size": 4},
        "vocab_size": 8,
    }
