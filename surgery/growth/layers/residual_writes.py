"""Find the tensors by which a layer writes into the residual stream, and prove that zeroing them makes it an identity.

Tensors are found by their names, which prove nothing: there are families whose layers scale or normalise the stream
itself (OPT-350m, Gemma 3n). So a small layer of the family is created with random weights and run with those tensors
zeroed: its output must equal its input, to the bit.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.checkpoint.structure import ModelStructure, model_structure
from surgery.checkpoint.tensor_roles import ATTENTION_WORDS, MLP_WORDS, parts_of, word_of
from surgery.errors import SurgeryError, listing
from surgery.growth.layers.random_init import (
    LayerSpec,
    build_model,
    layer_prefix,
    layers_in,
    load_saved_model,
    save_model,
)
from surgery.models.loaded_model import hidden_in, hidden_out, hooks

# Recurrent mixers have no role of their own: their last projection is named as attention's, or linear_out.
OUT_WORDS = frozenset(
    word
    for words in (ATTENTION_WORDS, MLP_WORDS)
    for word, role in words.items()
    if role in ("attention output", "mlp out")
) | {"linear_out"}
_TOKENS = (1, 5, 3, 5, 2)
_NOISE = 0.05  # moves biases and norms off the zeros and ones that they are initialised with
_MAX_WIDTH = 64
# Config keys of inner widths, which can be cut without changing the structure of a layer.
_WIDTHS = ("intermediate", "ffn", "n_inner", "mlp_hidden", "d_ff")


@dataclass(frozen=True)
class LayerTensors:
    """The tensors of one layer, by their names inside it, and the width of the residual stream (None: unknown)."""

    inner: Mapping[str, StoredTensor]
    hidden: int | None

    @property
    def writers(self) -> tuple[str, ...]:
        """Names of the tensors that write: output projections of attention, mixers, MLPs and experts; their biases."""
        return tuple(name for name, tensor in self.inner.items() if self._writes(name, tensor))

    def possible_writers(self, roles: Mapping[str, object]) -> tuple[str, ...]:
        """Return the names of further tensors that may write: as wide as the stream, and without a role.

        roles: full name → recognised role.
        """
        writers = set(self.writers)
        return tuple(
            name
            for name, tensor in self.inner.items()
            if name not in writers and tensor.name not in roles and (self.hidden is None or self.hidden in tensor.shape)
        )

    def _writes(self, name: str, tensor: StoredTensor) -> bool:
        # Fused experts have their biases beside them: down_proj_bias.
        word = word_of(parts_of(name)).removesuffix("_bias").removesuffix("_weight")
        return word in OUT_WORDS and (self.hidden is None or self.hidden in tensor.shape)


def layer_tensors(checkpoint: Checkpoint, structure: ModelStructure, layer: int) -> LayerTensors:
    """Return the tensors of one layer of `checkpoint`."""
    start = f"{layer_prefix(structure.stack)}{structure.blocks[layer].index}."
    inner = {name.removeprefix(start): checkpoint.tensors[name] for name in structure.blocks[layer].names}
    return LayerTensors(inner, structure.hidden_size)


def prove_identity(spec: LayerSpec, names: Collection[str], writers: Sequence[str]) -> bool:
    """Run a layer of this kind with its `writers` zeroed, and return whether it is an identity.

    Args:
        names: of all the layer's tensors, inside it.

    Raises:
        SurgeryError: transformers cannot build such a layer, or names its tensors otherwise, so that nothing is proved.
    """
    with tempfile.TemporaryDirectory() as name:
        saved = save_model(_perturbed(build_model(_narrow(spec.single_layer_config()), seed=0)), Path(name))
        structure = model_structure(saved)
        if structure.stack is None or structure.layers != 1:
            raise SurgeryError("no layer was found in the names that transformers gives a model of this family")
        inner = layer_tensors(saved, structure, 0).inner
        # Then a tensor that writes might be missing in the checkpoint under its name, and the proof be of another
        # layer.
        if unknown := sorted(inner.keys() - set(names)):
            raise SurgeryError(f"transformers names this layer's tensors otherwise ({listing(unknown, 3)})")
        zeroed = {tensor.name for short, tensor in inner.items() if short in writers}
        (path,) = saved.files
        weights = load_file(path)
        save_file(
            {name: torch.zeros_like(x) if name in zeroed else x for name, x in weights.items()},
            path,
            metadata=dict(saved.metadata),
        )
        hidden, output = _run_layer(load_saved_model(Path(name)), structure)
    return torch.equal(hidden, output)


def check_embedding(spec: LayerSpec) -> None:
    """Raise SurgeryError if the family changes token embeddings before the first layer.

    Position embeddings may be added: the difference of two tokens at one position is compared.
    """
    with tempfile.TemporaryDirectory() as name:
        model = build_model(_narrow(spec.single_layer_config()), seed=0)
        rows = model.get_input_embeddings().weight.detach()
        structure = model_structure(save_model(model, Path(name)))
        one, _ = _run_layer(model, structure, (1, 1, 1))
        other, _ = _run_layer(model, structure, (2, 1, 1))
    difference = one[0, 0] - other[0, 0]
    expected = rows[1] - rows[2]
    if difference.shape != expected.shape or not torch.allclose(difference, expected, rtol=1e-4, atol=1e-6):
        raise SurgeryError(
            f"a {spec.config.get('model_type')} scales or normalises its token embeddings, so a frozen embedding "
            "would not reach its layers as it is",
            hint="Take a config of another family, such as llama.",
        )


def layer_key(spec: LayerSpec) -> str:
    """Return a text that is the same for layers of one kind."""
    return json.dumps(spec.single_layer_config(), sort_keys=True, default=str)


def _narrow(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with narrow MLPs and experts: wide ones take most of the memory and prove nothing more."""

    def narrow(value: Any, key: str) -> Any:
        if isinstance(value, Mapping):
            return {name: narrow(inner, str(name)) for name, inner in value.items()}
        if any(word in key for word in _WIDTHS):
            if type(value) is int:
                return min(value, _MAX_WIDTH)
            if isinstance(value, list):
                return [narrow(one, key) for one in value]
        return value

    narrowed: dict[str, Any] = narrow(config, "")
    return narrowed


@torch.no_grad()
def _perturbed(model: Any) -> Any:
    # With biases of zero and norms of one, a layer that adds a bias would look like an identity.
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(_NOISE * torch.randn(parameter.shape, generator=generator))
    return model


@torch.inference_mode()
def _run_layer(model: Any, structure: ModelStructure, tokens: Sequence[int] = _TOKENS) -> tuple[Tensor, Tensor]:
    """Return the input and the output of the first layer of `model`."""
    _, (layer,) = layers_in(model, structure.stack, 1)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def before(_: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        inputs.append(hidden_in(arguments, keywords).clone())

    def after(_: Any, arguments: tuple[Any, ...], output: Any) -> None:
        outputs.append(hidden_out(tuple(output) if isinstance(output, list) else output).clone())

    # Hooks see what enters and leaves the layer inside the model, with the family's own masks and positions.
    handles = (layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after))
    with hooks(*handles):
        try:
            model(input_ids=torch.tensor([list(tokens)]), use_cache=False)
        except Exception as error:  # whatever the code of a family raises
            raise SurgeryError(f"a layer of random weights cannot be run: {error}") from error
    return inputs[0], outputs[0]
