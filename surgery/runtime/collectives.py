"""The same work over several processes (`accelerate launch`): each takes some of the batches, all get every result.

Batches are made before they are dealt out, so that each is computed as one process alone would compute it. What the
processes tell each other goes over gloo, wherever the work is done: it needs no GPU of its own for each, and a process
that is killed cuts the connection, which the others see at once. Training on GPUs talks over NCCL beside it.
"""

from __future__ import annotations

import atexit
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from surgery.errors import SurgeryError, listing, usage_error
from surgery.runtime.environment import n_processes, rank
from surgery.runtime.progress import Progress, silent

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]


Item = TypeVar("Item")
Result = TypeVar("Result")
P = ParamSpec("P")

# How long processes wait for each other once they have met: one may tokenise or measure while the others do nothing.
# One that ends early is no reason to wait less: its connection is cut.
PATIENCE = timedelta(days=1)
# How long they wait for those that have not begun: a machine may be started by hand, or load Python from a slow disk.
MEETING = timedelta(minutes=15)
_LOOK = 0.1  # seconds between two looks at who is missing

_here = {"alone": False}


def n_active_processes() -> int:
    """How many processes would share what is shared now: 1 inside of `single_process` and of what is shared."""
    return 1 if _here["alone"] else n_processes()


@contextmanager
def single_process() -> Iterator[None]:
    """In the block nothing is shared: what calls `map_over_ranks` there does all of it, and waits for nobody.

    For what one process does while the others do something else.
    """
    before = _here["alone"]
    _here["alone"] = True
    try:
        yield
    finally:
        _here["alone"] = before


def map_over_ranks(
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
    world = n_active_processes()
    if world > 1:
        connect()  # before the work, or nobody would hear that a process was killed at it
    mine = range(rank() if world > 1 else 0, len(items), world)
    done: list[tuple[int, Result]] = []
    fault: Exception | None = None
    try:
        with progress(label, sum(size(items[at]) for at in mine), "steps") as advance:
            for at in mine:
                with single_process():
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
    told = None if fault is None else failure_text(fault)
    parts: list[tuple[list[tuple[int, Result]], str | None]] = _gather((done, told))
    if fault is not None:
        raise fault
    for _, text in parts:
        if text is not None:
            raise SurgeryError(text)
    results = dict(pair for part, _ in parts for pair in part)
    return [results[at] for at in range(len(items))]


def on_main(fn: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    """Call `fn(*args, **kwargs)` on rank 0 while the others wait, and return its result on every rank.

    Raises:
        SurgeryError: the call failed, on every rank; another process has ended.
    """
    return map_over_ranks([None], lambda _: fn(*args, **kwargs))[0]


def failure_text(error: Exception) -> str:
    """What a process that failed by `error` tells the others."""
    # The text of many exceptions says nothing without their name: KeyError("x") is 'x'.
    what = str(error) if isinstance(error, SurgeryError) else f"{type(error).__name__}: {error}"
    return f"process {rank()} failed: {what}"


def local_device(device: str) -> str:
    """The device of this process: `cuda` is a GPU of its own where a launcher started several.

    Raises:
        SurgeryError: `auto`, which spreads one model over all GPUs, with several processes.
    """
    if n_processes() > 1 and device == "auto":
        raise usage_error(
            "auto spreads one model over all devices, which several processes cannot share",
            where="device",
            hint="Use cuda, which gives each process a GPU of its own, or start one process.",
        )
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if n_processes() > 1 and device == "cuda" else device


def all_reduce_sum(counts: Tensor) -> Tensor:
    """The sum over all processes of whole numbers that each has counted, in every process."""
    if n_active_processes() == 1:
        return counts
    parts: list[Tensor] = _gather(counts)
    return torch.stack(parts).sum(0)


def barrier() -> None:
    """Waits for all processes; nothing with one."""
    if n_active_processes() > 1:
        _gather(None)


def connect() -> None:
    """Waits until all processes have begun; nothing with one. Without it they meet when they first share or wait.

    For programs, which call it first: what one process does before the others know of it counts as not having begun.

    Raises:
        SurgeryError: some do not begin within `MEETING`; nobody says where to meet.
    """
    if n_processes() > 1:
        _connect()


def _gather(value: Any) -> list[Any]:
    import torch.distributed as dist

    _connect()
    parts: list[Any] = [None] * n_processes()
    try:
        dist.all_gather_object(parts, value)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo has no type of its own for a connection that is cut
        raise _lost(error) from error
    return parts


def _lost(error: RuntimeError) -> SurgeryError:
    return SurgeryError(
        f"another process has ended, or does not answer ({str(error).splitlines()[0]})",
        where=_me(),
        hint="What that one said last tells why. The same command goes on where this one stopped.",
    )


@cache
def _connect() -> None:
    import torch.distributed as dist

    if not dist.is_initialized():
        store = _open_store()
        _await_all(store)
        try:
            dist.init_process_group(_backends(), store=store, rank=rank(), world_size=n_processes(), timeout=PATIENCE)
        except RuntimeError as error:
            raise _lost(error) from error
    # Left to the interpreter's end, the connection's threads may outlive what they use, which aborts the process.
    atexit.register(_disconnect)


def _open_store() -> Store:
    """Where processes leave word for each other until they are connected; the first one keeps it, or its launcher.

    What torch does for this by itself waits for all in one go, during which nobody hears of Ctrl-C.
    """
    import torch.distributed as dist

    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise usage_error(
            f"WORLD_SIZE says that there are {n_processes()} processes, and MASTER_ADDR and MASTER_PORT not where they "
            "meet",
            hint="Start them with `accelerate launch` or torchrun, or unset WORLD_SIZE.",
        ) from error
    keeps = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not keeps:
        _until(lambda: _answers(host, port), lambda: f"nothing answers at {host}, port {port}, where all meet")
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, n_processes(), is_master=keeps, timeout=MEETING, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        raise SurgeryError(
            f"the processes cannot meet at {host}, port {port} ({str(error).splitlines()[0]})", where=_me()
        ) from error
    # A launcher's is the same one after it has started all anew.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"surgery {attempt}", store)  # type: ignore[attr-defined]


def _await_all(store: Store) -> None:
    def key(number: int) -> str:
        return f"here {number}"

    def missing() -> str:
        names = listing(str(number) for number in range(n_processes()) if not store.check([key(number)]))
        return f"of {n_processes()} processes these have not begun: {names}"

    try:
        store.set(key(rank()), "")
        _until(lambda: store.check([key(number) for number in range(n_processes())]), missing)
    except RuntimeError as error:
        raise _lost(error) from error


def _until(done: Callable[[], bool], missing: Callable[[], str]) -> None:
    """Returns once `done`; says what is `missing` where that takes longer than `MEETING`."""
    until = time.monotonic() + MEETING.total_seconds()
    while not done():
        if time.monotonic() > until:
            raise SurgeryError(
                f"{missing()}, after {MEETING.total_seconds() / 60:g} minutes",
                where=_me(),
                hint="Start the same command everywhere.",
            )
        time.sleep(_LOOK)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def _me() -> str:
    return f"process {rank()}"


def _backends() -> str:
    """What the processes talk over: gloo for what lies in a CPU's memory, as all that is told does; for training on
    another device what is made for it, which is set up when it is first used."""
    import torch.distributed as dist

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    backend = "gloo" if device is None else dist.Backend.default_device_backend_map.get(device.type, "gloo")
    return "gloo" if device is None or backend == "gloo" else f"cpu:gloo,{device.type}:{backend}"


def _disconnect() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
