"""Randomly initialised layers, created by transformers, saved and opened as a `Checkpoint`.

For the config of a model, random weights of single layers (or of everything outside the layers) are written to a
folder under the names that they have on disk, so that a plan reads them like any others. Nothing else of the model is
created: the vocabulary is cut to a few tokens where only a layer is needed. The same seed gives the same bytes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import psutil

from surgery.checkpoint.checkpoint import Checkpoint, Shard, read_folder
from surgery.checkpoint.config.config_layers import inexpressible_layers, with_count, with_layers
from surgery.checkpoint.config.model_config import HIDDEN, N_EXPERTS, N_LAYERS, language_config, layer_count, number
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.checkpoint.structure import ModelStructure, model_structure
from surgery.errors import SurgeryError
from surgery.io.atomic import disk_error
from surgery.io.hashing import hash_bytes, hash_text
from surgery.models.loading import load_weights
from surgery.reporting.report import format_value
from surgery.runtime.quiet_libraries import quiet

SMALL_VOCABULARY = 16
ONE_FILE = "1000TB"  # shard size for save_pretrained that no model reaches, so that it writes a single file
BYTES = 4  # of a value in fp32
_MARK = ".random-weights"
_REMOTE_CODE = ("quantization_config", "auto_map")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class LayerSpec:
    """A layer to create: of the kind of layer `layer` of `template`; without these, of the family's first.

    config: of the whole model.
    """

    config: Mapping[str, Any]
    layer: int | None = None
    template: ModelStructure | None = None

    def single_layer_config(self) -> dict[str, Any]:
        """Return the config of a language model with this layer alone, and a few tokens. Raises SurgeryError."""
        text = text_config(self.config)
        if self.layer is None or self.template is None:
            text = with_count(text, 1)
        else:
            if errors := inexpressible_layers(text, [self.layer], self.template):
                raise SurgeryError(f"layer {self.layer} cannot be made on its own: {' '.join(errors)}")
            text = with_layers(text, [self.layer], self.template)
        return _few_tokens(text)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the language model's config as transformers reads it, with every default and every list in it.

    Raises:
        SurgeryError: transformers has no such family, or the config is wrong.
    """
    config_class = _config_class(config)
    with quiet():
        try:
            text: dict[str, Any] = config_class.from_dict(_plain(config)).get_text_config().to_dict()
        except Exception as error:  # whatever the code of a family raises
            raise SurgeryError(f"transformers cannot read this config of a {config['model_type']}: {error}") from error
    return text


