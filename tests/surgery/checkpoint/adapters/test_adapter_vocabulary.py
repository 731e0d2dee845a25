"""Adapters that were trained after tokens were added: the base is extended, with the adapter's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import load_adapter, logits, peft_merged, read_all, save_adapter, write_merged
from support.architectures import add_tokenizer, build
from support.merges import tensors_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.checkpoint.resolve import open_checkpoint
from surgery.errors import SurgeryError, SurgeryWarning
from surgery.vectors import extract

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:Setting `save_emb"
)
ROWS = 100
Q = {"target_modules": ["q_proj"], "r": 2}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    made = {name: build("llama", folder / name, dtype=torch.float32, tied=name == "tied") for name in ("llama", "tied")}
    for path in made.values():
        add_tokenizer(path)
    return made


def with_tokenizer(adapter: Path, rows: int = ROWS) -> Path:
    """Put a tokenizer with the base's tokens and further ones beside the adapter."""
    add_tokenizer(adapter, rows)
    return adapter


KINDS: dict[str, dict[str, Any]] = {
    "LoRA elsewhere": Q,
    "LoRA of both": {"target_modules": ["embed_tokens", "lm_head"], "r": 2},
    "both saved": {**Q, "modules_to_save": ["embed_tokens", "lm_head"]},
    "the embedding saved": {**Q, "modules_to_save": ["embed_tokens"]},
    "new tokens": {**Q, "trainable_token_indices": [97, 99]},
    "DoRA": {"target_modules": ["embed_tokens", "lm_head"], "r": 2, "use_dora": True},
}


@pytest.mark.parametrize("name", ["llama", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_base_is_extended_as_peft_needs_it(kind: str, name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases[name]
    adapter = with_tokenizer(save_adapter(base, tmp_path / "adapter", rows=ROWS, **KINDS[kind]))
    out = write_merged(adapter, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(out).eval()
    expected = load_adapter(base, adapter, rows=ROWS)
    torch.testing.assert_close(logits(found, ROWS), logits(expected, ROWS), rtol=1e-4, atol=1e-4)
    tensors, merged = tensors_of(out), peft_merged(base, adapter, rows=ROWS)
    for one, tensor in tensors.items():
        # PEFT's merge forgets that only one of a tied pair was adapted.
        if name == "llama" or "lora_embedding" not in str(load_file(adapter / "adapter_model.safetensors").keys()):
            torch.testing.assert_close(tensor, merged[one], rtol=2e-6, atol=2e-6, msg=one)
    assert tensors["model.embed_tokens.weight"].shape[0] == ROWS
    assert json.loads((out / "config.json").read_text())["vocab_size"] == ROWS
    assert len(AutoTokenizer.from_pretrained(out)) == ROWS
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (adapter / file).read_bytes()


@pytest.mark.parametrize("kind", ["both saved", "LoRA elsewhere"])
def test_trained_copy_counts_and_not_the_frozen_one(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Old versions of PEFT save modules_to_save.weight and original_module.weight, and nothing else."""
    adapter = with_tokenizer(save_adapter(bases["llama"], tmp_path / "adapter", rows=ROWS, **KINDS[kind]))
    expected = read_all(adapter)
    weights = adapter / "adapter_model.safetensors"
    stored = load_file(weights)
    changed = {}
    for name, tensor in stored.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            module = name.removesuffix(".weight")
            changed[f"{module}.modules_to_save.weight"] = tensor
            changed[f"{module}.original_module.weight"] = torch.full_like(tensor, 7)
        elif "original_module" not in name:
            changed[name] = tensor
    save_file(changed, weights)
    found = read_all(adapter)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_vector_of_an_extended_model_has_its_tokenizer(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = with_tokenizer(save_adapter(bases["llama"], tmp_path / "adapter", rows=ROWS, **KINDS["both saved"]))
    extract(adapter, bases["llama"], tmp_path / "vector", vocab="by-token")
    assert (tmp_path / "vector/donor/tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()


def test_same_rows_keep_the_base_s_tokenizer(bases: dict[str, Path], tmp_path: Path) -> None:
    """Trainers save the tokenizer with every adapter: where nothing is new, the base's files stay to the byte."""
    adapter = with_tokenizer(save_adapter(bases["llama"], tmp_path / "adapter", modules_to_save=["lm_head"], **Q), 96)
    (adapter / "tokenizer_config.json").write_text("{}")
    opened = open_checkpoint(adapter)
    assert opened.tokenizer_folder == bases["llama"]
    assert opened.side_files["tokenizer.json"] == bases["llama"] / "tokenizer.json"
    assert opened.side_files["config.json"] == bases["llama"] / "config.json"


def test_tokens_added_within_spare_rows_come_with_their_tokenizer(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype=torch.float32, tied=False)
    add_tokenizer(base, 90)
    adapter = with_tokenizer(save_adapter(base, tmp_path / "adapter", trainable_token_indices=[92, 93], **Q), 94)
    opened = open_checkpoint(adapter)
    assert opened.tokenizer_folder == adapter
    assert opened.config["vocab_size"] == 96
    plain = save_adapter(base, tmp_path / "plain", **Q)
    assert open_checkpoint(with_tokenizer(plain, 94)).tokenizer_folder == base


def test_rows_without_a_tokenizer_are_told(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(bases["llama"], tmp_path / "adapter", rows=ROWS, **Q)
    with pytest.warns(SurgeryWarning, match="has 100 rows for tokens, 4 more than the base, and no tokenizer"):
        opened = open_checkpoint(adapter)
    assert opened.tokenizer_folder == bases["llama"]


def test_vocabularies_that_contradict_each_other_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = with_tokenizer(save_adapter(bases["llama"], tmp_path / "adapter", rows=ROWS, **Q))
    weights = adapter / "adapter_model.safetensors"
    stored = load_file(weights)
    add_tokenizer(adapter, 103)
    with pytest.raises(SurgeryError, match="has a tokenizer with ids up to 102, and 100 rows for tokens"):
        open_checkpoint(adapter)
    save_file({name: x for name, x in stored.items() if "lm_head" not in name}, weights)
    with pytest.raises(SurgeryError, match=r'not in every tensor with a row per token: "lm_head\.weight" 96'):
        open_checkpoint(adapter)
    shutil.rmtree(adapter)
    adapter = save_adapter(bases["llama"], adapter, **{**Q, "trainable_token_indices": [90]})
    config = json.loads((adapter / "adapter_config.json").read_text())
    for indices, message in (
        ([96], "has a row for token 96, and .* has 96 rows\\. Name the right base"),
        ([1, 2], "the config names 2 tokens"),
        (None, "the config names no tokens"),
        ([-1], '"trainable_token_indices": got'),
        ("x", '"trainable_token_indices": got'),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": indices}))
        with pytest.raises(SurgeryError, match=message):
            open_checkpoint(adapter)


@pytest.mark.parametrize(
    "options",
    [
        KINDS["both saved"],
        KINDS["the embedding saved"],
        {**Q, "modules_to_save": ["lm_head"]},
        {**Q, "trainable_token_indices": [1, 2]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_tied_base_that_stores_its_head_is_the_same_model(
    options: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["tied"]
    adapter = save_adapter(base, tmp_path / "adapter", **options)
    shutil.copytree(base, tmp_path / "stored")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "stored/model.safetensors", {"format": "pt"})
    found = AutoModelForCausalLM.from_pretrained(
        write_merged(f"{tmp_path / 'stored'}+{adapter}", tmp_path / "out")
    ).eval()
    torch.testing.assert_close(logits(found, 96), logits(load_adapter(base, adapter), 96), rtol=1e-4, atol=1e-4)
