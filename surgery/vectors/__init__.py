"""Task vectors (arXiv 2509.01363): extract, apply, transfer, compare and sweep them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from surgery.vectors.application import apply, transfer
    from surgery.vectors.comparison import compare, diff
    from surgery.vectors.extraction import extract
    from surgery.vectors.scale_sweep import sweep
    from surgery.vectors.task_vector import TaskVector, open_vector
    from surgery.vectors.to_lora import extract_adapter

__all__ = [
    "TaskVector",
    "apply",
    "compare",
    "diff",
    "extract",
    "extract_adapter",
    "open_vector",
    "sweep",
    "transfer",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "surgery.vectors.application": ["apply", "transfer"],
        "surgery.vectors.comparison": ["compare", "diff"],
        "surgery.vectors.extraction": ["extract"],
        "surgery.vectors.scale_sweep": ["sweep"],
        "surgery.vectors.task_vector": ["TaskVector", "open_vector"],
        "surgery.vectors.to_lora": ["extract_adapter"],
    },
)