def build_model(config: Mapping[str, Any], *, seed: int, depth: int | None = None) -> Any:
    """Return a transformers model of `config` in fp32 on the CPU, with weights drawn from `seed`.

    Args:
        depth: the number of layers for initialisations that depend on it (GPT-2's); None for the config's own.

    Raises:
        SurgeryError: transformers cannot build it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config_class = _config_class(config)
    _check_memory(config)
    with quiet(), torch.random.fork_rng(devices=[]):
        generator = torch.default_generator  # torch.manual_seed would move the GPUs' too
        try:
            parsed = config_class.from_dict(_plain(config))
            generator.manual_seed(seed)
            # eager: it exists for every family, and initialisation does not depend on attention.
            model = AutoModelForCausalLM.from_config(
                parsed, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            ).eval()
            if depth is not None:
                generator.manual_seed(seed)
                _initialise_as(model, depth)
        except Exception as error:  # whatever the code of a family raises
            raise SurgeryError(f"transformers cannot build a {config.get('model_type')} of this config: {error}") from (
                error
            )
    return model


def _check_memory(config: Mapping[str, Any]) -> None:
    """Raise SurgeryError where a model of `config` needs more memory than there is: the system would be stopped."""
    whole = language_config(config)
    width, vocabulary, experts = (number(whole, keys) or 1 for keys in (HIDDEN, ("vocab_size",), N_EXPERTS))
    inner = number(whole, ("moe_intermediate_size", "intermediate_size", "n_inner")) or 1
    # Less than it takes: what attention and norms have beside it is of no account here.
    values = vocabulary * width + (layer_count(config) or 0) * experts * width * inner
    needed, free = values * BYTES, psutil.virtual_memory().available
    if needed > free:
        raise SurgeryError(
            f"a {config.get('model_type')} of this config takes {format_value(needed, 'bytes')} of memory or more, "
            f"{format_value(free, 'bytes')} are free"
        )


def save_model(model: Any, folder: Path, *, state: Mapping[str, Any] | None = None) -> Checkpoint:
    """Write a transformers model to `folder` and open it. Raises SurgeryError where it cannot be written.

    state: its weights, where the model itself has only a shard of them.
    """
    with quiet():
        try:
            model.save_pretrained(folder, max_shard_size=ONE_FILE, state_dict=state)
        except Exception as error:  # safetensors has exceptions of its own for a full disk
            raise disk_error(error, folder) from error
    saved = read_folder(folder)
    for path in saved.files:
        _set_time_from_content(path)
    return saved


def load_saved_model(folder: Path) -> Any:
    """Load the transformers model in `folder` in fp32 on the CPU. Raises SurgeryError."""
    return load_weights(folder, str(folder), dtype="float32", attention="eager")


@dataclass(frozen=True)
class RandomLayers:
    """Random layers of a model.

    checkpoint: the layers' tensors under their names in the final model. stack: what stands before the number in these
    names. outside: names of the family's tensors outside its layers. inner: layer → name inside the layer → tensor.
    """

    checkpoint: Checkpoint
    stack: str
    outside: frozenset[str]
    inner: Mapping[int, Mapping[str, StoredTensor]]


def random_layers(
    specs: Mapping[int, LayerSpec], folder: Path, *, seed: int, depth: int, stack: str | None = None
) -> RandomLayers:
    """Create random layers one by one, each with a seed derived from (`seed`, its number).

    Args:
        specs: number in the final model → the layer to create.
        folder: where they are written.
        depth: number of layers of the final model.
        stack: what stands before the number in the final names; by default what transformers writes.

    Raises:
        SurgeryError: transformers cannot build such a layer.
    """
    shards: list[Shard] = []
    inner: dict[int, dict[str, StoredTensor]] = {}
    outside = frozenset[str]()
    for index, spec in specs.items():
        model = build_model(spec.single_layer_config(), seed=part_seed(seed, f"layer {index}"), depth=depth)
        saved = save_model(model, folder / f"layer-{index}")
        structure = model_structure(saved)
        if structure.stack is None or structure.layers != 1:
            raise SurgeryError("no layer was found in the names that transformers gives a model of this family")
        # Only the index differs between a model of one layer and the final one.
        stack = structure.stack if stack is None else stack
        layer = {name: saved.tensors[name] for name in structure.blocks[0].names}
        short = {name.removeprefix(f"{layer_prefix(structure.stack)}0."): tensor for name, tensor in layer.items()}
        inner[index] = {
            name: replace(tensor, name=f"{layer_prefix(stack)}{index}.{name}") for name, tensor in short.items()
        }
        # The same for every layer: what a model of this family has beside them.
        outside = frozenset(saved.tensors.keys() - layer.keys())
        shards += saved.shards
    tensors = {tensor.name: tensor for layer in inner.values() for tensor in layer.values()}
    checkpoint = Checkpoint(random_weights_ref(seed), None, tuple(shards), dict(sorted(tensors.items())))
    return RandomLayers(checkpoint, stack or "", outside, inner)


def random_embedding_and_head(config: Mapping[str, Any], folder: Path, *, seed: int) -> Checkpoint:
    """Create what a random model of `config` has outside its layers: embedding, final norm, head."""
    model = build_model(with_count(text_config(config), 0), seed=part_seed(seed, "ends"))
    return replace(save_model(model, folder / "ends"), ref=random_weights_ref(seed))


def layers_in(model: Any, stack: str | None, count: int) -> tuple[str, list[Any]]:
    """Return the path and the modules of a model's layers: the list that is named as the `stack` of names on disk.

    Raises:
        SurgeryError: it has no list of at least `count` modules of that name.
    """
    import torch

    # Only the last part of the name is compared: in memory there may be other prefixes before it than on disk.
    word = (stack or "").rpartition(".")[2]
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) >= count and path.rpartition(".")[2] == word
    ]
    if not paths:
        raise SurgeryError(f"transformers has no list of {count} layers called {word!r} in a model of this config")
    # The outermost: lists of the same name inside a layer (experts) are deeper.
    path = min(paths, key=len)
    return path, list(model.get_submodule(path))


def random_weights_ref(seed: int) -> str:
    """Return the name of random weights in manifests."""
    return f"random weights by transformers, seed {seed}"


def transformers_version() -> dict[str, str]:
    """Return the version of transformers, on which random weights depend, for the manifest."""
    return {"transformers": version("transformers")}


def part_seed(seed: int, part: str) -> int:
    """Return the seed of one part of a model: the same part of any model gets the same."""
    # 15 hexadecimal digits are below 2**63, the limit of torch's seeds.
    return int(hash_text(f"{seed} {part}")[:15], 16)


def layer_prefix(stack: str | None) -> str:
    """Return what stands before a layer's number in the names of a stack."""
    return f"{stack}." if stack else ""


