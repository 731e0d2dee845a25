"""Model surgery: language-model checkpoints taken apart and put together better, on the weights themselves.

The names below are the public API; what shares its name with a module (`surgery.compare.compare`,
`surgery.sweep.sweep`, `surgery.verify.verify`) is imported from there. They are imported on first use, because most
bring torch along, and `surgery --help` must not wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.compare import diff
    from surgery.execute import Options
    from surgery.extraction import extract
    from surgery.factorise import extract_adapter
    from surgery.refs import open_checkpoint
    from surgery.vectors import apply, transfer

__all__ = [
    "Options",
    "SurgeryError",
    "apply",
    "diff",
    "extract",
    "extract_adapter",
    "open_checkpoint",
    "transfer",
]

_HOMES = {
    "Options": "execute",
    "apply": "vectors",
    "diff": "compare",
    "extract": "extraction",
    "extract_adapter": "factorise",
    "open_checkpoint": "refs",
    "transfer": "vectors",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"surgery.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'surgery' has no attribute {name!r}")
