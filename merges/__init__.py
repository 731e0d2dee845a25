"""Merge models: on their weights, by every method of mergekit's YAML, or by averaging their logits.

from merges import merge

merge(Path("config.yml"), Path("OUT"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from merges.ensemble.average import average_logits
    from merges.ensemble.unpacking import unpack
    from merges.methods import METHODS
    from merges.run import merge

__all__ = [
    "METHODS",
    "average_logits",
    "merge",
    "unpack",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "merges.ensemble.average": ["average_logits"],
        "merges.ensemble.unpacking": ["unpack"],
        "merges.methods": ["METHODS"],
        "merges.run": ["merge"],
    },
)
