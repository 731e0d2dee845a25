"""Edits of one model's attention heads and experts in the weights, and their undo."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from surgery.edits.experts import scale_experts
    from surgery.edits.heads import mean_heads, scale_heads
    from surgery.edits.undo_file import undo

__all__ = [
    "mean_heads",
    "scale_experts",
    "scale_heads",
    "undo",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "surgery.edits.experts": ["scale_experts"],
        "surgery.edits.heads": ["mean_heads", "scale_heads"],
        "surgery.edits.undo_file": ["undo"],
    },
)
