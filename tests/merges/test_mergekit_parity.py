"""Whole configs against mergekit itself, where MERGEKIT names its program: slices, settings everywhere, tokenizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from support.architectures import add_tokenizer, sibling
from support.merges import config_of, logits_of, run, tensors_of
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from surgery.checkpoint.vocabulary import read_vocabulary

MERGEKIT = os.environ.get("MERGEKIT")
pytestmark = pytest.mark.skipif(not MERGEKIT, reason="set MERGEKIT to the path of mergekit-yaml")

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 4}

OVERLAPPING = """\
merge_method: passthrough
slices:
- sources: [{model: ⟨a⟩, layer_range: [0, 3]}]
- sources: [{model: ⟨b⟩, layer_range: [1, 4], parameters: {scale: [{filter: o_proj, value: 0.3}, {value: 1}]}}]
- sources: [{model: ⟨a⟩, layer_range: [2, 3]}]
"""
GRADIENTS = """\
merge_method: slerp
base_model: ⟨a⟩
slices:
- sources: [{model: ⟨a⟩, layer_range: [0, 4]}, {model: ⟨b⟩, layer_range: [0, 4]}]
parameters:
  t:
  - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
  - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
  - value: 0.5
"""
NESTED = """\
merge_method: task_arithmetic
base_model: ⟨base⟩
slices:
- sources:
  - {model: ⟨base⟩, layer_range: [0, 2]}
  - {model: ⟨a⟩, layer_range: [0, 2], parameters: {weight: [{filter: layers.1, value: 0.9}, {filter: mlp, value: 0.2}]}}
  - {model: ⟨b⟩, layer_range: [0, 2]}
  parameters: {weight: [0.1, 0.8]}
- sources:
  - {model: ⟨base⟩, layer_range: [1, 4]}
  - {model: ⟨a⟩, layer_range: [1, 4], parameters: {weight: [{filter: layers.1, value: 0.7}, {value: [0, 1]}]}}
  - {model: ⟨b⟩, layer_range: [1, 4], parameters: {weight: 0.35}}
parameters: {weight: 0.4, normalize: [{filter: q_proj, value: true}, {value: false}]}
"""
TIES = """\
merge_method: ties
base_model: ⟨base⟩
models:
- {model: ⟨a⟩, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
- {model: ⟨b⟩, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
parameters: {normalize: true, int8_mask: true}
"""
STOCK = """\
merge_method: model_stock
base_model: ⟨base⟩
models: [{model: ⟨base⟩}, {model: ⟨a⟩}, {model: ⟨b⟩}]
"""
SLICES = {"overlapping": OVERLAPPING, "gradients": GRADIENTS, "nested": NESTED, "ties": TIES, "stock": STOCK}
UNION = """\
merge_method: linear
models: [{model: ⟨a⟩, parameters: {weight: 0.7}}, {model: ⟨other⟩, parameters: {weight: 0.6}}]
"""
TOKENS = {
    "union": f"{UNION}tokenizer_source: union\n",
    "union with a base": UNION.replace("linear", "task_arithmetic") + "base_model: ⟨base⟩\ntokenizer_source: union\n",
    "base": UNION.replace("linear", "task_arithmetic") + "base_model: ⟨base⟩\ntokenizer_source: base\n",
    "other": f"{UNION}tokenizer_source: ⟨other⟩\n",
    "rules": UNION
    + """\
tokenizer:
  source: union
  pad_to_multiple_of: 16
  tokens:
    w7: {source: ⟨other⟩, force: true}
    n3: {source: {kind: zero}}
    n5: {source: {kind: model_token, model: ⟨a⟩, token: w9}}
""",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `a`, `b`: Llamas of four layers; `other`: one of them with some tokens of its own, in another order."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "base")
    add_tokenizer(folder / "base", 64)
    for seed, name in enumerate(("a", "b", "other"), start=1):
        add_tokenizer(sibling(folder / "base", folder / name, seed=seed, relative=0.1), 64)
    own = [f"n{i}" for i in range(8)]
    add_tokenizer(folder / "other", [*own, *(f"w{i}" for i in range(30, 3, -1))])
    return folder


def theirs(text: str, folder: Path, out: Path) -> dict[str, Tensor]:
    """What mergekit makes of the config `text`, in float32."""
    path = out.with_suffix(".yml")
    path.write_text(text.replace("⟨", f"{folder}/").replace("⟩", "") + "\ndtype: float32\n")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([str(MERGEKIT), path, out], check=True, capture_output=True, env=environment)
    return tensors_of(out)


def assert_equal(ours: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert ours.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("label", SLICES)
def test_layers_and_settings_meet_as_in_mergekit(label: str, models: Path, tmp_path: Path) -> None:
    other = theirs(SLICES[label], models, tmp_path / "theirs")
    run(f"{SLICES[label]}dtype: float32\n", models, tmp_path / "ours")
    assert_equal(tensors_of(tmp_path / "ours"), other)
    depths = [config_of(tmp_path / who)["num_hidden_layers"] for who in ("ours", "theirs")]
    assert depths[0] == depths[1]
    torch.testing.assert_close(logits_of(tmp_path / "ours"), logits_of(tmp_path / "theirs"))


def test_experts_are_stacked_as_in_mergekit(tmp_path: Path) -> None:
    """mergekit writes experts fused and renamed, so what the two models compute is compared."""
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=3, num_key_value_heads=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "a")
    add_tokenizer(sibling(tmp_path / "a", tmp_path / "b", seed=1), 64)
    add_tokenizer(tmp_path / "a", 64)
    theirs(OVERLAPPING, tmp_path, tmp_path / "theirs")
    run(f"{OVERLAPPING}dtype: float32\n", tmp_path, tmp_path / "ours")
    torch.testing.assert_close(logits_of(tmp_path / "ours"), logits_of(tmp_path / "theirs"))


@pytest.mark.parametrize("label", TOKENS)
def test_tokens_meet_as_in_mergekit(label: str, models: Path, tmp_path: Path) -> None:
    """mergekit numbers new tokens in the order of a set: rows are compared by their token."""
    other = theirs(TOKENS[label], models, tmp_path / "theirs")
    run(f"{TOKENS[label]}dtype: float32\n", models, tmp_path / "ours")
    mine = tensors_of(tmp_path / "ours")
    our_ids, their_ids = (read_vocabulary(tmp_path / who) for who in ("ours", "theirs"))
    assert our_ids is not None and their_ids is not None and our_ids.ids.keys() == their_ids.ids.keys()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        ours, rows = mine.pop(name), other.pop(name)
        assert ours.shape == rows.shape
        for token, row in our_ids.ids.items():
            torch.testing.assert_close(ours[row], rows[their_ids.ids[token]], rtol=1e-6, atol=1e-6, msg=token)
    assert_equal(mine, other)
