"""Recognise files of other programs than mergekit-yaml, and say what is done here with such work.

mergekit has several programs with configs of their own, and a file's name does not say for which of them it is. Those
of mergekit-multi (several documents with names) are merges, and are read; those of mergekit-pytorch too, where they
name safetensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from surgery.hub.file_selection import PICKLE_SUFFIXES
from surgery.io.yaml_nodes import YamlNode

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class _ForeignFile:
    """A kind of file that has all of the keys `needed`, and one of `some` where there are any."""

    what: str
    needed: tuple[str, ...]
    some: tuple[str, ...] = ()

    def matches(self, keys: dict[str, YamlNode]) -> bool:
        return all(key in keys for key in self.needed) and (not self.some or any(key in keys for key in self.some))


_MOE = (
    "is a config of mergekit-moe, which makes a mixture of experts of dense models, and that is not done here. Make "
    "the mixture with it: merges, surgery probe experts and surgery edit experts then take it as a model"
)
_FILES = (
    _ForeignFile(_MOE, ("experts",)),
    _ForeignFile(_MOE, ("gate_mode",)),
    _ForeignFile(_MOE, ("shared_experts",)),
    _ForeignFile(_MOE, ("experts_per_token",)),
    _ForeignFile(
        "is a config of mergekit-evolve, which searches for the parameters of a merge, and that is not done here. "
        "Merge the best_config.yaml that it writes, or score strengths of one vector with surgery vector sweep",
        ("genome",),
    ),
    _ForeignFile(
        "is a config of bakllama, mergekit's old form of passthrough. Write merge_method: passthrough, and each "
        "entry of layer_slices as one of slices: {sources: [{model: MODEL, layer_range: [START, END]}]}",
        ("layer_slices",),
    ),
    _ForeignFile(
        "has options of mergekit-tokensurgeon, which puts the tokenizer of a donor into a model, and that is not done "
        "here. In a merge, tokenizer_source matches the tokens of several models by their text",
        ("donor",),
        ("model", "base_model", "recipient", "out_path"),
    ),
    _ForeignFile(
        "is a recipe of several steps, and no merge config. Run it with surgery run",
        ("steps",),
    ),
    _ForeignFile(
        "is a model's own config.json, and no merge config. Name the model's folder, as in surgery merge METHOD A B",
        ("model_type",),
    ),
    _ForeignFile(
        "is a PEFT adapter's config, and no merge config. Name the adapter's folder where a model is named",
        ("peft_type",),
    ),
)


def foreign_file(document: YamlNode) -> str | None:
    """Return what a document is that is no merge config but another program's, and the next step; else None."""
    keys = document.children
    # A merge that also has such a key is a merge, in which the key is unknown.
    if "merge_method" in keys and any(key in keys for key in ("models", "slices", "modules")):
        return None
    return next((file.what for file in _FILES if file.matches(keys)), None)


def pickle_instead_of_model(ref: str) -> str | None:
    """Return why `ref` is not read where it is a file of PyTorch's, as mergekit-pytorch takes them; else None."""
    if not ref.lower().endswith(PICKLE_SUFFIXES):
        return None
    # A folder and a repository of the Hub may be called so too.
    if not Path(ref).is_file() and (Path(ref).is_dir() or _HUB_ID.fullmatch(ref)):
        return None
    return (
        f"{ref} is a pickle of PyTorch, as mergekit-pytorch takes them, which can run code when it is opened, and is "
        "not read. Save it as .safetensors, of which a single file is a model too"
    )
