"""A frozen embedding as a folder on disk: the names of its files, and how it is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.checkpoint.tokenizer_files import list_tokenizer_files
from surgery.engine.manifest import read_manifest
from surgery.errors import SurgeryError, usage_error
from surgery.io.hashing import KEY

KIND = "embedding"  # in the manifest
TENSOR = "embedding"
WEIGHTS = "embedding.safetensors"


@dataclass(frozen=True)
class Embedding:
    """A frozen embedding on disk: `weight` (vocab_size, width) in F32, `hash` from its manifest."""

    folder: Path
    weight: StoredTensor
    vocab_size: int
    width: int
    hash: str
    manifest: Mapping[str, Any]

    @property
    def tokenizer_files(self) -> list[Path]:
        """The files of its tokenizer, sorted."""
        return list_tokenizer_files(self.folder)


def open_embedding(ref: str | Path) -> Embedding:
    """Open a folder that `make_embedding` wrote; only headers are read.

    Raises:
        SurgeryError: `ref` is something else, or tensor and manifest contradict each other.
    """
    checkpoint = open_checkpoint(ref)
    folder = checkpoint.folder
    if folder is None:
        raise usage_error("is a file, expected an embedding's folder", where=ref)
    manifest = read_manifest(folder)
    if manifest.get("kind") != KIND:
        raise usage_error(
            f"holds a {manifest.get('kind')}, expected an embedding", where=ref, hint="`surgery grow embed` writes one."
        )
    # A growth builds hours of training on this: a damaged or exchanged file must show now, from headers alone.
    weight = checkpoint.tensors.get(TENSOR)
    entry = manifest.get("tensors", {}).get(TENSOR)
    if (
        weight is None
        or entry is None
        or (weight.dtype, list(weight.shape)) != (entry["dtype"], entry["shape"])
        or (weight.dtype, len(weight.shape)) != ("F32", 2)
    ):
        raise SurgeryError(f'"{TENSOR}" is not what the manifest says', where=folder, hint="Make the embedding again.")
    vocab_size, width = weight.shape
    return Embedding(folder, weight, vocab_size, width, entry[KEY], manifest)
