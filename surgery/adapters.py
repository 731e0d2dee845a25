"""PEFT LoRA adapters read as checkpoints: W + ΔW on the adapter's base, rebuilt as it is read.

ΔW = s·B·A with s = α/r, or α/√r for rank-stabilised LoRA (arXiv 2106.09685, 2312.03732). What PEFT can save but
this cannot rebuild exactly (DoRA, trained biases, convolutions, other tuners) is refused, never approximated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.checkpoint import ADAPTER_CONFIG, Checkpoint, LowRank, StoredTensor, read_json
from surgery.errors import SurgeryError, listing
from surgery.header import read_header

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?:\.weight)?$")


@dataclass(frozen=True)
class _Rule:
    """How adapter_config.json scales each module's product."""

    config: Mapping[str, Any]

    def scale(self, module: str, rank: int) -> float:
        alpha = _pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", rank))
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def base_of(folder: Path) -> str:
    """The reference of the model that the adapter in `folder` was trained on. Raises SurgeryError without one."""
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise SurgeryError(
            'has no "base_model_name_or_path"',
            where=folder / ADAPTER_CONFIG,
            hint="Name the base yourself: BASE+ADAPTER.",
        )
    relative = folder / str(base)
    return str(relative) if relative.is_dir() else str(base)


def add_adapter(base: Checkpoint, folder: Path) -> Checkpoint:
    """`base` with every tensor that the adapter changes carrying its update.

    Raises:
        SurgeryError: the adapter is of a kind that cannot be rebuilt, or does not fit `base`.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    _refuse_other_kinds(config, folder)
    if not (folder / WEIGHTS).is_file():
        raise SurgeryError(f"has no {WEIGHTS}", where=folder, hint="Save the adapter as safetensors.")
    stored = _stored(folder / WEIGHTS)
    tensors = dict(base.tensors)
    factors: dict[tuple[str, bool], dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        match = _FACTOR.match(name)
        if match:
            key = match["module"], bool(match["embedding"])
            factors.setdefault(key, {})[match["factor"]] = tensor
        else:
            target = _base_name(name, tensors, base, folder)
            _same_shape(tensor.shape, tensors[target], folder)
            tensors[target] = replace(tensor, name=target)
    if not stored:
        raise SurgeryError("holds no tensor", where=folder / WEIGHTS)
    rule = _Rule(config)
    for (module, is_embedding), pair in factors.items():
        if pair.keys() != {"A", "B"}:
            raise SurgeryError(f'"{module}" has only one of lora_A and lora_B', where=folder / WEIGHTS)
        target = _base_name(f"{module}.weight", tensors, base, folder)
        a, b = pair["A"], pair["B"]
        transposed = is_embedding or bool(config.get("fan_in_fan_out"))
        _check_factors(a, b, tensors[target], transposed, folder)
        update = LowRank(a, b, rule.scale(module.removeprefix(PREFIX), a.shape[0]), transposed)
        tensors[target] = replace(tensors[target], update=update)
    return replace(base, tensors=tensors, adapter=folder)


def _stored(path: Path) -> dict[str, StoredTensor]:
    header = read_header(path)
    return {
        entry.name: StoredTensor(
            entry.name,
            entry.dtype,
            entry.shape,
            path,
            header.data_start + entry.begin,
            entry.end - entry.begin,
        )
        for entry in header.entries
    }


def _refuse_other_kinds(config: Mapping[str, Any], folder: Path) -> None:
    faults = [
        reason
        for present, reason in (
            (config.get("peft_type", "LORA") != "LORA", f"peft_type {config.get('peft_type')}"),
            (config.get("use_dora"), "DoRA (use_dora)"),
            (config.get("bias", "none") != "none", f"trained biases (bias: {config.get('bias')})"),
            (config.get("trainable_token_indices"), "trainable_token_indices"),
            (config.get("target_parameters"), "target_parameters"),
            (config.get("alora_invocation_tokens"), "activated LoRA"),
        )
        if present
    ]
    if faults:
        raise SurgeryError(
            f"cannot be rebuilt as W + ΔW: {'; '.join(faults)}",
            where=folder / ADAPTER_CONFIG,
            hint="Merge it with PEFT (merge_and_unload) and give the merged folder.",
        )


def _base_name(name: str, tensors: Mapping[str, StoredTensor], base: Checkpoint, folder: Path) -> str:
    """The base tensor that an adapter's name means; checkpoints of bare backbones lack the first component."""
    plain = name.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.default", "")
    for candidate in (plain, plain.partition(".")[2]):
        if candidate in tensors:
            return candidate
    raise SurgeryError(
        f'changes "{plain}", which the base {base.ref} does not have (it has {listing(list(tensors), 3)})',
        where=folder,
        hint="Name the right base: BASE+ADAPTER.",
    )


def _check_factors(
    a: StoredTensor, b: StoredTensor, weight: StoredTensor, transposed: bool, folder: Path
) -> None:
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise SurgeryError(
            f'"{a.name}" {list(a.shape)} and "{b.name}" {list(b.shape)} do not multiply',
            where=folder / WEIGHTS,
        )
    product = (b.shape[0], a.shape[1])
    _same_shape(product[::-1] if transposed else product, weight, folder)
    if not weight.is_float:
        raise SurgeryError(f'"{weight.name}" is {weight.dtype} in the base: it is quantised', where=folder)


def _same_shape(shape: tuple[int, ...], weight: StoredTensor, folder: Path) -> None:
    if shape != weight.shape:
        raise SurgeryError(
            f'gives "{weight.name}" the shape {list(shape)}, the base has {list(weight.shape)}',
            where=folder,
            hint="Name the right base: BASE+ADAPTER.",
        )


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    """PEFT's rule for alpha_pattern: the first pattern that matches the end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
