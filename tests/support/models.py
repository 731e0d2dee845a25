"""Build tiny models of many families, loaded with their structure, and random token sequences for them.

`FAMILIES` are the fifteen of `architectures`, some with a sliding window shorter than most prompts; `MORE` are those
with another residual stream, or layers of other kinds. Weights are fp32 and all moved off their initial values, so that
no norm's gain is one and no bias zero.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from support.architectures import ARCHITECTURES, VOCABULARY
from support.chat_tokenizer import make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from probes.data.examples import TokenSequence
from surgery.checkpoint.resolve import open_checkpoint
from surgery.models.loaded_model import LoadedModel, attach_structure
from surgery.models.loading import ModelAndTokenizer

WINDOW = 8

_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 1,
}
_TOKENS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_SHARED: Mapping[str, Any] = {
    **_SIZES,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


def _without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in _SIZES.items() if name not in names}


def _config(kind: str, **values: Any) -> Callable[[], PretrainedConfig]:
    return lambda: getattr(transformers, kind)(**values)


def _windowed(name: str) -> Callable[[], PretrainedConfig]:
    def make() -> PretrainedConfig:
        config = ARCHITECTURES[name]()
        config.sliding_window = WINDOW
        return config

    return make


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    **ARCHITECTURES,
    "gemma2": _windowed("gemma2"),
    "gpt_oss": _windowed("gpt_oss"),
    "mistral": _windowed("mistral"),
}
MORE: dict[str, Callable[[], PretrainedConfig]] = {
    "olmo2": _config("Olmo2Config", **_SIZES),
    "granite": _config("GraniteConfig", **_SIZES, residual_multiplier=0.22, embedding_multiplier=3.0),
    "cohere": _config("CohereConfig", **_SIZES, head_dim=8),
    "cohere2": _config("Cohere2Config", **_SIZES, head_dim=8, sliding_window=WINDOW, num_layers=2),
    "gemma3": _config("Gemma3TextConfig", **_SIZES, head_dim=16, sliding_window=WINDOW),
    "stablelm": _config("StableLmConfig", **_SIZES),
    "phi": _config("PhiConfig", **_without("num_key_value_heads"), num_key_value_heads=4),
    "opt": _config(
        "OPTConfig", **_without("intermediate_size", "num_key_value_heads"), ffn_dim=48, word_embed_proj_dim=32
    ),
    "falcon": _config("FalconConfig", **_without("intermediate_size", "num_key_value_heads"), ffn_hidden_size=48),
    "bloom": _config("BloomConfig", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **_TOKENS),
    "mpt": _config("MptConfig", vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, expansion_ratio=2, **_TOKENS),
    "gptj": _config("GPTJConfig", **_GPT, **_TOKENS, rotary_dim=4),
    "glm4": _config("Glm4Config", **_SIZES, head_dim=8),
    "falcon_h1": _config(
        "FalconH1Config",
        **_SIZES,
        head_dim=16,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
    ),
    "lfm2": _config(
        "Lfm2Config",
        **_SIZES | {"num_hidden_layers": 3},
        layer_types=["conv", "full_attention", "conv"],
        block_ff_dim=48,
    ),
    "minimax": _config("MiniMaxConfig", **_SIZES, head_dim=8, num_local_experts=2),
    "gemma3n": _config(
        "Gemma3nTextConfig", **_SHARED, laurel_rank=8, altup_num_inputs=2, activation_sparsity_pattern=4 * [0.0]
    ),
    "gemma4": _config("Gemma4TextConfig", **_SHARED, global_head_dim=16),
    "qwen3_next": _config(
        "Qwen3NextConfig",
        **_SIZES | {"num_hidden_layers": 4},
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
}
# Those that add to the stream inside a part (Bloom, MPT), scale it (MiniMax), or have several streams (Gemma 3n).
NOT_PLAIN = ("bloom", "mpt", "minimax", "gemma3n")
# Those whose norms subtract the mean.
CENTRED = ("gpt2", "gpt_neox", "cohere", "cohere2", "stablelm", "phi", "opt", "falcon", "gptj")


def make_live(
    name: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    **sizes: Any,
) -> LoadedModel:
    """Return a tiny random model of family `name`, saved into `folder` and loaded.

    Args:
        attention: the kernel; None leaves it to transformers.
        sizes: values of its config that are changed.
    """
    return open_folder(save(name, folder, seed=seed, **sizes), dtype=dtype, attention=attention)


def save(name: str, folder: Path, *, seed: int = 0, **sizes: Any) -> Path:
    """Save such a model in fp32, and return `folder`."""
    config = {**FAMILIES, **MORE}[name]()
    for key, value in sizes.items():
        assert hasattr(config, key), key
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for stored in model.parameters():
                # Matrices are drawn anew and larger, so that attention is far from even and heads matter.
                noise = torch.randn_like(stored)
                stored.copy_(0.2 * noise if stored.dim() > 1 else stored + 0.2 * noise)
    model.save_pretrained(folder)
    return folder


def open_folder(folder: Path, *, dtype: torch.dtype = torch.float32, attention: str | None = None) -> LoadedModel:
    """Load the model in `folder`, with a tokenizer of one token per character."""
    chosen = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **chosen).eval()
    return attach_structure(ModelAndTokenizer(folder.name, model, make_tokenizer()), open_checkpoint(folder))


def make_sequences(lengths: Sequence[int], *, seed: int = 0, answer: int = 0) -> list[TokenSequence]:
    """Return random sequences with so many tokens before the answer, and `answer` more.

    The last two before the answer are a closing template, as many others as possible are thinking.
    """
    draw = random.Random(seed)
    found = []
    for number, length in enumerate(lengths):
        ids = tuple(draw.randrange(4, VOCABULARY) for _ in range(length + answer))
        closing = max(1, length - 2)
        found.append(TokenSequence(f"s{number}", ids, (max(1, closing // 2), closing, length, length + answer)))
    return found


def probe_for(live: LoadedModel, seed: int = 0) -> tuple[Tensor, float]:
    """Return a random probe on the final norm's output: w (D,) and b."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(live.width, generator=generator), 0.3


Lives = Callable[..., LoadedModel]


def maker(folder: Path) -> Lives:
    """Return `make_live` with a cache: each model is built once, in a folder below `folder`."""
    made: dict[str, LoadedModel] = {}

    def get(name: str, **how: Any) -> LoadedModel:
        key = f"{name} {sorted(how.items())}"
        if key not in made:
            made[key] = make_live(name, folder / str(len(made)) / name, **how)
        return made[key]

    return get


def hook_count(live: LoadedModel) -> int:
    """Count hooks and replaced forwards on all modules; transformers installs some of its own permanently."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in vars(module))
        for module in live.model.modules()
    )
