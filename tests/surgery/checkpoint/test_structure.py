"""Structure is read off names and shapes, agrees with transformers' configs, and admits what it cannot tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.architectures import ARCHITECTURES, EXPERTS, VOCABULARY, build, sibling
from transformers import AutoModelForCausalLM

from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.structure import model_structure

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe", "gpt_oss")
EMBEDDING = {"gpt2": "transformer.wte.weight", "gpt_neox": "gpt_neox.embed_in.weight"}

Tensors = dict[str, torch.Tensor]


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> Path:
    """Applies `change` to the tensors of a one-file model."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def reconfigure(folder: Path, **values: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_structure_agrees_with_the_config(name: str, tmp_path: Path) -> None:
    config = ARCHITECTURES[name]()
    found = model_structure(open_checkpoint(build(name, tmp_path)))
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if name == "deepseek_v3":
        width = config.v_head_dim
    assert found.layers == config.num_hidden_layers
    assert (found.heads, found.head_dim) == (heads, width)
    assert found.kv_heads == getattr(config, "num_key_value_heads", heads)
    assert (found.hidden_size, found.vocab_size) == (config.hidden_size, VOCABULARY)
    assert found.tied is bool(config.tie_word_embeddings)
    assert found.token_embeddings == (EMBEDDING.get(name, "model.embed_tokens.weight"),)
    assert len(found.lm_heads) == (0 if found.tied else 1)
    assert found.not_understood == () and found.notes == ()
    assert all(layer.heads and layer.heads.transposed is (name == "gpt2") for layer in found.blocks)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_is_grouped_by_layer_or_place(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(build(name, tmp_path))
    found = model_structure(checkpoint)
    numbered = [f"layer {i}" for i in range(found.layers)]
    head = [] if found.tied else ["lm_head"]
    assert list(found.groups) == ["embed", *numbered, "final norm", *head]
    assert list(found.grouped(checkpoint.tensors)) == list(found.groups)
    for tensor in checkpoint.tensors:
        layer = found.layer_of(tensor)
        assert (found.group_of(tensor) == f"layer {layer}") == (layer is not None)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_routers_and_shared_experts(name: str, tmp_path: Path) -> None:
    found = model_structure(open_checkpoint(build(name, tmp_path)))
    assert (found.n_experts, found.experts_per_token) == (EXPERTS, 2)
    sparse = [1] if name in ("deepseek_v3", "glm4_moe") else [0, 1]
    assert list(found.experts) == sparse
    for experts in found.experts.values():
        assert experts.layout == ("fused" if name == "gpt_oss" else "per-expert")
        assert len(experts.down) == (1 if name == "gpt_oss" else EXPERTS)
        assert experts.routers and not set(experts.routers) & set(experts.names)
        assert bool(experts.shared) == (name in ("qwen2_moe", "deepseek_v3", "glm4_moe"))


def test_down_projections_are_in_the_order_of_the_experts(tmp_path: Path) -> None:
    def add_experts(tensors: Tensors) -> None:
        for name, tensor in list(tensors.items()):
            if ".experts.0." in name:
                for index in range(EXPERTS, 12):
                    tensors[name.replace(".experts.0.", f".experts.{index}.")] = tensor.clone()

    folder = reconfigure(rewrite(build("mixtral", tmp_path), add_experts), num_local_experts=12)
    experts = model_structure(open_checkpoint(folder)).experts[0]
    start = "model.layers.0.block_sparse_moe.experts"
    assert experts.down == tuple(f"{start}.{index}.w2.weight" for index in range(12))


def test_scales_and_biases_of_experts_are_no_down_projections(tmp_path: Path) -> None:
    def quantise(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".w2.weight")]:
            tensors[f"{name}_scale_inv"] = torch.ones(4, 6)
            tensors[f"{name.removesuffix('.weight')}.bias"] = torch.zeros(32)

    experts = model_structure(open_checkpoint(rewrite(build("mixtral", tmp_path), quantise))).experts[1]
    start = "model.layers.1.block_sparse_moe.experts"
    assert experts.down == tuple(f"{start}.{index}.w2.weight" for index in range(EXPERTS))
    assert f"{start}.0.w2.weight_scale_inv" in experts.names


def test_experts_may_lie_stacked_in_one_matrix(tmp_path: Path) -> None:
    def stack(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".block_sparse_moe.experts." in name]:
            del tensors[name]
        for layer in (0, 1):
            for word in ("w1", "v1", "w2"):
                tensors[f"model.layers.{layer}.ffn.experts.mlp.{word}"] = torch.zeros(EXPERTS * 48, 32)

    folder = rewrite(build("mixtral", tmp_path), stack)
    experts = model_structure(open_checkpoint(folder)).experts[0]
    assert (experts.layout, experts.n_experts) == ("fused", EXPERTS)
    assert experts.down == ("model.layers.0.ffn.experts.mlp.w2",)
    assert model_structure(open_checkpoint(reconfigure(folder, num_local_experts=5))).experts == {}


