"""Tiny models saved in several layouts: as transformers saves them, as it holds them in memory, and by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from support.architectures import ARCHITECTURES
from transformers import AutoModelForCausalLM, PreTrainedModel

from surgery.checkpoint.checkpoint import Checkpoint, read_folder
from surgery.checkpoint.reader import SourceFiles, TensorReader

WEIGHTS = "model.safetensors"
TEXT = {
    "vocab_size": 96,
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
_QWEN_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
_QWEN_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
}
_SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}


def build_model(name: str, *, seed: int = 0, layers: int = 2, **changes: object) -> PreTrainedModel:
    """Return a tiny random model of the class or family `name`.

    Args:
        changes: of the config, for those in `ARCHITECTURES`.
    """
    t = transformers
    makers: dict[str, Callable[[], PreTrainedModel]] = {
        "gemma3": lambda: t.Gemma3ForConditionalGeneration(
            t.Gemma3Config(
                text_config={**TEXT, "head_dim": 8, "sliding_window": 16},
                vision_config=dict(_SIGLIP),
                mm_tokens_per_image=4,
            )
        ),
        "gemma3_text": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=16)),
        "qwen2_5_vl": lambda: t.Qwen2_5_VLForConditionalGeneration(
            t.Qwen2_5_VLConfig(text_config={**TEXT, **_QWEN_ROPE}, vision_config=dict(_QWEN_VISION))
        ),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**TEXT, rope_theta=1e4)),
        "qwen3_vl_moe": lambda: t.Qwen3VLMoeForConditionalGeneration(
            t.Qwen3VLMoeConfig(
                text_config={**TEXT, **_QWEN_EXPERTS, **_QWEN_ROPE},
                vision_config={**_QWEN_VISION, "deepstack_visual_indexes": [0]},
            )
        ),
        "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**TEXT, **_QWEN_EXPERTS)),
        "granitemoe": lambda: t.GraniteMoeForCausalLM(t.GraniteMoeConfig(**TEXT, **_EXPERTS)),
        "phimoe": lambda: t.PhimoeForCausalLM(t.PhimoeConfig(**TEXT, **_EXPERTS)),
        "lfm2_moe": lambda: t.Lfm2MoeForCausalLM(
            t.Lfm2MoeConfig(
                **TEXT,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=24,
                num_dense_layers=1,
                layer_types=["conv", "full_attention"],
            )
        ),
        "llama4": lambda: t.Llama4ForCausalLM(
            t.Llama4TextConfig(**TEXT, **_EXPERTS, intermediate_size_mlp=48, head_dim=8)
        ),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**{k: v for k, v in TEXT.items() if "key_value" not in k})),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in makers:
            model = makers[name]()
        else:
            config = ARCHITECTURES[name]()
            config.update({"num_hidden_layers": layers, **changes})
            model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for stored in model.state_dict().values():
                if stored.is_floating_point():
                    stored.add_(0.05 * torch.randn_like(stored))
    return model.float()


def save_both(model: PreTrainedModel, folder: Path) -> tuple[Path, Path]:
    """Save `model` as transformers does for others to read, and as it holds it in memory; return both folders."""
    folders = folder / "saved", folder / "in-memory"
    for path, original in zip(folders, (True, False), strict=True):
        model.save_pretrained(path, save_original_format=original)
    return folders


def with_tensors(
    source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]
) -> Path:
    """Copy a model of one file with the tensors that `change` returns for its own."""
    out.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name != WEIGHTS:
            shutil.copy2(path, out / path.name)
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(source / WEIGHTS)).items()}
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    return out


def renamed(source: Path, out: Path, rename: Callable[[str], str]) -> Path:
    """Copy a model of one file with other names."""
    return with_tensors(source, out, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})


def noisy(source: Path, out: Path, *, seed: int, scale: float = 1e-2) -> Path:
    """Copy a model of one file with noise on every float tensor, the same whatever the layout is read back from."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: tensor + scale * torch.randn(tensor.shape, generator=generator)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in sorted(tensors.items())
        }

    return with_tensors(source, out, change)


def in_memory(folder: Path) -> dict[str, torch.Tensor]:
    """Return the state dict that transformers loads from `folder`, by the class that its config names."""
    kind = getattr(transformers, read_folder(folder).config["architectures"][0])
    return dict(kind.from_pretrained(folder, dtype=torch.float32).state_dict())


def values(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, views computed."""
    with SourceFiles(checkpoint.files) as files:
        reader = TensorReader(files)
        return {name: reader.whole_tensor(tensor, "x").clone() for name, tensor in checkpoint.tensors.items()}
