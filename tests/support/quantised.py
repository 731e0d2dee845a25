"""Quantise tiny models as tools and publishers do, and compute what their weights are in float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.architectures import EXPERTS, build
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Tensors = dict[str, Tensor]
Quantise = Callable[[Tensors, str], None]


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> Path:
    """Change the tensors of the model in `folder`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def reconfigure(folder: Path, **changes: Any) -> Path:
    """Change the config of the model in `folder`."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def quantised(folder: Path, quantise: Quantise, *, family: str = "llama", seed: int = 0, **config: Any) -> Path:
    """Return a bf16 model whose projections are replaced by `quantise(tensors, name)`; it says so only in `config`."""
    build(family, folder, dtype=torch.bfloat16, seed=seed)

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            quantise(tensors, name)

    return reconfigure(rewrite(folder, change), **config) if config else rewrite(folder, change)


def fp8(tensors: Tensors, name: str, *, scale: str = "weight_scale", shape: str = "tensor", block: int = 16) -> None:
    """Replace a weight by FP8 codes and a scale called `scale`: one, one per output, or one per block."""
    weight = tensors[name].float()
    rows, columns = weight.shape
    if shape == "block":
        height, width = -(-rows // block), -(-columns // block)
        padded = torch.zeros(height * block, width * block)
        padded[:rows, :columns] = weight
        scales = padded.view(height, block, width, block).abs().amax((1, 3)).clamp_min(1e-8) / 448
        spread = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)[:rows, :columns]
    elif shape == "channel":
        scales = weight.abs().amax(1, keepdim=True) / 448
        spread = scales
    else:
        scales = (weight.abs().max() / 448).reshape(() if shape == "tensor" else (1,))
        spread = scales
    tensors[name] = (weight / spread).to(torch.float8_e4m3fn)
    tensors[f"{name.removesuffix('weight')}{scale}"] = scales


def modelopt(tensors: Tensors, name: str) -> None:
    """FP8 as ModelOpt writes it."""
    fp8(tensors, name)
    tensors[f"{name.removesuffix('weight')}input_scale"] = torch.tensor(0.5)


def comfy(tensors: Tensors, name: str) -> None:
    """FP8 as in one-file models for ComfyUI."""
    fp8(tensors, name, scale="scale_weight")
    tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)


def gptq(tensors: Tensors, name: str) -> None:
    """4-bit integers packed along the inputs."""
    rows, columns = tensors.pop(name).shape
    module = name.removesuffix("weight")
    tensors[f"{module}qweight"] = torch.ones(columns // 8, rows, dtype=torch.int32)
    tensors[f"{module}qzeros"] = torch.ones(2, rows // 8, dtype=torch.int32)
    tensors[f"{module}scales"] = torch.ones(2, rows, dtype=torch.float16)
    tensors[f"{module}g_idx"] = torch.zeros(columns, dtype=torch.int32)


def awq(tensors: Tensors, name: str) -> None:
    """4-bit integers packed along the outputs."""
    rows, columns = tensors.pop(name).shape
    module = name.removesuffix("weight")
    tensors[f"{module}qweight"] = torch.ones(columns, rows // 8, dtype=torch.int32)
    tensors[f"{module}qzeros"] = torch.ones(2, rows // 8, dtype=torch.int32)
    tensors[f"{module}scales"] = torch.ones(2, rows, dtype=torch.float16)


def nf4(tensors: Tensors, name: str) -> None:
    """4 bits by bitsandbytes."""
    count = tensors[name].numel()
    tensors[name] = torch.ones(count // 2, 1, dtype=torch.uint8)
    tensors[f"{name}.absmax"] = torch.ones(count // 64, dtype=torch.uint8)
    tensors[f"{name}.quant_map"] = torch.ones(16)
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.ones(90, dtype=torch.uint8)


def int8(tensors: Tensors, name: str) -> None:
    """8 bits by bitsandbytes."""
    tensors[name] = tensors[name].to(torch.int8)
    tensors[f"{name.removesuffix('weight')}SCB"] = torch.ones(tensors[name].shape[0])
    tensors[f"{name.removesuffix('weight')}weight_format"] = torch.tensor(0, dtype=torch.uint8)


def packed(tensors: Tensors, name: str) -> None:
    """4 bits by compressed-tensors."""
    rows, columns = tensors.pop(name).shape
    tensors[f"{name}_packed"] = torch.ones(rows, columns // 8, dtype=torch.int32)
    tensors[f"{name}_scale"] = torch.ones(rows, 1, dtype=torch.bfloat16)
    tensors[f"{name}_shape"] = torch.tensor([rows, columns])


def nvfp4(tensors: Tensors, name: str) -> None:
    """NVFP4 as ModelOpt writes it."""
    rows, columns = tensors[name].shape
    tensors[name] = torch.ones(rows, columns // 2, dtype=torch.uint8)
    tensors[f"{name}_scale"] = torch.ones(rows, columns // 16).to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_2"] = torch.tensor(1.0)


def hqq(tensors: Tensors, name: str) -> None:
    """HQQ."""
    rows, columns = tensors.pop(name).shape
    module = name.removesuffix("weight")
    tensors[f"{module}W_q"] = torch.ones(rows // 2, columns, dtype=torch.uint8)
    tensors[f"{module}scale"] = torch.ones(rows, 1)
    tensors[f"{module}zero"] = torch.ones(rows, 1)


def aqlm(tensors: Tensors, name: str) -> None:
    """AQLM."""
    rows, columns = tensors.pop(name).shape
    module = name.removesuffix("weight")
    tensors[f"{module}codes"] = torch.ones(rows, columns // 8, 1, dtype=torch.int16)
    tensors[f"{module}codebooks"] = torch.ones(1, 256, 1, 8)
    tensors[f"{module}scales"] = torch.ones(rows, 1, 1, 1)


def quanto(tensors: Tensors, name: str) -> None:
    """8 bits by Quanto."""
    weight = tensors.pop(name)
    tensors[f"{name}._data"] = weight.to(torch.int8)
    tensors[f"{name}._scale"] = torch.ones(weight.shape[0], 1)


def torchao(tensors: Tensors, name: str) -> None:
    """8 bits by torchao."""
    weight = tensors.pop(name)
    module = name.removesuffix("weight")
    tensors[f"{module}_weight_qdata"] = weight.to(torch.int8)
    tensors[f"{module}_weight_scale"] = torch.ones(weight.shape[0], 1)


def eetq(tensors: Tensors, name: str) -> None:
    """8 bits by EETQ."""
    tensors[name] = tensors[name].to(torch.int8)
    tensors[f"{name}_scales"] = torch.ones(tensors[name].shape[0])


def mlx(tensors: Tensors, name: str) -> None:
    """4 bits by MLX."""
    rows, columns = tensors[name].shape
    module = name.removesuffix("weight")
    tensors[name] = torch.ones(rows, columns // 8, dtype=torch.int32).view(torch.uint32)
    tensors[f"{module}scales"] = torch.ones(rows, 1)
    tensors[f"{module}biases"] = torch.ones(rows, 1)


def bare(tensors: Tensors, name: str) -> None:
    """Bytes where weights should be, and nothing else."""
    tensors[name] = tensors[name].to(torch.int8)


def mxfp4(folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """Return a gpt-oss as it is published: experts in FP4 with an exponent per 32 values."""
    generator = torch.Generator().manual_seed(seed)
    build("gpt_oss", folder, dtype=torch.bfloat16)

    def quantise(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(("down_proj", "gate_up_proj"))]:
            del tensors[name]
            shape = (EXPERTS, 32, 2) if name.endswith("down_proj") else (EXPERTS, 128, 1)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(118, 124, shape, generator=generator, dtype=torch.uint8)
        for name in [name for name in tensors if name.endswith("gate_up_proj_bias")]:
            tensors[name] = 0.1 * torch.randn((EXPERTS, 128), generator=generator).bfloat16()

    return reconfigure(rewrite(folder, quantise), intermediate_size=64, **config)


def plain_twin(model: Path, folder: Path) -> Path:
    """Write what an FP8 model of one scale for each tensor, or a gpt-oss, is in bf16, with no word of quantisation."""
    shutil.copytree(model, folder)

    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            module = name.removesuffix("weight")
            scale = tensors.pop(f"{module}weight_scale", None) if name in tensors else None
            if scale is not None:
                # As an fp32 product, which is rounded once more.
                tensors[name] = (tensors[name].double() * scale.double()).float().bfloat16()
                tensors.pop(f"{module}input_scale", None)
            elif name.endswith("_blocks"):
                stem = name.removesuffix("_blocks")
                tensors[stem] = convert_moe_packed_tensors(tensors.pop(name), tensors.pop(f"{stem}_scales"))

    rewrite(folder, change)
    (folder / "hf_quant_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
