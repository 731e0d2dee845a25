"""The same work over several processes (`accelerate launch`): each takes some of the batches, all get every result.

Batches are made before they are dealt out, so that each is computed as one process alone would compute it.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from surgery.errors import SurgeryError, usage_error
from surgery.process import is_main, n_processes, rank
from surgery.progress import Progress, silent

__all__ = ["is_main", "n_processes", "own_device", "share", "total", "wait"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def share(
    items: Sequence[Item],
    work: Callable[[Item], Result],
    *,
    label: str = "",
    size: Callable[[Item], int] = lambda item: 1,
    progress: Progress = silent,
) -> list[Result]:
    """`work` of every item, in the items' order, in every process.

    Args:
        size: what the progress bar counts an item as.

    Raises:
        SurgeryError: another process could not do its share. What `work` raises here is raised here, once all
            processes know of it: none is left waiting.
    """
    world = n_processes()
    mine = range(rank(), len(items), world)
    done: list[tuple[int, Result]] = []
    fault: Exception | None = None
    try:
        with progress(label, sum(size(items[at]) for at in mine), "steps") as advance:
            for at in mine:
                done.append((at, work(items[at])))
                advance(size(items[at]))
    except Exception as error:
        if world == 1:
            raise
        fault = error
    if world == 1:
        return [result for _, result in done]
    # Faults travel as text: not every exception can be pickled.
    parts: list[tuple[list[tuple[int, Result]], str | None]] = _gather((done, None if fault is None else str(fault)))
    if fault is not None:
        raise fault
    for number, (_, text) in enumerate(parts):
        if text is not None:
            raise SurgeryError(f"process {number} failed: {text}")
    results = dict(pair for part, _ in parts for pair in part)
    return [results[at] for at in range(len(items))]


def own_device(device: str) -> str:
    """The device of this process: `cuda` is a GPU of its own where a launcher started several.

    Raises:
        SurgeryError: `auto`, which spreads one model over all GPUs, with several processes.
    """
    if n_processes() > 1 and device == "auto":
        raise usage_error(
            "auto spreads one model over all devices, which several processes cannot share", where="device",
            hint="Use cuda, which gives each process a GPU of its own, or start one process.",
        )  # fmt: skip
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if n_processes() > 1 and device == "cuda" else device


def total(counts: Tensor) -> Tensor:
    """The sum over all processes of whole numbers that each has counted, in every process."""
    if n_processes() == 1:
        return counts
    parts: list[Tensor] = _gather(counts)
    return torch.stack(parts).sum(0)


def wait() -> None:
    """Waits for all processes; nothing with one."""
    if n_processes() > 1:
        _gather(None)  # accelerate's own waiting does nothing on CPUs unless it was launched with --cpu


def _gather(value: Any) -> list[Any]:
    import torch.distributed as dist

    _state()
    parts: list[Any] = [None] * n_processes()
    dist.all_gather_object(parts, value)
    return parts


@cache
def _state() -> Any:
    from accelerate import PartialState

    # Without being told, it takes several processes on CPUs for unconnected ones.
    state = PartialState(cpu=not torch.accelerator.is_available())
    # Left to the interpreter's end, the connection's threads may outlive what they use, which aborts the process.
    atexit.register(_disconnect)
    return state


def _disconnect() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
