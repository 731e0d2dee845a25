"""Grow transformers layer by layer on a frozen embedding (arXiv 2507.07129)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from surgery.growth.baseline import train_baselines
    from surgery.growth.data.tokenizer_training import train_tokenizer
    from surgery.growth.embedding.build import make_embedding
    from surgery.growth.layers.add import add_layers
    from surgery.growth.layers.initial_model import init_model
    from surgery.growth.options import RunOptions
    from surgery.growth.prepare import load_plan, prepare_run
    from surgery.growth.run import grow

__all__ = [
    "RunOptions",
    "add_layers",
    "grow",
    "init_model",
    "load_plan",
    "make_embedding",
    "prepare_run",
    "train_baselines",
    "train_tokenizer",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "surgery.growth.baseline": ["train_baselines"],
        "surgery.growth.data.tokenizer_training": ["train_tokenizer"],
        "surgery.growth.embedding.build": ["make_embedding"],
        "surgery.growth.layers.add": ["add_layers"],
        "surgery.growth.layers.initial_model": ["init_model"],
        "surgery.growth.options": ["RunOptions"],
        "surgery.growth.prepare": ["load_plan", "prepare_run"],
        "surgery.growth.run": ["grow"],
    },
)
