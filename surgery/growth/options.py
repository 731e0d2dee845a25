"""Options of a growth run that do not belong to its plan: device, threads, checkpoint interval, logging."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgery.runtime.progress import Progress, silent


@dataclass(frozen=True)
class RunOptions:
    """How a growth is run; none of it changes a result beyond rounding.

    device: cpu or cuda[:N]; None takes a GPU where there is one. threads: of the CPU; None leaves torch's number.
    save_every: minutes between two resumable states. logs: whether TensorBoard event files are written.
    """

    device: str | None = None
    threads: int | None = None
    save_every: float = 5.0
    logs: bool = False
    # Not compared: functions are equal only to themselves.
    progress: Progress = field(default=silent, compare=False)
