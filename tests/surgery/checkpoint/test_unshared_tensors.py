"""What a tensor is that only some models have: by name and shape, held against transformers' own lists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import transformers

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.checkpoint.unshared_tensors import UnsharedModel, is_computed, unshared_kind, unshared_model

LAYERS = 2


def tensor(name: str, shape: tuple[int, ...], dtype: str = "F32") -> StoredTensor:
    return StoredTensor(name, dtype, shape, Path("m.safetensors"), 0, 0)


def model(*more: StoredTensor, prefix: str = "model.", **config: object) -> UnsharedModel:
    """Return a language model of two layers with the tensors `more`."""
    own = [tensor(f"{prefix}embed_tokens.weight", (16, 4)), tensor("lm_head.weight", (16, 4))]
    for i in range(LAYERS):
        own += [tensor(f"{prefix}layers.{i}.self_attn.{w}_proj.weight", (4, 4)) for w in "qkvo"]
        own += [tensor(f"{prefix}layers.{i}.mlp.{w}_proj.weight", (4, 4)) for w in ("up", "down", "gate")]
        own += [tensor(f"{prefix}layers.{i}.input_layernorm.weight", (4,))]
    own += [tensor(f"{prefix}norm.weight", (4,)), *more]
    stated = {"num_hidden_layers": LAYERS, "vocab_size": 16, "hidden_size": 4, "architectures": ["LlamaForCausalLM"]}
    return unshared_model(Checkpoint("m", None, (), {t.name: t for t in own}, {**stated, **config}))


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (8,), "F32"),
        ("model.rotary_emb.original_inv_freq", (8,), "BF16"),
        ("transformer.rotary_pos_emb.inv_freq", (8,), "F16"),
        ("model.rotary_emb.full_attention_inv_freq", (8,), "F32"),
        ("model.layers.0.self_attn.rotary_emb.cos_cached", (1, 1, 16, 8), "F32"),
        ("model.layers.0.self_attn.rotary_emb.sin_cached", (16, 8), "F32"),
        ("rope.freqs", (8,), "F32"),
        ("freqs_cis", (16, 8), "C64"),
        ("transformer.h.0.attn.bias", (1, 1, 16, 16), "U8"),
        ("transformer.h.0.attn.bias", (1, 1, 16, 16), "F32"),
        ("transformer.h.0.attn.attention.bias", (1, 1, 16, 16), "BOOL"),
        ("transformer.h.0.crossattention.bias", (1, 1, 16, 16), "BOOL"),
        ("gpt_neox.layers.0.attention.bias", (1, 1, 16, 16), "BOOL"),
        ("gpt_neox.layers.0.attention.masked_bias", (), "F32"),
        ("transformer.h.0.attn.masked_bias", (1,), "F32"),
        ("transformer.h.0.attn.embed_positions", (16, 8), "F32"),
        ("model.embed_positions.weights", (16, 8), "F32"),
        ("model.decoder.embed_positions._float_tensor", (1,), "F32"),
        ("decoder.version", (1,), "F32"),
        ("bert.embeddings.position_ids", (1, 16), "I64"),
        ("vision_model.embeddings.position_ids", (16,), "I64"),
        ("bert.embeddings.token_type_ids", (1, 16), "I64"),
        ("swin.layers.0.attention.self.relative_position_index", (16, 16), "I64"),
        ("backbone.bn1.num_batches_tracked", (), "I64"),
        ("transformer.alibi", (4, 1, 16), "F32"),
        ("model.layers.0.self_attn.slope_rate", (4, 1, 1), "F32"),
        ("model.layers.0.self_attn.core_attention._extra_state", (0,), "U8"),
        ("preprocessor.featurizer.fb", (1, 80, 257), "F32"),
        ("model.causal_mask", (16, 16), "BOOL"),
        ("model.embed_tokens.embed_scale", (), "F32"),
    ],
)
def test_buffers_that_the_architecture_computes(name: str, shape: tuple[int, ...], dtype: str) -> None:
    assert is_computed(tensor(name, shape, dtype))
    holder = model(tensor(name, shape, dtype))
    assert unshared_kind(holder.checkpoint.tensors[name], holder, [model()]) == "computed"


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("transformer.h.0.attn.bias", (16,), "F32"),
        ("model.layers.0.self_attn.bias", (16, 16), "F32"),
        ("model.layers.0.mlp.bias", (1, 1, 16, 16), "F32"),
        ("model.layers.0.self_attn.q_proj.bias", (16,), "F32"),
        ("model.position_ids.weight", (16, 4), "F32"),
        ("model.embed_positions.weight", (16, 8), "F32"),
        ("model.inv_freq_proj", (16, 8), "F32"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (8, 4), "F32"),
        ("model.layers.0.mlp.mask", (16, 16), "F32"),
        ("model.position_ids", (1, 16), "F32"),
        ("model.layers.0.self_attn.masked_bias", (16,), "F32"),
        ("model.layers.0.self_attn.relative_attention_bias.weight", (32, 4), "F32"),
        ("model.tid2eid", (16, 4), "I64"),
    ],
)
def test_learnt_tensors_of_similar_names_are_none(name: str, shape: tuple[int, ...], dtype: str) -> None:
    assert not is_computed(tensor(name, shape, dtype))
    holder = model(tensor(name, shape, dtype))
    assert unshared_kind(holder.checkpoint.tensors[name], holder, [model()]) == "learnt"


@pytest.mark.parametrize(
    "name",
    [
        "mtp.fc.weight",
        "mtp.layers.0.self_attn.q_proj.weight",
        "model.mtp_block.0.mlp.up_proj.weight",
        "model.mtp_layers.0.final_layernorm.weight",
        "model.layers.2.eh_proj.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "v_head.summary.weight",
        "v_head.summary.bias",
        "value_head.weight",
        "score.weight",
        "classifier.bias",
        "qa_outputs.weight",
        "bert.pooler.dense.weight",
        "cls.predictions.transform.dense.weight",
        "model.visual.blocks.0.attn.qkv.weight",
        "model.visual.merger.mlp.0.weight",
        "model.multi_modal_projector.linear_1.weight",
        "model.image_newline",
        "audio_tower.layers.0.self_attn.k_proj.weight",
        "talker.model.layers.0.mlp.up_proj.weight",
    ],
)
def test_what_transformers_leaves_unread(name: str) -> None:
    holder = model(tensor(name, (4, 4)))
    assert unshared_kind(holder.checkpoint.tensors[name], holder, [model()]) == "ignored"


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.bias",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.1.mlp.score.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
        "something.weight",
    ],
)
def test_everything_else_is_learnt(name: str) -> None:
    holder = model(tensor(name, (16, 4)))
    lacking = model()
    bare = UnsharedModel(lacking.checkpoint, lacking.structure)
    assert unshared_kind(holder.checkpoint.tensors[name], holder, [bare]) == "learnt"


def test_a_part_of_a_tower_is_no_tower() -> None:
    holder = model(*(tensor(f"visual.blocks.{i}.attn.qkv.weight", (4, 4)) for i in range(2)))
    part = model(tensor("visual.blocks.0.attn.qkv.weight", (4, 4)))
    assert unshared_kind(holder.checkpoint.tensors["visual.blocks.1.attn.qkv.weight"], holder, [part]) == "learnt"


def test_a_head_is_ignored_where_the_others_are_bare_backbones() -> None:
    holder, bare = model(), model(architectures=["LlamaModel"])
    head = holder.checkpoint.tensors["lm_head.weight"]
    assert unshared_kind(head, holder, [bare]) == "ignored"
    assert unshared_kind(head, holder, [bare, model()]) == "learnt"
    assert unshared_kind(head, holder, [model(architectures=[])]) == "learnt"


def test_layers_that_use_the_keys_of_another_need_none_of_their_own() -> None:
    config = {"num_kv_shared_layers": 1}
    holder = model(**config)
    tensors = holder.checkpoint.tensors
    assert unshared_kind(tensors["model.layers.1.self_attn.k_proj.weight"], holder, [model(**config)]) == "ignored"
    assert unshared_kind(tensors["model.layers.0.self_attn.k_proj.weight"], holder, [model(**config)]) == "learnt"
    assert unshared_kind(tensors["model.layers.1.self_attn.q_proj.weight"], holder, [model(**config)]) == "learnt"


# Of models that generate no text: their tensors have no part in merges of language models.
OTHER_FIELDS = re.compile(
    r"memory_|mask_downsample|object_pointer|occlusion|temporal_positional|spatial_perceiver|tracker|detector|"
    r"backbone|fov_model|patch_embedding|flow_lm|learnt_padding|moe_gen|action_|time_embedder|proj_(\(|in|out)|"
    r"add_|norm_added|ctc_timestamp|perception|sound|audio2|no_memory"
)


def patterns() -> dict[str, list[str]]:
    """Return class → its `_keys_to_ignore_on_load_unexpected`, of the source of every model in transformers."""
    found: dict[str, list[str]] = {}
    for path in sorted((Path(transformers.__file__).parent / "models").rglob("modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if "_keys_to_ignore_on_load_unexpected" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ClassDef):
                continue
            for line in node.body:
                if (
                    isinstance(line, ast.Assign)
                    and ast.unparse(line.targets[0]) == "_keys_to_ignore_on_load_unexpected"
                ):
                    try:
                        found[node.name] = list(ast.literal_eval(line.value) or ())
                    except ValueError:  # the name of a constant, of a generator of pictures
                        continue
    return found


def example(pattern: str) -> StoredTensor:
    """Return a tensor that `pattern` matches, with the shape that a tensor of such a name has."""
    name = pattern.replace(r"\d+", "3").replace("(^|\\.)", "").replace("(language_model\\.)?", "")
    name = name.strip("^$").replace(".*", "").replace("\\.", ".").replace("\\", "").strip("._")
    leaf = name.rpartition(".")[2]
    name = name if name.startswith(("model.", "decoder", "encoder")) or "." not in name else f"model.{name}"
    if leaf in ("inv_freq", "original_inv_freq", "periods"):
        return tensor(f"model.rotary_emb.{leaf}", (8,))
    if leaf == "bias":
        return tensor(f"transformer.h.0.{name.removeprefix('model.')}", (1, 1, 16, 16), "U8")
    if leaf == "masked_bias":
        return tensor(f"transformer.h.0.{name.removeprefix('model.')}", ())
    if leaf == "relative_position_index":
        return tensor(name, (16, 16), "I64")
    if leaf == "num_batches_tracked":
        return tensor(name, (), "I64")
    if leaf in ("version", "extra_state"):
        return tensor(f"model.self_attn._{leaf}" if leaf == "extra_state" else name, (1,))
    if leaf == "lm_head":
        return tensor("lm_head.weight", (16, 4))
    if leaf == "featurizer":
        return tensor(f"{name}.fb", (1, 80, 257))
    return tensor(name if leaf in ("weight", "packing_position_embedding") else f"{name}.weight", (4, 4))


def test_every_pattern_of_transformers_is_known() -> None:
    listed = patterns()
    assert len(listed) > 50 and "Qwen3NextPreTrainedModel" in listed
    unknown = {}
    for name, each in listed.items():
        for pattern in each:
            if OTHER_FIELDS.search(pattern):
                continue
            one = example(pattern)
            # A layer that is named by its number comes after the last of the config.
            number = re.search(r"layers\.(\d+)", one.name)
            depth = {"num_hidden_layers": int(number[1])} if number and number[1] != "3" else {}
            positions = {"position_biased_input": False} if "position_embeddings" in pattern else {}
            prefix = "model.language_model." if "language_model" in one.name else "model."
            holder = model(one, prefix=prefix, **depth)
            lacking = model(prefix=prefix, architectures=[name], **depth, **positions)
            if unshared_kind(one, holder, [lacking]) == "learnt":
                unknown[f"{name}: {pattern}"] = one.name
    assert not unknown