@contextmanager
def temporary_folder(out: Path | None) -> Iterator[Path]:
    """Create an empty folder that is deleted at the end of the block.

    It is beside `out`, under a fixed name: a plan that is resumed after a kill must find its sources where they were.
    With None, it is in the system's folder for temporary files.

    Raises:
        SurgeryError: a folder of that name is in the way, or none can be made.
    """
    if out is None:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
        return
    folder = out.with_name(out.name + ".fresh")
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARK).is_file():
        raise SurgeryError("is in the way: random weights are to be kept there meanwhile", where=folder)
    shutil.rmtree(folder, ignore_errors=True)  # left by a kill
    try:
        folder.mkdir(parents=True)
        (folder / _MARK).touch()
    except OSError as error:
        raise disk_error(error, folder) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _config_class(config: Mapping[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = config.get("model_type")
    if family not in CONFIG_MAPPING:
        raise SurgeryError(f"transformers knows no family {family!r}, which this needs")
    return CONFIG_MAPPING[family]


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy (reading changes a config) without the entries that would load other code."""
    return {key: _decoded(value) for key, value in config.items() if key not in _REMOTE_CODE}


def _decoded(value: Any) -> Any:
    """Return a copy in which {"__float__": "Infinity"}, as transformers writes it, is a float."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _decoded(inner) for key, inner in value.items()}
    return [_decoded(inner) for inner in value] if isinstance(value, list) else value


def _few_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    # Ids of special tokens would lie outside the small vocabulary.
    return {**config, "vocab_size": SMALL_VOCABULARY, **dict.fromkeys(_TOKEN_IDS)}


def _initialise_as(model: Any, depth: int) -> None:
    """Draw the weights again, as those of a model of `depth` layers."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        # transformers skips modules that carry this mark.
        module._is_hf_initialized = False
        if (config := getattr(module, "config", None)) is not None:
            configs[id(config)] = config
    counts = [
        (config, key, count)
        for config in configs.values()
        for key in N_LAYERS
        if type(count := config.__dict__.get(key)) is int
    ]
    for config, key, _ in counts:
        setattr(config, key, depth)
    model.initialize_weights()
    for config, key, count in counts:
        setattr(config, key, count)


def _set_time_from_content(path: Path) -> None:
    # A plan recognises its sources by size and time. With a time derived from the bytes, it recognises the same weights
    # when they are created again after a kill, and notices different ones.
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content, memoryview(content) as view:
        time = int.from_bytes(hash_bytes(view)[:7])
    os.utime(path, ns=(time, time))
