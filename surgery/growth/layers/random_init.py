"""Weights as transformers itself begins them: random models and layers, under the names that they have on disk.

In comes the config of a model, out comes a folder with random weights of one layer of it (or of what lies outside its
layers), opened as a `Checkpoint`, so that a plan reads them like any others. Nothing else of the model is made: the
vocabulary is cut to a few tokens where only a layer is wanted. The same seed gives the same bytes.
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

from surgery.checkpoint.checkpoint import Checkpoint, Shard, StoredTensor, read_folder
from surgery.checkpoint.config_layers import unsayable, with_count, with_layers
from surgery.checkpoint.structure import ModelStructure, model_structure
from surgery.checkpoint.tensor_roles import N_LAYERS
from surgery.errors import SurgeryError
from surgery.io.hashing import hash_bytes, hash_text
from surgery.runtime.quiet import quiet

SMALL_VOCABULARY = 16
ONE_FILE = "1000TB"  # what save_pretrained is told, so that it writes a single file
_MARK = ".random-weights"
_OTHER_CODE = ("quantization_config", "auto_map")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class LayerSpec:
    """A layer to be made: one of the kind that `layer` of `template` is; without these, the family's first.

    config: the whole model's.
    """

    config: Mapping[str, Any]
    layer: int | None = None
    template: ModelStructure | None = None

    def alone(self) -> dict[str, Any]:
        """The config of a language model with this layer alone, and a few tokens. Raises SurgeryError."""
        text = text_config(self.config)
        if self.layer is None or self.template is None:
            text = with_count(text, 1)
        else:
            if faults := unsayable(text, [self.layer], self.template):
                raise SurgeryError(f"layer {self.layer} cannot be made on its own: {' '.join(faults)}")
            text = with_layers(text, [self.layer], self.template)
        return _few_tokens(text)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's config as transformers understands it, with every default and every list in it.

    Raises:
        SurgeryError: transformers has no such family, or the config is wrong.
    """
    kind = _config_class(config)
    with quiet():
        try:
            found: dict[str, Any] = kind.from_dict(_plain(config)).get_text_config().to_dict()
        except Exception as fault:  # whatever the code of a family raises
            raise SurgeryError(f"transformers cannot read this config of a {config['model_type']}: {fault}") from fault
    return found


