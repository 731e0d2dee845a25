"""Models in memory: load with transformers, find their layers, run parts of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from surgery.models.forward_pass import partial_forward
    from surgery.models.loaded_model import LoadedModel, load_with_structure
    from surgery.models.loading import load_model, load_tokenizer

__all__ = [
    "LoadedModel",
    "load_model",
    "load_tokenizer",
    "load_with_structure",
    "partial_forward",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "surgery.models.forward_pass": ["partial_forward"],
        "surgery.models.loaded_model": ["LoadedModel", "load_with_structure"],
        "surgery.models.loading": ["load_model", "load_tokenizer"],
    },
)
