"""Read PEFT LoRA adapters as checkpoints: W + ΔW on the adapter's base, computed when a tensor is read.

ΔW = s·B·A with s = α/r, or α/√r for rank-stabilised LoRA (arXiv 2106.09685, 2312.03732). What PEFT can save but
this cannot rebuild exactly (DoRA, trained biases, convolutions, other tuners) is refused, never approximated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery.checkpoint.checkpoint import ADAPTER_CONFIG, Checkpoint, existing_path
from surgery.checkpoint.low_rank import LowRank
from surgery.checkpoint.safetensors_header import read_header
from surgery.checkpoint.stored_tensor import StoredTensor, stored_tensor
from surgery.checkpoint.structure import ModelStructure, model_structure
from surgery.errors import SurgeryError, listing
from surgery.hub import download as hub
from surgery.io.input_files import MB
from surgery.io.json_fields import COUNT, FLAG, NUMBER, TEXT, check_fields
from surgery.io.json_io import read_json
from surgery.io.patterns import SuffixPatterns
from surgery.io.safe_paths import find_file

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Output heads by name: a tied base stores none, so a name is all there is to recognise one by.
_HEAD = re.compile(r"(lm_head|embed_out|output|head)\.weight$")
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?:\.weight)?$")
DEFAULT_ALPHA = 8  # PEFT's, for configs that do not say
NAME_THE_BASE = "Name the base yourself: BASE+ADAPTER."

# Keys of adapter_config.json with which the result is not W + s·B·A → what messages call them.
OTHER_KINDS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in lora_B",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "LoRA on bare parameters",
    "alora_invocation_tokens": "activated LoRA",
}
# Initialisations that take their first B·A out of W, so that the adapter belongs to another base than it names.
BASE_CHANGING = ("pissa", "corda", "olora", "loftq", "lora_ga")
MAX_CONFIG_BYTES = MB
_KINDS = {
    **dict.fromkeys(("revision", "peft_type", "bias"), TEXT),
    "r": COUNT,
    "lora_alpha": NUMBER,
    **dict.fromkeys(("use_rslora", "fan_in_fan_out"), FLAG),
}


def base_of(folder: Path, *, is_local: bool = True) -> str:
    """Return the reference of the model that the adapter in `folder` was trained on, as its config names it.

    Args:
        is_local: the adapter is a folder of this machine, which may name another one. From the Hub, no file may choose
            what is read here: it may name a model on the Hub, a lab model, or a folder of its own.

    Raises:
        SurgeryError: it names none, or one that is not there or that it may not name.
    """
    config = _read_config(folder / ADAPTER_CONFIG)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base or not isinstance(base, str):
        raise SurgeryError('has no "base_model_name_or_path"', where=folder / ADAPTER_CONFIG, hint=NAME_THE_BASE)
    # Beside the adapter first: a folder that was moved together with its base still finds it.
    beside = folder / base
    if (is_local or beside.resolve().is_relative_to(folder.resolve())) and _is_folder(beside):
        return str(beside)
    # Folders alone, as PEFT writes them: a file that a stranger's adapter names could be any of this machine.
    if is_local and _is_folder(Path(base)):
        return base
    if hub.is_repo_id(base):
        return f"{base}@{revision}" if revision and "@" not in base else base
    if base.startswith("lab:"):
        return base
    missing = "is no folder" if existing_path(base) else "is not there"
    reason = missing if is_local else "is no model on the Hub: which of your folders it reads is for you to say"
    raise SurgeryError(f'names the base "{base}", which {reason}', where=folder / ADAPTER_CONFIG, hint=NAME_THE_BASE)


def _is_folder(path: Path) -> bool:
    found = existing_path(str(path))
    return found is not None and found.is_dir()


def add_adapter(base: Checkpoint, folder: Path) -> Checkpoint:
    """Return `base` with the adapter's update on every tensor that it changes.

    Raises:
        SurgeryError: the adapter is of a kind that cannot be rebuilt, or does not fit `base`.
    """
    config = _read_config(folder / ADAPTER_CONFIG)
    _refuse_other_kinds(config, folder)
    if find_file(folder, WEIGHTS) is None:
        raise SurgeryError(f"has no {WEIGHTS}", where=folder, hint="Save the adapter as safetensors.")
    stored = _stored(folder / WEIGHTS)
    structure = model_structure(base)
    tensors = dict(base.tensors)
    factors: dict[tuple[str, bool], dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        match = _FACTOR.match(name)
        if match:
            key = match["module"], bool(match["embedding"])
            factors.setdefault(key, {})[match["factor"]] = tensor
        else:
            # No factor: a module that was trained as a whole (modules_to_save) replaces the base's.
            target = _base_name(name, base, structure, folder)
            _same_shape(tensor.shape, tensors[target], folder)
            tensors[target] = replace(tensor, name=target)
    if not stored:
        raise SurgeryError("holds no tensor", where=folder / WEIGHTS)
    alphas = _Alphas(config, folder)
    for (module, is_embedding), pair in factors.items():
        if pair.keys() != {"A", "B"}:
            raise SurgeryError(f'"{module}" has only one of lora_A and lora_B', where=folder / WEIGHTS)
        target = _base_name(f"{module}.weight", base, structure, folder)
        a, b = pair["A"], pair["B"]
        # PEFT has an embedding's factors as those of a layer from tokens to width: B·A is (width, tokens).
        transposed = is_embedding or _is_transposed(target, structure, config)
        _check_factors(a, b, tensors[target], transposed, folder)
        scale = alphas.scale(module.removeprefix(PREFIX), a.shape[0])
        weight = tensors[target]
        tensors[target] = replace(weight, derivation=LowRank(weight, a, b, scale, transposed))
    return replace(base, tensors=tensors, adapter=folder)


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path, limit=MAX_CONFIG_BYTES)
    check_fields(config, _KINDS, where=path)
    return config


def _stored(path: Path) -> dict[str, StoredTensor]:
    header = read_header(path)
    return {entry.name: stored_tensor(entry, path, header) for entry in header.entries}


def _refuse_other_kinds(config: Mapping[str, Any], folder: Path) -> None:
    unsupported = [f"{words} ({key})" for key, words in OTHER_KINDS.items() if config.get(key)]
    if config.get("peft_type", "LORA") != "LORA":
        unsupported.append(f"peft_type {config['peft_type']}")
    if config.get("bias", "none") != "none":
        unsupported.append(f"trained biases (bias: {config['bias']})")
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(BASE_CHANGING):
        unsupported.append(f"a changed base (init_lora_weights: {initial})")
    if unsupported:
        raise SurgeryError(
            f"cannot be rebuilt as W + ΔW: {'; '.join(unsupported)}",
            where=folder / ADAPTER_CONFIG,
            hint="Merge it with PEFT (merge_and_unload) and give the merged folder.",
        )


def _base_name(name: str, base: Checkpoint, structure: ModelStructure, folder: Path) -> str:
    """Return the base tensor that an adapter's name refers to; names in bare backbones lack the first component."""
    # PEFT wraps modules: base_layer is the wrapped one, modules_to_save.default the trained copy.
    plain = name.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.default", "")
    target = next((c for c in (plain, plain.partition(".")[2]) if c in base.tensors), None)
    if structure.tied and (target in structure.token_embeddings or (target is None and _HEAD.search(plain))):
        raise SurgeryError(
            f'changes "{plain}", but the base {base.ref} holds its embedding and its output head as one tensor',
            where=folder,
            hint="Untie the base (tie_word_embeddings: false, with a tensor of its own for each) and name it: "
            "BASE+ADAPTER.",
        )
    if target is not None:
        return target
    raise SurgeryError(
        f'changes "{plain}", which the base {base.ref} does not have (it has {listing(base.tensors, 3)})',
        where=folder,
        hint="Name the right base: BASE+ADAPTER.",
    )


