"""The same work over several processes (`accelerate launch`): each takes some of the batches, all get every result.

Batches are made before they are dealt out, so that each is computed as one process alone would compute it.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from surgery.errors import SurgeryError, usage_error
from surgery.process import is_main, n_processes, rank
from surgery.progress import Progress, silent

__all__ = ["alone", "is_main", "n_processes", "n_sharing", "own_device", "share", "total", "wait"]

Item = TypeVar("Item")
Result = TypeVar("Result")

# How long processes wait for each other: one may tokenise or measure while the others do nothing. One that ends early
# is no reason to wait less, since the launcher then ends all.
PATIENCE = timedelta(days=1)

_here = {"alone": False}


def n_sharing() -> int:
    """How many processes would share what is shared now: 1 inside of `alone`, and so inside of what is shared."""
    return 1 if _here["alone"] else n_processes()


@contextmanager
def alone() -> Iterator[None]:
    """In the block nothing is shared: what calls `share` there does all of it, and waits for nobody.

    For what one process does while the others do something else.
    """
    before = _here["alone"]
    _here["alone"] = True
    try:
        yield
    finally:
        _here["alone"] = before


def share(
    items: Sequence[Item],
    work: Callable[[Item], Result],
    *,
    label: str = "",
    size: Callable[[Item], int] = lambda item: 1,
    progress: Progress = silent,
) -> list[Result]:
    """`work` of every item, in the items' order, in every process. What `work` itself shares it does alone.

    Args:
        size: what the progress bar counts an item as.

    Raises:
        SurgeryError: another process could not do its share. What `work` raises here is raised here, once all
            processes know of it: none is left waiting.
    """
    world = n_sharing()
    mine = range(rank() if world > 1 else 0, len(items), world)
    done: list[tuple[int, Result]] = []
    fault: Exception | None = None
    try:
        with progress(label, sum(size(items[at]) for at in mine), "steps") as advance:
            for at in mine:
                with alone():
                    result = work(items[at])
                done.append((at, result))
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
    if n_sharing() == 1:
        return counts
    parts: list[Tensor] = _gather(counts)
    return torch.stack(parts).sum(0)


def wait() -> None:
    """Waits for all processes; nothing with one."""
    if n_sharing() > 1:
        _gather(None)  # accelerate's own waiting does nothing on CPUs unless it was launched with --cpu


def _gather(value: Any) -> list[Any]:
    import torch.distributed as dist

    _state()
    parts: list[Any] = [None] * n_processes()
    try:
        dist.all_gather_object(parts, value)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo has no type of its own for a connection that is cut
        raise SurgeryError(
            f"another process has ended, or does not answer ({str(error).splitlines()[0]})",
            where=f"process {rank()}",
            hint="What that one said last tells why. The same command goes on where this one stopped.",
        ) from error
    return parts


@cache
def _state() -> Any:
    from accelerate import PartialState

    # Without being told, it takes several processes on CPUs for unconnected ones.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    # Left to the interpreter's end, the connection's threads may outlive what they use, which aborts the process.
    atexit.register(_disconnect)
    return state


def _disconnect() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
