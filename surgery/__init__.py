"""Model surgery: language-model checkpoints taken apart and put together better, on the weights themselves.

The names below are the public API. What shares its name with a module is imported from there, such as
`surgery.vectors.comparison.compare`, `surgery.publish.upload.push`, `surgery.recipes.reproduction.reproduce`,
`surgery.vectors.scale_sweep.sweep`, `surgery.edits.undo_file.undo` and `surgery.engine.verification.verify`; recipes
are run by `surgery.recipes.run.scheduler.run_pipeline`. Names are imported on first use, because most bring torch along,
and `surgery --help` must not wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.checkpoint.resolve import open_checkpoint
    from surgery.edits.experts import scale_experts
    from surgery.edits.heads import scale_heads
    from surgery.engine.options import ExecutionOptions
    from surgery.growth.baseline import train_baselines
    from surgery.growth.data.tokenizer_training import train_tokenizer
    from surgery.growth.embedding.build import make_embedding
    from surgery.growth.layers.add import add_layers
    from surgery.growth.layers.initial_model import init_model
    from surgery.growth.run import grow
    from surgery.vectors.application import apply, transfer
    from surgery.vectors.comparison import diff
    from surgery.vectors.extraction import extract
    from surgery.vectors.to_lora import extract_adapter

__all__ = [
    "ExecutionOptions",
    "SurgeryError",
    "add_layers",
    "apply",
    "diff",
    "extract",
    "extract_adapter",
    "grow",
    "init_model",
    "make_embedding",
    "open_checkpoint",
    "scale_experts",
    "scale_heads",
    "train_baselines",
    "train_tokenizer",
    "transfer",
]

_HOMES = {
    "ExecutionOptions": "engine.options",
    "add_layers": "growth.layers.add",
    "apply": "vectors.application",
    "diff": "vectors.comparison",
    "extract": "vectors.extraction",
    "extract_adapter": "vectors.to_lora",
    "grow": "growth.run",
    "init_model": "growth.layers.init_model",
    "make_embedding": "growth.embedding.build",
    "open_checkpoint": "checkpoint.resolve",
    "scale_experts": "edits.experts",
    "scale_heads": "edits.heads",
    "train_baselines": "growth.baseline",
    "train_tokenizer": "growth.data.train_tokenizer",
    "transfer": "vectors.application",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"surgery.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'surgery' has no attribute {name!r}")
