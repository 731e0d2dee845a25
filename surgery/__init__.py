"""Model surgery: language-model checkpoints taken apart and put together better, on the weights themselves.

The names below are the public API. What shares its name with a module is imported from there, such as
`surgery.compare.compare`, `surgery.push.push`, `surgery.reproduce.reproduce`, `surgery.sweep.sweep`,
`surgery.undo.undo` and `surgery.verify.verify`; recipes are run by `surgery.recipes.engine.run_program`. Names are
imported on first use, because most bring torch along, and `surgery --help` must not wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.compare import diff
    from surgery.edits import scale_heads
    from surgery.execute import Options
    from surgery.expert_edits import scale_experts
    from surgery.extraction import extract
    from surgery.factorise import extract_adapter
    from surgery.growth.add import add_layers
    from surgery.growth.baseline import train_baselines
    from surgery.growth.init import init_model
    from surgery.growth.run import grow
    from surgery.growth.substrate import make_embedding
    from surgery.growth.tokenizer import train_tokenizer
    from surgery.refs import open_checkpoint
    from surgery.vectors import apply, transfer

__all__ = [
    "Options",
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
    "Options": "execute",
    "add_layers": "growth.add",
    "apply": "vectors",
    "diff": "compare",
    "extract": "extraction",
    "extract_adapter": "factorise",
    "grow": "growth.run",
    "init_model": "growth.init",
    "make_embedding": "growth.substrate",
    "open_checkpoint": "refs",
    "scale_experts": "expert_edits",
    "scale_heads": "edits",
    "train_baselines": "growth.baseline",
    "train_tokenizer": "growth.tokenizer",
    "transfer": "vectors",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"surgery.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'surgery' has no attribute {name!r}")
