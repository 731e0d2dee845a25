"""A model in memory together with its structure: its layers, their output projections and its final norm.

`load_with_structure` loads a model and finds these modules by the names that its checkpoint has for them, relative to
the layer: transformers 5 renames some tensors on loading, but not inside attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.structure import ModelStructure, model_structure
from surgery.checkpoint.tensor_roles import NORM
from surgery.errors import SurgeryError, listing
from surgery.models.loading import ModelAndTokenizer, load_model
from surgery.runtime.collectives import local_device


@dataclass(frozen=True)
class OutputProjection:
    """The attention output projection of a layer: a module whose input is the concatenation of the heads' outputs.

    Head h owns the input slice [h·head_dim, (h+1)·head_dim).
    """

    layer: int
    module: nn.Module
    n_heads: int
    head_dim: int
    transposed: bool = False

    @property
    def matrix(self) -> Tensor:
        """The weight in fp32, (hidden, heads · head_dim), whichever way it is stored."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.float().T if self.transposed else weight.float()

    @property
    def bias(self) -> Tensor | None:
        """The bias in fp32, (hidden,); None if there is none."""
        bias = getattr(self.module, "bias", None)
        return bias.float() if isinstance(bias, Tensor) else None

    def block(self, head: int) -> slice:
        """Return the input slice of one head."""
        return slice(head * self.head_dim, (head + 1) * self.head_dim)


@dataclass(frozen=True)
class LoadedModel:
    """A transformers model with its parts.

    body: the model without its output head; running it computes no logits.
    layers: in the order of the forward pass.
    projections: layer → its output projection.
    skipped: the layers without a projection that is understood.
    """

    loaded: ModelAndTokenizer
    checkpoint: Checkpoint
    structure: ModelStructure
    body: nn.Module
    layers: tuple[nn.Module, ...]
    final_norm: nn.Module
    projections: Mapping[int, OutputProjection]
    skipped: tuple[int, ...]

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @property
    def name(self) -> str:
        return self.loaded.name

    @property
    def device(self) -> torch.device:
        """The device of the input ids."""
        return torch.device(self.model.device)

    @property
    def n_depths(self) -> int:
        """The number of residual states: one before each layer, and one after the final norm."""
        return len(self.layers) + 1

    @property
    def width(self) -> int:
        """The width of the residual stream."""
        if self.structure.hidden_size is not None:
            return self.structure.hidden_size
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def n_heads(self) -> int:
        """The number of heads in all layers together."""
        return sum(projection.n_heads for projection in self.projections.values())


def load_with_structure(
    ref: str | Path, *, device: str = "cpu", dtype: str = "auto", name: str | None = None
) -> LoadedModel:
    """Load the model `ref` with transformers and find its parts.

    Args:
        device: cpu, cuda[:N], or auto, which spreads the layers over all devices (accelerate's device_map). With
            several processes, `cuda` is a GPU for each.
        name: what the model is called in messages; by default `ref`.

    Raises:
        SurgeryError: `ref` is no model folder, cannot be loaded, or has no layers that are understood.
    """
    checkpoint = open_checkpoint(ref)
    loaded = load_model(checkpoint, name or str(ref), device=local_device(device), dtype=dtype)
    return attach_structure(loaded, checkpoint)


def attach_structure(loaded: ModelAndTokenizer, checkpoint: Checkpoint) -> LoadedModel:
    """Find the parts of a model that is in memory already. Errors as in `load_with_structure`."""
    model, structure = loaded.model, model_structure(checkpoint)
    if not structure.stack:
        raise SurgeryError("no stack of layers was found in its names", where=loaded.name)
    layers, owner = _layers(model, structure, loaded.name)
    projections: dict[int, OutputProjection] = {}
    for index, heads in structure.output_projections.items():
        if heads.n_heads is None or heads.head_dim is None:
            continue
        # By the name inside the layer: a multimodal model's stack has another name in memory than on disk.
        path = heads.name.removeprefix(f"{structure.stack}.{index}.").removesuffix(".weight")
        module = _submodule(layers[index], path)
        if module is None:
            raise SurgeryError(f"{heads.name} is not where transformers should hold it", where=loaded.name)
        weight = getattr(module, "weight", None)
        if not (isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2):
            raise SurgeryError(
                f"{heads.name} is not held as a plain matrix", where=loaded.name, hint="Use the unquantised model."
            )
        projections[index] = OutputProjection(index, module, heads.n_heads, heads.head_dim, heads.transposed)
    skipped = tuple(index for index in range(len(layers)) if index not in projections)
    return LoadedModel(
        loaded,
        checkpoint,
        structure,
        model.base_model,
        tuple(layers),
        _final_norm(model, owner, layers, loaded.name),
        projections,
        skipped,
    )


def hidden_in(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    """Return the hidden states among a layer's arguments."""
    hidden = arguments[0] if arguments else keywords.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise SurgeryError(f"a layer takes in {type(hidden).__name__}, where hidden states were expected")
    return hidden


def hidden_out(output: Any) -> Tensor:
    """Return the hidden states in a module's output, which some families return in a tuple."""
    hidden = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(hidden, Tensor):
        raise SurgeryError(f"a part puts out {type(hidden).__name__}, where hidden states were expected")
    return hidden


@contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    """Remove the hooks at the end of the block, whatever happens in it."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: Any, structure: ModelStructure, name: str) -> tuple[list[nn.Module], nn.Module]:
    """Return the layers in order, and the module that contains their list."""
    assert structure.stack is not None
    # A bare backbone's names begin below the body. There may be more layers than counted: those that predict further
    # tokens ahead, which come last.
    for root in (model, model.base_model):
        modules = _submodule(root, structure.stack)
        if isinstance(modules, nn.ModuleList) and len(modules) >= structure.layers:
            owner = _submodule(root, structure.stack.rpartition(".")[0])
            assert owner is not None
            return list(modules)[: structure.layers], owner
    # Multimodal models are renamed on loading: look for the one list of as many layers under the same last word.
    word = structure.stack.rpartition(".")[2]
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == structure.layers and path.rpartition(".")[2] == word
    }
    if len(lists) != 1:
        raise SurgeryError(
            f"{structure.layers} layers lie at {structure.stack!r} on disk; "
            f"in memory they could be at {listing(lists) or '–'}",
            where=name,
        )
    ((path, modules),) = lists.items()
    return list(modules), model.get_submodule(path.rpartition(".")[0])


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _final_norm(model: Any, owner: nn.Module, layers: list[nn.Module], name: str) -> nn.Module:
    """Return the norm beside the list of layers that runs after the last of them."""
    beside = {word.lower(): module for word, module in owner.named_children() if NORM.search(word.lower())}
    candidates = [module for word, module in beside.items() if "embed" not in word]
    if len(candidates) != 1:
        # Names alone mislead: Gemma 3n has one for its per-layer inputs, and LFM2 calls the final one embedding_norm.
        candidates = _run_after(model, list(beside.values()), layers[-1])[-1:]
    if not candidates:
        raise SurgeryError("no final norm was found beside its layers", where=name)
    return candidates[0]


@torch.inference_mode()
def _run_after(model: Any, modules: list[nn.Module], layer: nn.Module) -> list[nn.Module]:
    """Return those of `modules` that run after `layer`, in that order, found by one short run."""
    ran: list[nn.Module] = []

    def record(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        ran.append(module)

    with hooks(*(module.register_forward_hook(record) for module in (*modules, layer))):
        model.base_model(input_ids=torch.tensor([[1, 2, 3]], device=model.device), use_cache=False)
    return ran[ran.index(layer) + 1 :]
