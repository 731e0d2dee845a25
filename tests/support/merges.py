"""Fixtures and helpers of the tests of merges: tiny families of models, and readers of results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.architectures import add_tokenizer, build, sibling
from torch import Tensor
from transformers import AutoModelForCausalLM

from merges.config.parse import parse_configs
from merges.methods.registry import METHODS
from merges.report import MergeReport
from merges.run import merge
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.structure import model_structure
from surgery.engine.options import ExecutionOptions

SPECS = {name: method.spec for name, method in METHODS.items()}
WORDS = 90  # tokens of `other`, which lacks the last six and has them in another order


def family(name: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write `base`, two children `a` and `b`, `other` with another tokenizer, and `lora`, an adapter on `base`."""
    base = build(name, folder / "base", dtype=dtype)
    for seed, child in enumerate(("a", "b", "other"), start=1):
        add_tokenizer(sibling(base, folder / child, seed=seed))
    add_tokenizer(base)
    add_tokenizer(folder / "other", [f"w{i}" for i in reversed(range(4, WORDS))])
    add_lora(folder / "lora", base)
    return folder


def add_lora(folder: Path, base: Path, *, rank: int = 2) -> Path:
    """Write a PEFT adapter on the attention output of every layer of `base`."""
    checkpoint = open_checkpoint(base)
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    transposed = False
    for heads in model_structure(checkpoint).output_projections.values():
        shape, transposed = checkpoint.tensors[heads.name].shape, heads.transposed
        out, width = (shape[1], shape[0]) if transposed else shape
        module = "base_model.model." + heads.name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, width, generator=generator) / 10
        tensors[f"{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator) / 10
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "base_model_name_or_path": str(base),
        "fan_in_fan_out": transposed,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def run(text: str, folder: Path, out: Path, **options: Any) -> MergeReport:
    """Merge by the config `text`, in which ⟨x⟩ is replaced by the path of the model x in `folder`."""
    text = text.replace("⟨", f"{folder}/").replace("⟩", "")
    configs = parse_configs(text, "c.yml", methods=SPECS)
    dry_run = options.pop("dry_run", False)
    line = ["surgery", "merge", "c.yml", "-o", "OUT"]
    return merge(configs, out, line=line, text=text, dry_run=dry_run, options=ExecutionOptions(**options))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a model folder, by name."""
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def set_tensor(folder: Path, name: str, change: Any) -> None:
    """Apply `change` to one tensor of a model folder, in place."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = change(tensors[name])
            save_file(tensors, path, metadata={"format": "pt"})


def logits_of(folder: Path, tokens: Sequence[int] = (5, 6, 7, 8)) -> Tensor:
    """Return the logits of the model in `folder`, every weight of which transformers must use: (tokens, rows)."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        logits: Tensor = model.eval()(torch.tensor([list(tokens)])).logits[0]
    assert torch.isfinite(logits).all()
    return logits
