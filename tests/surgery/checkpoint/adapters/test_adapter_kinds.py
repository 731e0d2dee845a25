"""Every kind of adapter that PEFT merges reads as PEFT merges it, in fp32 and bf16, and slice by slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import TrainableTokensConfig
from support.adapters import (
    assert_sliced_alike,
    load_adapter,
    logits,
    peft_merged,
    read_all,
    save_adapter,
    write_merged,
)
from support.architectures import build
from support.merges import tensors_of
from transformers import AutoModelForCausalLM

from surgery.checkpoint.resolve import open_checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:Setting `save_emb"
)
TOLERANCE = 2e-6
VOCABULARY = 96
Q = {"target_modules": ["q_proj", "o_proj"], "r": 4}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    made = {}
    for label, dtype in (("", torch.float32), (" bf16", torch.bfloat16)):
        made |= {
            f"llama{label}": build("llama", folder / f"llama{label}", dtype=dtype, tied=False),
            f"qwen2{label}": build("qwen2", folder / f"qwen2{label}", dtype=dtype),
            f"tied{label}": build("llama", folder / f"tied{label}", dtype=dtype, tied=True),
            f"gpt2{label}": build("gpt2", folder / f"gpt2{label}", dtype=dtype, tied=False),
        }
    return made


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "DoRA": ("llama", {**Q, "use_dora": True}),
    "DoRA of every layer, rank-stabilised": (
        "llama",
        {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    ),
    "DoRA of embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "DoRA of Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "DoRA of Conv1D, embedding and head": ("gpt2", {"target_modules": ["c_fc", "wte", "lm_head"], "use_dora": True}),
    "DoRA with biases": ("qwen2", {**Q, "use_dora": True, "bias": "all"}),
    "PiSSA": ("llama", {**Q, "init_lora_weights": "pissa", "lora_alpha": 3}),
    "PiSSA of grouped keys": ("llama", {"target_modules": ["q_proj", "k_proj"], "init_lora_weights": "pissa"}),
    "PiSSA of Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "init_lora_weights": "pissa"}),
    "PiSSA with patterns": (
        "llama",
        {**Q, "init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 5}},
    ),
    "PiSSA and DoRA": ("llama", {**Q, "init_lora_weights": "pissa", "use_dora": True}),
    "OLoRA": ("llama", {**Q, "init_lora_weights": "olora", "lora_alpha": 3}),
    "OLoRA, rank-stabilised": ("llama", {**Q, "init_lora_weights": "olora", "use_rslora": True}),
    "all biases": ("qwen2", {**Q, "bias": "all"}),
    "biases of LoRA's layers": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "biases of Conv1D": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "a bias of B": ("qwen2", {"target_modules": ["q_proj", "k_proj"], "lora_bias": True, "lora_alpha": 3}),
    "tokens": ("llama", {**Q, "trainable_token_indices": [1, 5, 95]}),
    "tokens of embedding and head": (
        "llama",
        {**Q, "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3]}},
    ),
    "tokens of a tied embedding": ("tied", {**Q, "trainable_token_indices": [4, 1]}),
    "tokens of a tied embedding by name": ("tied", {**Q, "trainable_token_indices": {"embed_tokens": [4, 1]}}),
    "the same tokens of both": ("tied", {**Q, "trainable_token_indices": {"embed_tokens": [1], "lm_head": [1]}}),
    "a tied embedding saved": ("tied", {**Q, "modules_to_save": ["embed_tokens"]}),
    "a tied head saved": ("tied", {**Q, "modules_to_save": ["lm_head"]}),
    "both of a tied pair saved": ("tied", {**Q, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "a tied pair saved as one": ("tied", {**Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "some layers": ("llama", {**Q, "layers_to_transform": [1]}),
    "all but some modules": ("llama", {**Q, "exclude_modules": ["model.layers.0.self_attn.o_proj"]}),
}


@pytest.mark.parametrize("dtype", ["", " bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapter_reads_and_is_written_as_peft_merges_it(
    kind: str, dtype: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    name, options = KINDS[kind]
    base = bases[name + dtype]
    adapter = save_adapter(base, tmp_path / "adapter", **options)
    expected, plain, found = peft_merged(base, adapter), read_all(base), read_all(adapter)
    opened = open_checkpoint(adapter)
    out = write_merged(adapter, tmp_path / "out")
    written = tensors_of(out)
    assert written.keys() == found.keys()
    assert any(not torch.equal(found[one], plain[one].to(found[one].dtype)) for one in plain)
    # Parted where PEFT parts them, and nowhere else.
    parted = (
        name == "tied" and expected["lm_head.weight"].data_ptr() != expected["model.embed_tokens.weight"].data_ptr()
    )
    assert ("lm_head.weight" in found) == (parted or name != "tied")
    assert opened.config["tie_word_embeddings"] is (name == "tied" and not parted)
    for one, tensor in written.items():
        assert tensor.dtype == plain.get(one, tensor).dtype
        if dtype:
            # A value between two of bf16's may be rounded to either.
            torch.testing.assert_close(tensor, expected[one], rtol=2**-8, atol=1e-6, msg=one)
            assert (tensor != expected[one]).float().mean() < 0.01, one
        else:
            torch.testing.assert_close(tensor, expected[one], rtol=TOLERANCE, atol=TOLERANCE, msg=one)
            torch.testing.assert_close(tensor, found[one].float(), rtol=0, atol=0)


def assert_runs_alike(base: Path, adapter: Path, out: Path) -> None:
    """The written model computes what the adapter computes as PEFT runs it, unmerged."""
    expected = logits(load_adapter(base, adapter), VOCABULARY)
    found = logits(AutoModelForCausalLM.from_pretrained(write_merged(adapter, out)).eval(), VOCABULARY)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"], "use_dora": True},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3, 95]}},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 95]}},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_tied_pair_is_parted_where_the_adapter_runs_so(
    options: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["tied"]
    adapter = save_adapter(base, tmp_path / "adapter", **options)
    assert_runs_alike(base, adapter, tmp_path / "out")
    parted = "lm_head.weight" in open_checkpoint(adapter).tensors
    assert parted is ("ensure_weight_tying" not in options)


def test_tokens_alone_are_an_adapter_too(bases: dict[str, Path], tmp_path: Path) -> None:
    config = TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[3, 7], target_modules=["embed_tokens"])
    adapter = save_adapter(bases["llama"], tmp_path / "adapter", config)
    expected, plain, found = peft_merged(bases["llama"], adapter), read_all(bases["llama"]), read_all(adapter)
    rows = (found["model.embed_tokens.weight"] != plain["model.embed_tokens.weight"]).any(dim=1)
    assert rows.nonzero().flatten().tolist() == [3, 7]
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


SLICED = ("DoRA", "DoRA of embedding and head", "DoRA of Conv1D", "PiSSA of Conv1D", "OLoRA", "a bias of B", "tokens")


@pytest.mark.parametrize("kind", SLICED)
def test_any_slice_is_the_slice_of_the_whole(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    name, options = KINDS[kind]
    assert_sliced_alike(open_checkpoint(save_adapter(bases[name], tmp_path / "adapter", **options)))
