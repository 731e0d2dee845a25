"""Recipes: whole pipelines in one YAML file, validated first and resumable."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from surgery.recipes.parse.graph import build_pipeline
    from surgery.recipes.reproduction import Reproduction, reproduce_output
    from surgery.recipes.run.scheduler import RunReport, run_pipeline

__all__ = [
    "Reproduction",
    "RunReport",
    "build_pipeline",
    "reproduce_output",
    "run_pipeline",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "surgery.recipes.parse.graph": ["build_pipeline"],
        "surgery.recipes.reproduction": ["Reproduction", "reproduce_output"],
        "surgery.recipes.run.scheduler": ["RunReport", "run_pipeline"],
    },
)
