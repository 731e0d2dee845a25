"""Options of an execution: threads, device, overwriting, progress."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgery.runtime.progress import Progress, silent


@dataclass(frozen=True)
class ExecutionOptions:
    """How a plan is executed; none of these changes a byte of the result.

    threads: None for one per processor. device: "cpu" or "cuda[:n]". overwrite: replace an OUT that this tool wrote,
    and drop another job's `.partial`. allow_nonfinite: write NaN and infinite values instead of stopping at them.
    """

    threads: int | None = None
    device: str = "cpu"
    overwrite: bool = False
    allow_nonfinite: bool = False
    progress: Progress = field(default=silent, compare=False)
