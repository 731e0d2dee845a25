"""Sort the tensors of an adapter's file by the modules that they belong to, and by what they are there.

PEFT wraps modules: `base_layer` and `original_module` are the wrapped one, `modules_to_save.NAME` a copy that is
trained as a whole, `token_adapter` its rows of single tokens. Files that were not written by `save_pretrained` of PEFT
keep the adapter's name in the tensors' (`lora_A.default.weight`), lack the prefix, or have that of another wrapper.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from surgery.checkpoint.layouts.canonical_names import WRAPPERS
from surgery.checkpoint.safetensors_header import read_header
from surgery.checkpoint.stored_tensor import StoredTensor, stored_tensor
from surgery.errors import SurgeryError, listing

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_WRAPPERS = WRAPPERS - {"base_layer"}  # which says how deep a wrapper lies
_FACTOR = re.compile(
    r"(?P<module>.+?)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|trainable_tokens_delta)(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save(?:\.(?P<adapter>[^.]+))?\.(?P<leaf>weight|bias)")
_FROZEN = ".original_module."


@dataclass
class AdaptedModule:
    """What an adapter has for one module.

    name: the module's name in the model, with `.base_layer` for each wrapper of a parameter outside of it.
    parts: kind → tensor: "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_B.bias",
        "lora_magnitude_vector", "trainable_tokens_delta".
    """

    name: str
    parts: dict[str, StoredTensor] = field(default_factory=dict)

    @property
    def is_low_rank(self) -> bool:
        """Whether it has factors of an update."""
        return any(kind.startswith("lora_") for kind in self.parts)

    @property
    def factors(self) -> tuple[StoredTensor, StoredTensor, bool]:
        """A (r, in), B (out, r), and whether they are an embedding's. Raises SurgeryError where one is missing."""
        for prefix in ("lora_embedding_", "lora_"):
            pair = self.parts.get(f"{prefix}A"), self.parts.get(f"{prefix}B")
            if pair[0] and pair[1]:
                return pair[0], pair[1], prefix != "lora_"
        present = next(iter(self.parts.values()))
        raise SurgeryError(f'"{self.name}" has only one of lora_A and lora_B', where=present.file)


@dataclass(frozen=True)
class AdapterWeights:
    """The tensors of an adapter's file.

    modules: name → factors and trained tokens.
    whole: name of a tensor in the model → what takes its place as a whole.
    """

    modules: Mapping[str, AdaptedModule]
    whole: Mapping[str, StoredTensor]

    @property
    def by_module(self) -> Mapping[str, Sequence[AdaptedModule]]:
        """Module of the model → what it is wrapped in, from the outside in: one for each of its parameters."""
        found: dict[str, list[AdaptedModule]] = {}
        for name in sorted(self.modules, key=len):
            found.setdefault(_unwrapped(name), []).append(self.modules[name])
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the model, as far as the file tells them: whole tensors, and the weights of modules."""
        return (*self.whole, *(f"{name}.weight" for name in self.by_module))


def read_adapter_weights(path: Path) -> AdapterWeights:
    """Sort the tensors in `path` by header alone.

    Raises:
        SurgeryError: the file is damaged, or holds no tensor, or those of several adapters.
    """
    header = read_header(path)
    modules: dict[str, AdaptedModule] = {}
    # In PEFT's order: the copy that was trained wins over what lies beside it.
    whole: dict[str, tuple[int, StoredTensor]] = {}
    adapters: dict[str | None, None] = {}
    for entry in header.entries:
        tensor, name = stored_tensor(entry, path, header), plain_name(entry.name)
        if match := _FACTOR.fullmatch(name):
            adapters[match["adapter"]] = None
            module = match["module"].removesuffix(".token_adapter")
            kind = f"{match['kind']}.bias" if match["leaf"] == "bias" else match["kind"]
            modules.setdefault(module, AdaptedModule(module)).parts[kind] = tensor
        elif _FROZEN not in name:
            saved = _SAVED.fullmatch(name)
            if saved:
                adapters[saved["adapter"]] = None
            target = f"{saved['module']}.{saved['leaf']}" if saved else _unwrapped(name)
            rank = 2 if "token_adapter" in name or ".base_layer." in name else 1 if saved else 0
            if target not in whole or rank < whole[target][0]:
                whole[target] = rank, tensor
    if not modules and not whole:
        raise SurgeryError("holds no tensor", where=path)
    if len(named := [name for name in adapters if name is not None]) > 1:
        raise SurgeryError(
            f"holds {len(named)} adapters: {listing(named)}",
            where=path,
            hint="Save each of them in a folder of its own.",
        )
    return AdapterWeights(modules, {name: tensor for name, (_, tensor) in whole.items()})


def plain_name(name: str) -> str:
    """Return a tensor's name without the prefixes and components that wrappers of the model add."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    plain = ".".join(parts)
    while plain.startswith(PREFIX):  # several times where a model was wrapped again
        plain = plain.removeprefix(PREFIX)
    return plain


def _unwrapped(name: str) -> str:
    return name.replace(".token_adapter", "").replace(".base_layer", "")
