"""The same work over several processes (`accelerate launch`): each takes some of the batches, all get every result.

Batches are made before they are dealt out, so that each is computed as one process alone would compute it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from surgery.process import is_main, n_processes, rank
from surgery.progress import Progress, silent

__all__ = ["is_main", "n_processes", "share", "wait"]

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
    """
    world = n_processes()
    mine = range(rank(), len(items), world)
    done: list[tuple[int, Result]] = []
    with progress(label, sum(size(items[at]) for at in mine), "steps") as advance:
        for at in mine:
            done.append((at, work(items[at])))
            advance(size(items[at]))
    if world == 1:
        return [result for _, result in done]
    results = dict(pair for part in _gather(done) for pair in part)
    return [results[at] for at in range(len(items))]


def wait() -> None:
    """Waits for all processes; nothing with one."""
    if n_processes() > 1:
        _state().wait_for_everyone()


def _gather(value: Any) -> list[Any]:
    import torch.distributed as dist

    _state()
    parts: list[Any] = [None] * n_processes()
    dist.all_gather_object(parts, value)
    return parts


def _state() -> Any:
    from accelerate import PartialState

    return PartialState()
