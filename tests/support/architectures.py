"""Tiny random models of many families, made on the spot: real configs, real names, a few kilobytes each.

Widths are chosen so that no two meanings share a number where the family allows it: hidden 32,
heads · head_dim 64, intermediate 48, vocabulary 96. A test that mixes two of them up then fails by shape.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PretrainedConfig

VOCABULARY = 96
EXPERTS = 4
SPECIAL_TOKENS = ("<unk>", "<pad>", "<s>", "</s>")

transformers.utils.logging.disable_progress_bar()

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 1,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_WIDE = {**_GROUPED, "head_dim": 16}
_EXPERTS = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_ROUTED = {
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_GPT2_TOKENS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}


def _config(kind: str, **values: object) -> Callable[[], PretrainedConfig]:
    def make() -> PretrainedConfig:
        return getattr(transformers, kind)(**values)

    return make


ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _config("LlamaConfig", **_GROUPED),
    "mistral": _config("MistralConfig", **_WIDE),
    "qwen2": _config("Qwen2Config", **{**_GROUPED, "num_hidden_layers": 3}),
    "qwen3": _config("Qwen3Config", **_WIDE),
    "gemma2": _config("Gemma2Config", **_WIDE, sliding_window=32),
    "phi3": _config("Phi3Config", **_GROUPED),
    "gpt2": _config("GPT2Config", **_GPT2, **_GPT2_TOKENS),
    "gpt_neox": _config("GPTNeoXConfig", **_COMMON),
    "mixtral": _config("MixtralConfig", **_GROUPED, num_local_experts=EXPERTS, num_experts_per_tok=2),
    "qwen2_moe": _config("Qwen2MoeConfig", **_GROUPED, **_EXPERTS, shared_expert_intermediate_size=40),
    "qwen3_moe": _config("Qwen3MoeConfig", **_WIDE, **_EXPERTS),
    "olmoe": _config("OlmoeConfig", **_GROUPED, num_experts=EXPERTS, num_experts_per_tok=2),
    "deepseek_v3": _config(
        "DeepseekV3Config", **{**_COMMON, **_ROUTED, **_LATENT}, head_dim=4, n_group=2, topk_group=1
    ),
    "glm4_moe": _config("Glm4MoeConfig", **_WIDE, **_ROUTED, use_qk_norm=True, n_group=1, topk_group=1),
    "gpt_oss": _config(
        "GptOssConfig",
        **{**_WIDE, "max_position_embeddings": 64},
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}


def build(
    name: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str | int | None = None,
    tied: bool | None = None,
) -> Path:
    """Saves a tiny model of family `name` with weights drawn from `seed` into `folder`, and returns `folder`.

    Everything stored is moved off its initial value, so that no bias is all zero and no norm all one.

    Args:
        max_shard_size: as save_pretrained takes it; "10KB" gives several shards.
        tied: whether the output head shares the embedding; None leaves it to the family.
    """
    config = ARCHITECTURES[name]()
    if tied is not None:
        config.tie_word_embeddings = tied
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for stored in model.state_dict().values():
                stored.add_(0.05 * torch.randn_like(stored))
    folder.mkdir(parents=True, exist_ok=True)
    limit = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.to(dtype).save_pretrained(folder, **limit)
    return folder


def sibling(folder: Path, out: Path, *, seed: int, relative: float = 1e-2) -> Path:
    """Copies a model with every float tensor x moved by noise of norm `relative`·‖x‖; shards are kept."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        if path.suffix != ".safetensors":
            shutil.copy2(path, out / path.name)
            continue
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        moved = {name: _moved(name, tensor, seed, relative) for name, tensor in load_file(path).items()}
        save_file(moved, out / path.name, metadata=metadata)
    return out


def _moved(name: str, tensor: torch.Tensor, seed: int, relative: float) -> torch.Tensor:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return tensor
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    exact = tensor.double()
    size = exact.square().mean().sqrt().item() or 1.0
    noise = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    return (exact + relative * size * noise).to(tensor.dtype)


def add_tokenizer(folder: Path, tokens: Sequence[str] | int = VOCABULARY) -> Path:
    """Writes a word-level tokenizer beside a model: `tokens` after the special ones, or `size` tokens in all.

    Token → id is the position, special tokens first; words are split at white space. For model_type "qwen2"
    transformers' AutoTokenizer insists on a byte-level class of its own: use PreTrainedTokenizerFast there.
    """
    size = tokens if isinstance(tokens, int) else len(SPECIAL_TOKENS) + len(tokens)
    words = [f"w{i}" for i in range(len(SPECIAL_TOKENS), size)] if isinstance(tokens, int) else list(tokens)
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "TokenizersBackend",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 64,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return folder
