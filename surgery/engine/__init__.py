"""Write checkpoints: plan, kernels, workers, writer, journal, manifest and verification."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from surgery.engine.checkpoint_writer import write_checkpoint
    from surgery.engine.execution import execute
    from surgery.engine.kernel import Kernel
    from surgery.engine.manifest import build_manifest, read_manifest
    from surgery.engine.options import ExecutionOptions
    from surgery.engine.plan import Plan, PlannedTensor
    from surgery.engine.verification import verify

__all__ = [
    "ExecutionOptions",
    "Kernel",
    "Plan",
    "PlannedTensor",
    "build_manifest",
    "execute",
    "read_manifest",
    "verify",
    "write_checkpoint",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "surgery.engine.checkpoint_writer": ["write_checkpoint"],
        "surgery.engine.execution": ["execute"],
        "surgery.engine.kernel": ["Kernel"],
        "surgery.engine.manifest": ["build_manifest", "read_manifest"],
        "surgery.engine.options": ["ExecutionOptions"],
        "surgery.engine.plan": ["Plan", "PlannedTensor"],
        "surgery.engine.verification": ["verify"],
    },
)
