"""A model in memory, seen through the anatomy of its checkpoint: its layers, their output projections, its final norm.

In goes a reference, out comes a `LoadedModel`. Where a part lies in memory follows from its name on disk, relative to
its layer: transformers 5 renames some tensors on loading, but not inside attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.checkpoint.checkpoint import Checkpoint, loadable_folder
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.structure import ModelStructure, model_structure
from surgery.checkpoint.tensor_roles import NORM
from surgery.errors import SurgeryError, listing
from surgery.models.loading import ModelAndTokenizer, load_model
from surgery.runtime.collectives import local_device


@dataclass(frozen=True)
class OutputProjection:
    """A layer's attention output projection: a module whose input is the heads' outputs side by side.

    Head h owns the input slice [h·head_dim, (h+1)·head_dim).
    """

    layer: int
    module: nn.Module
    n_heads: int
    head_dim: int
    transposed: bool = False

    @property
    def matrix(self) -> Tensor:
        """The projection's weight in fp32: (hidden, heads · head_dim), however it is stored."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.float().T if self.transposed else weight.float()

    @property
    def bias(self) -> Tensor | None:
        """The projection's bias in fp32, (hidden,), where it has one."""
        bias = getattr(self.module, "bias", None)
        return bias.float() if isinstance(bias, Tensor) else None

    def block(self, head: int) -> slice:
        """The input slice of one head."""
        return slice(head * self.head_dim, (head + 1) * self.head_dim)


@dataclass(frozen=True)
class LoadedModel:
    """A transformers model with its parts.

    body: the model without its output head: running it makes no logits. layers: in the order of the forward pass.
    projections: layer → its output projection; the layers in `skipped` have none that is understood.
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
        """Where token ids go in."""
        return torch.device(self.model.device)

    @property
    def n_depths(self) -> int:
        """How many residual streams there are to look at: before each layer, and after the final norm."""
        return len(self.layers) + 1

    @property
    def width(self) -> int:
        """The width of the residual stream."""
        if self.structure.hidden_size is not None:
            return self.structure.hidden_size
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def n_heads(self) -> int:
        """Heads in all layers."""
        return sum(projection.n_heads for projection in self.projections.values())


def load_with_structure(
    ref: str | Path, *, device: str = "cpu", dtype: str = "auto", name: str | None = None
) -> LoadedModel:
    """Loads the model `ref` with transformers and finds its parts.

    Args:
        device: cpu, cuda[:N], or auto, which spreads the layers over what there is (accelerate's device_map). With
            several processes, `cuda` is a GPU for each.
        name: what the model is called in messages; by default `ref`.

    Raises:
        SurgeryError: `ref` is no model folder, cannot be loaded, or has no layers that are understood.
    """
    checkpoint = open_checkpoint(ref)
    folder, device = loadable_folder(checkpoint), local_device(device)
    return attach_structure(load_model(folder, name or str(ref), device=device, dtype=dtype), checkpoint)


def attach_structure(loaded: ModelAndTokenizer, checkpoint: Checkpoint) -> LoadedModel:
    """Finds the parts of a model that is in memory already. Errors as in `load_with_structure`."""
    model, found = loaded.model, model_structure(checkpoint)
    if not found.stack:
        raise SurgeryError("no stack of layers was found in its names", where=loaded.name)
    layers, owner = _layers(model, found, loaded.name)
    projections: dict[int, OutputProjection] = {}
    for index, heads in found.output_projections.items():
        if heads.n_heads is None or heads.head_dim is None:
            continue
        inside = heads.name.removeprefix(f"{found.stack}.{index}.").removesuffix(".weight")
        module = _submodule(layers[index], inside)
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
        found,
        model.base_model,
        tuple(layers),
        _final_norm(model, owner, layers, loaded.name),
        projections,
        skipped,
    )


def hidden_in(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    """The hidden states among a layer's arguments."""
    found = arguments[0] if arguments else keywords.get("hidden_states")
    if not isinstance(found, Tensor):
        raise SurgeryError(f"a layer takes in {type(found).__name__}, where hidden states were expected")
    return found


def hidden_out(output: Any) -> Tensor:
    """The hidden states in a module's output, which some families return in a tuple."""
    found = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(found, Tensor):
        raise SurgeryError(f"a part puts out {type(found).__name__}, where hidden states were expected")
    return found


@contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    """Hooks that are gone at the end of the block, whatever happens in it."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: Any, found: ModelStructure, name: str) -> tuple[list[nn.Module], nn.Module]:
    """The layers in order, and the module that holds their list."""
    assert found.stack is not None
    for root in (model, model.base_model):
        held = _submodule(root, found.stack)
        if isinstance(held, nn.ModuleList) and len(held) >= found.layers:
            owner = _submodule(root, found.stack.rpartition(".")[0])
            assert owner is not None
            return list(held)[: found.layers], owner
    # Multimodal models are renamed on loading: the list of as many layers under the same last word is the one.
    word = found.stack.rpartition(".")[2]
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == found.layers and path.rpartition(".")[2] == word
    }
    if len(lists) != 1:
        raise SurgeryError(
            f"{found.layers} layers lie at {found.stack!r} on disk; in memory they could be at {listing(lists) or '–'}",
            where=name,
        )
    ((path, held),) = lists.items()
    return list(held), model.get_submodule(path.rpartition(".")[0])


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _final_norm(model: Any, owner: nn.Module, layers: list[nn.Module], name: str) -> nn.Module:
    """The norm beside the list of layers that runs behind the last of them."""
    beside = {word.lower(): module for word, module in owner.named_children() if NORM.search(word.lower())}
    likely = [module for word, module in beside.items() if "embed" not in word]
    if len(likely) != 1:
        # Names alone mislead: Gemma 3n has one for its per-layer inputs, and LFM2 calls the final one embedding_norm.
        likely = _behind(model, list(beside.values()), layers[-1])[-1:]
    if not likely:
        raise SurgeryError("no final norm was found beside its layers", where=name)
    return likely[0]


@torch.inference_mode()
def _behind(model: Any, modules: list[nn.Module], layer: nn.Module) -> list[nn.Module]:
    """Which of `modules` run after `layer`, in that order: seen in one short run."""
    ran: list[nn.Module] = []

    def see(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        ran.append(module)

    with hooks(*(module.register_forward_hook(see) for module in (*modules, layer))):
        model.base_model(input_ids=torch.tensor([[1, 2, 3]], device=model.device), use_cache=False)
    return ran[ran.index(layer) + 1 :]
