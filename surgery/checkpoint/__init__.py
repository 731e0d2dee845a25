"""A model on disk: headers, tensors, structure, tokenizer and adapters, with no weight loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from surgery.checkpoint.checkpoint import Checkpoint
    from surgery.checkpoint.resolve import open_checkpoint
    from surgery.checkpoint.selectors import Expert, Head
    from surgery.checkpoint.stored_tensor import StoredTensor
    from surgery.checkpoint.structure import ModelStructure, model_structure

__all__ = [
    "Checkpoint",
    "Expert",
    "Head",
    "ModelStructure",
    "StoredTensor",
    "model_structure",
    "open_checkpoint",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "surgery.checkpoint.checkpoint": ["Checkpoint"],
        "surgery.checkpoint.resolve": ["open_checkpoint"],
        "surgery.checkpoint.selectors": ["Expert", "Head"],
        "surgery.checkpoint.stored_tensor": ["StoredTensor"],
        "surgery.checkpoint.structure": ["ModelStructure", "model_structure"],
    },
)