def _check_factors(a: StoredTensor, b: StoredTensor, weight: StoredTensor, transposed: bool, folder: Path) -> None:
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise SurgeryError(
            f'"{a.name}" {list(a.shape)} and "{b.name}" {list(b.shape)} do not multiply',
            where=folder / WEIGHTS,
        )
    for factor in (a, b):
        if not factor.is_float:
            raise SurgeryError(f'"{factor.name}" is {factor.dtype}, expected floats', where=folder / WEIGHTS)
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


def _is_transposed(target: str, structure: ModelStructure, config: Mapping[str, Any]) -> bool:
    """Return whether the stored weight is (in, out).

    As in PEFT the module decides, not `fan_in_fan_out`: in an adapter of GPT-2's Conv1D layers and its (linear) output
    head, that flag describes only the last of them.
    """
    if structure.output_projections:
        is_conv = any(heads.transposed for heads in structure.output_projections.values())
        return is_conv and structure.layer_of(target) is not None
    return bool(config.get("fan_in_fan_out"))


class _Alphas:
    """The α of each module: by PEFT's rule that of the first key of alpha_pattern that matches the end of its name."""

    def __init__(self, config: Mapping[str, Any], folder: Path) -> None:
        self._config, self._where = config, folder / ADAPTER_CONFIG
        by_pattern = config.get("alpha_pattern") or {}
        if not isinstance(by_pattern, dict):
            raise SurgeryError(f"alpha_pattern is no table, but {by_pattern!r:.40}", where=self._where)
        self._patterns = SuffixPatterns(by_pattern, where=self._where)
        self._values = list(by_pattern.values())

    def scale(self, module: str, rank: int) -> float:
        """Return s of s·B·A. Raises SurgeryError where the config gives no number."""
        at = self._patterns.first_match(module)
        alpha = self._config.get("lora_alpha", DEFAULT_ALPHA) if at is None else self._values[at]
        try:
            scale = float(alpha) / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        except (TypeError, ValueError, OverflowError):  # a stranger's config: the value may be of any type
            scale = math.nan
        if not math.isfinite(scale):
            raise SurgeryError(
                f'lora_alpha and alpha_pattern give "{module}" no number (lora_alpha: {alpha!s:.40})', where=self._where
            )
        return scale