def build_model(config: Mapping[str, Any], *, seed: int, depth: int | None = None) -> Any:
    """A transformers model of `config` in fp32 on the CPU, its weights drawn from `seed`.

    Args:
        depth: the number of layers that initialisations which depend on it (GPT-2's) shall count; None for the
            config's own.

    Raises:
        SurgeryError: transformers cannot build it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    kind = _config_class(config)
    with quiet(), torch.random.fork_rng(devices=[]):
        generator = torch.default_generator  # torch.manual_seed would move the GPUs' too
        try:
            made = kind.from_dict(_plain(config))
            generator.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation="eager").eval()
            if depth is not None:
                generator.manual_seed(seed)
                _initialise_as(model, depth)
        except Exception as fault:  # whatever the code of a family raises
            raise SurgeryError(f"transformers cannot build a {config.get('model_type')} of this config: {fault}") from (
                fault
            )
    return model


def save_model(model: Any, folder: Path, *, state: Mapping[str, Any] | None = None) -> Checkpoint:
    """Writes a transformers model to `folder` and opens it. Raises SurgeryError where it cannot be written.

    state: its weights, where the model itself holds but a shard of them.
    """
    with quiet():
        try:
            model.save_pretrained(folder, max_shard_size=ONE_FILE, state_dict=state)
        except Exception as fault:  # safetensors has exceptions of its own for a full disk
            raise SurgeryError(f"weights could not be written: {fault}", where=folder) from fault
    saved = read_folder(folder)
    for path in saved.files:
        _stamp(path)
    return saved


def load_saved_model(folder: Path) -> Any:
    """The transformers model in `folder`, in fp32 on the CPU. Raises SurgeryError."""
    import torch
    from transformers import AutoModelForCausalLM

    with quiet():
        try:
            return AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=torch.float32, attn_implementation="eager"
            ).eval()
        except Exception as fault:  # whatever the code of a family raises
            raise SurgeryError(f"cannot be loaded: {fault}", where=folder) from fault


@dataclass(frozen=True)
class RandomLayers:
    """Random layers. stack: where the family keeps its layers; outside: the names of what lies elsewhere in it.

    checkpoint: the layers' tensors under their names in the model to come. inner: name inside the layer → tensor, per
    layer.
    """

    checkpoint: Checkpoint
    stack: str
    outside: frozenset[str]
    inner: Mapping[int, Mapping[str, StoredTensor]]


def random_layers(
    kinds: Mapping[int, LayerSpec], folder: Path, *, seed: int, depth: int, stack: str | None = None
) -> RandomLayers:
    """Random layers, one after the other, each from a seed of its own: that of (`seed`, its number).

    Args:
        kinds: number in the model to come → what is to be made.
        folder: where they are written.
        depth: layers of the model to come.
        stack: what stands before the number in its names; by default what transformers writes.

    Raises:
        SurgeryError: transformers cannot build such a layer.
    """
    shards: list[Shard] = []
    inner: dict[int, dict[str, StoredTensor]] = {}
    outside = frozenset[str]()
    for number, kind in kinds.items():
        made = build_model(kind.alone(), seed=part_seed(seed, f"layer {number}"), depth=depth)
        saved = save_model(made, folder / f"layer-{number}")
        found = model_structure(saved)
        if found.stack is None or found.layers != 1:
            raise SurgeryError("no layer was found in the names that transformers gives a model of this family")
        stack = found.stack if stack is None else stack
        held = {name: saved.tensors[name] for name in found.blocks[0].names}
        short = {name.removeprefix(f"{layer_prefix(found.stack)}0."): tensor for name, tensor in held.items()}
        inner[number] = {
            name: replace(tensor, name=f"{layer_prefix(stack)}{number}.{name}") for name, tensor in short.items()
        }
        outside = frozenset(saved.tensors.keys() - held.keys())
        shards += saved.shards
    tensors = {tensor.name: tensor for held in inner.values() for tensor in held.values()}
    checkpoint = Checkpoint(random_weights_ref(seed), None, tuple(shards), dict(sorted(tensors.items())))
    return RandomLayers(checkpoint, stack or "", outside, inner)


def random_embedding_and_head(config: Mapping[str, Any], folder: Path, *, seed: int) -> Checkpoint:
    """What of a random model of `config` lies outside the layers: embedding, final norm, head. Raises SurgeryError."""
    model = build_model(with_count(text_config(config), 0), seed=part_seed(seed, "ends"))
    return replace(save_model(model, folder / "ends"), ref=random_weights_ref(seed))


def layers_in(model: Any, stack: str | None, count: int) -> tuple[str, list[Any]]:
    """Where a transformers model has its layers, and these: what is called as the `stack` of names on disk.

    Raises:
        SurgeryError: it has no list of at least `count` modules of that name.
    """
    import torch

    word = (stack or "").rpartition(".")[2]
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) >= count and path.rpartition(".")[2] == word
    ]
    if not paths:
        raise SurgeryError(f"transformers has no list of {count} layers called {word!r} in a model of this config")
    path = min(paths, key=len)
    return path, list(model.get_submodule(path))


def random_weights_ref(seed: int) -> str:
    """What manifests call random weights."""
    return f"random weights by transformers, seed {seed}"


def transformers_version() -> dict[str, str]:
    """The version that random weights depend on, as manifests keep it."""
    return {"transformers": version("transformers")}


def part_seed(seed: int, part: str) -> int:
    """A seed for one part of a model: the same part of any model gets the same."""
    return int(hash_text(f"{seed} {part}")[:15], 16)


def layer_prefix(stack: str | None) -> str:
    """What stands before a layer's number in the names of a stack."""
    return f"{stack}." if stack else ""


@contextmanager
def temporary_folder(out: Path | None) -> Iterator[Path]:
    """An empty folder that is gone at the end of the block.

    It lies beside `out` under a name that is the same the next time, as a plan that is continued after a kill must
    find its sources where they were; with None, anywhere.

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
    except OSError as fault:
        raise SurgeryError(f"cannot be written ({fault.strerror})", where=folder) from fault
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _config_class(config: Mapping[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise SurgeryError(f"transformers knows no family {kind!r}, which this needs")
    return CONFIG_MAPPING[kind]


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what would bring other code in; a copy, as reading changes it."""
    return {key: _decoded(value) for key, value in config.items() if key not in _OTHER_CODE}


def _decoded(value: Any) -> Any:
    """A copy in which numbers are numbers that transformers writes as {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _decoded(inner) for key, inner in value.items()}
    return [_decoded(inner) for inner in value] if isinstance(value, list) else value


def _few_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, "vocab_size": SMALL_VOCABULARY, **dict.fromkeys(_TOKEN_IDS)}


def _initialise_as(model: Any, depth: int) -> None:
    """Draws the weights once more, as those of a model of `depth` layers."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        module._is_hf_initialized = False
        if (config := getattr(module, "config", None)) is not None:
            configs[id(config)] = config
    counts = [
        (config, key, held)
        for config in configs.values()
        for key in N_LAYERS
        if type(held := config.__dict__.get(key)) is int
    ]
    for config, key, _ in counts:
        setattr(config, key, depth)
    model.initialize_weights()
    for config, key, held in counts:
        setattr(config, key, held)


def _stamp(path: Path) -> None:
    # A plan knows its sources by size and time: with a time that follows from the bytes, it knows the same weights
    # again when they are made anew after a kill, and others for others.
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content, memoryview(content) as view:
        time = int.from_bytes(hash_bytes(view)[:7])
    os.utime(path, ns=(time, time))