def test_experts_of_attention_are_not_those_of_the_layer(tmp_path: Path) -> None:
    def as_jetmoe(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".block_sparse_moe." in name]:
            del tensors[name]
        for layer in (0, 1):
            for place in ("self_attention.experts", "mlp"):
                tensors[f"model.layers.{layer}.{place}.input_linear.weight"] = torch.zeros(EXPERTS, 96, 32)
                tensors[f"model.layers.{layer}.{place}.output_linear.weight"] = torch.zeros(EXPERTS, 32, 48)
                tensors[f"model.layers.{layer}.{place}.router.layer.weight"] = torch.zeros(EXPERTS, 32)

    experts = model_structure(open_checkpoint(rewrite(build("mixtral", tmp_path), as_jetmoe))).experts[0]
    assert experts.down == ("model.layers.0.mlp.output_linear.weight",)
    assert experts.routers == ("model.layers.0.mlp.router.layer.weight",)


def test_layers_of_several_kinds_may_share_their_norm_alone(tmp_path: Path) -> None:
    def as_nemotron(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.")]:
            del tensors[name]
        for layer in range(4):
            tensors[f"model.layers.{layer}.norm.weight"] = torch.ones(32)
        tensors["model.layers.0.mixer.in_proj.weight"] = torch.zeros(164, 32)
        tensors["model.layers.2.mixer.o_proj.weight"] = torch.zeros(32, 32)
        for layer in (1, 3):
            for index in range(EXPERTS):
                tensors[f"model.layers.{layer}.mixer.experts.{index}.down_proj.weight"] = torch.zeros(32, 24)

    folder = rewrite(build("mixtral", tmp_path), as_nemotron)
    kinds = ["mamba", "moe", "attention", "moe"]
    for said in ({"num_hidden_layers": 4}, {"num_hidden_layers": None, "layers_block_type": kinds}):
        found = model_structure(open_checkpoint(reconfigure(folder, **said)))
        assert (found.stack, found.layers, list(found.experts)) == ("model.layers", 4, [1, 3])


def test_single_file_without_config(tmp_path: Path) -> None:
    build("llama", tmp_path)
    found = model_structure(open_checkpoint(tmp_path / "model.safetensors"))
    assert (found.layers, found.hidden_size, found.vocab_size) == (2, 32, VOCABULARY)
    assert found.token_embeddings == ("model.embed_tokens.weight",)
    assert found.lm_heads == ("lm_head.weight",)
    assert (found.heads, found.kv_heads, found.head_dim) == (None, None, None)
    assert found.not_understood == ()


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
def test_shapes_alone_give_heads_where_they_can(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    found = model_structure(open_checkpoint(tmp_path / "model.safetensors"))
    assert (found.heads, found.kv_heads, found.head_dim) == (4, 2, 16)


def test_position_embeddings_are_not_token_embeddings(tmp_path: Path) -> None:
    def as_many_positions_as_tokens(tensors: Tensors) -> None:
        tensors["transformer.wpe.weight"] = torch.zeros(VOCABULARY, 32)

    folder = rewrite(build("gpt2", tmp_path), as_many_positions_as_tokens)
    found = model_structure(open_checkpoint(folder))
    assert found.roles["transformer.wpe.weight"] == "position embedding"
    assert found.token_rows == ("transformer.wte.weight",)
    assert found.group_of("transformer.wpe.weight") == "embed"


def test_what_carries_no_known_word_is_not_understood(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.wobble.weight"] = torch.zeros(32, 32)
        tensors["model.compass"] = torch.zeros(VOCABULARY, 32)

    found = model_structure(open_checkpoint(rewrite(build("llama", tmp_path), add)))
    assert found.not_understood == ("model.compass", "model.layers.0.self_attn.wobble.weight")
    assert found.group_of("model.compass") == "other"
    assert found.layer_of("model.layers.0.self_attn.wobble.weight") == 0
    assert found.token_rows == ("lm_head.weight", "model.embed_tokens.weight")


def test_rows_that_are_no_vocabulary_are_not_taken_for_tokens(tmp_path: Path) -> None:
    def halve(tensors: Tensors) -> None:
        tensors["model.embed_tokens.weight"] = torch.zeros(VOCABULARY // 2, 32)

    found = model_structure(open_checkpoint(rewrite(build("llama", tmp_path), halve)))
    assert found.token_embeddings == ()
    assert found.not_understood == ("model.embed_tokens.weight",)
    assert "model.embed_tokens.weight has 48 rows, the config a vocab_size of 96" in found.notes[0]


def test_padded_rows_are_tokens_and_noted(tmp_path: Path) -> None:
    folder = reconfigure(build("qwen2", tmp_path), vocab_size=90)
    found = model_structure(open_checkpoint(folder))
    assert found.vocab_size == VOCABULARY and len(found.token_rows) == 2
    assert all("96 rows, the config a vocab_size of 90" in note for note in found.notes)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"num_hidden_layers": 5}, "the config says 5 layers, the names hold 2"),
        ({"num_key_value_heads": 4}, "the config says key-value heads 4, the shapes 2"),
        ({"head_dim": 8}, "the config says head width 8, the shapes 16"),
        ({"num_attention_heads": 7}, "has shape [32, 64], which 7 heads do not divide"),
        ({"hidden_size": 48}, "the config says hidden size 48, the shapes 32"),
    ],
)
def test_a_config_that_contradicts_the_shapes_is_noted(change: dict[str, int], note: str, tmp_path: Path) -> None:
    found = model_structure(open_checkpoint(reconfigure(build("qwen3", tmp_path), **change)))
    assert any(note in text for text in found.notes)
    assert found.layers == 2 and found.hidden_size == 32


def test_tied_is_told_from_a_lost_or_an_unneeded_head(tmp_path: Path) -> None:
    folder = build("llama", tmp_path, tied=True)
    assert model_structure(open_checkpoint(folder)).tied
    silent = json.loads((folder / "config.json").read_text())
    del silent["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(silent))
    assert model_structure(open_checkpoint(folder)).tied
    reconfigure(folder, architectures=["LlamaModel"])
    assert not model_structure(open_checkpoint(folder)).tied
    reconfigure(folder, tie_word_embeddings=False)
    lost = model_structure(open_checkpoint(folder))
    assert not lost.tied and "not tied, but none is stored" in lost.notes[0]


def test_layers_that_predict_ahead_are_not_layers(tmp_path: Path) -> None:
    folder = reconfigure(build("deepseek_v3", tmp_path), num_hidden_layers=1, num_nextn_predict_layers=1)
    found = model_structure(open_checkpoint(folder))
    assert found.layers == 1
    assert found.group_of("model.layers.1.self_attn.o_proj.weight") == "model.layers.1"
    assert found.not_understood == ()


def test_a_vision_tower_is_not_the_language_model(tmp_path: Path) -> None:
    def add_tower(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.")]:
            tensors[name.replace("model.layers", "model.visual.blocks")] = tensors[name].clone()
        tensors["model.visual.patch_embed.weight"] = torch.zeros(8, 8)

    folder = rewrite(build("llama", tmp_path), add_tower)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"text_config": config, "hidden_size": 7}))
    found = model_structure(open_checkpoint(folder))
    assert (found.stack, found.layers, found.heads) == ("model.layers", 2, 4)
    assert found.group_of("model.visual.patch_embed.weight") == "model.visual"
    assert found.not_understood == ()


def test_scales_of_quantised_weights_do_not_hide_the_heads(tmp_path: Path) -> None:
    def add_scales(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[f"{name}_scale_inv"] = torch.ones(1, 1)

    found = model_structure(open_checkpoint(rewrite(build("llama", tmp_path), add_scales)))
    assert (found.heads, found.kv_heads, found.not_understood) == (4, 2, ())


def test_no_layers_is_said_and_no_error(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3), "b.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    found = model_structure(open_checkpoint(tmp_path / "x.safetensors"))
    assert found.layers == 0 and found.heads is None and not found.tied
    assert found.not_understood == ("a", "b.weight")
    assert found.notes == ("no numbered stack of layers was found in the names",)


def test_part_of_a_model_keeps_its_layer_numbers(tmp_path: Path) -> None:
    def keep_last(tensors: Tensors) -> None:
        for name in [name for name in tensors if not name.startswith("model.layers.2.")]:
            del tensors[name]

    folder = rewrite(build("qwen2", tmp_path), keep_last)
    found = model_structure(open_checkpoint(folder / "model.safetensors"))
    assert [layer.index for layer in found.blocks] == [2]
    assert found.groups == ("layer 2",)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tiny_models_and_their_siblings_load(name: str, tmp_path: Path) -> None:
    folder = build(name, tmp_path / "a", max_shard_size="20KB", seed=3)
    moved = sibling(folder, tmp_path / "b", seed=1)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        with safe_open(moved / shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
        before, after = load_file(folder / shard), load_file(moved / shard)
        for key, tensor in before.items():
            change = (after[key].double() - tensor.double()).norm() / tensor.double().norm()
            assert after[key].dtype == tensor.dtype and 0.002 < change < 0.05
    model, report = AutoModelForCausalLM.from_pretrained(moved, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_building_is_deterministic(tmp_path: Path) -> None:
    first, again, other = (build("llama", tmp_path / n, seed=s) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, again, other)]
    assert weights[0] == weights[1] != weights[2]
