"""Distribute work over the processes of a launcher (`accelerate launch`), and gather all results on every rank.

Batches are formed before they are distributed, so that each is computed exactly as one process alone would compute it.
Results travel over gloo, whatever the device: processes may then share a GPU, and a process that is killed cuts its
connection, which the others notice at once. Training on GPUs uses NCCL beside it.
"""

from __future__ import annotations

import atexit
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
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

# How long connected processes wait for each other: one may tokenise or measure for hours while the others do nothing.
# A process that dies is noticed at once by its connection, so a long timeout costs nothing.
COLLECTIVE_TIMEOUT = timedelta(days=1)
# How long they wait for processes that have not started: a machine may be started by hand, or load Python from a slow
# disk.
START_TIMEOUT = timedelta(minutes=15)
_POLL_INTERVAL = 0.1  # seconds between two checks for processes that have not started

_distributing = True  # False inside `single_process`


def n_active_processes() -> int:
    """Return how many processes share work: 1 inside `single_process`, and in what `map_over_ranks` calls."""
    return n_processes() if _distributing else 1


@contextmanager
def single_process() -> Iterator[None]:
    """Distribute nothing in the block: `map_over_ranks` there does all the work in this process, and waits for nobody.

    For work that one process does while the others do something else: a collective call would hang.
    """
    global _distributing
    before = _distributing
    _distributing = False
    try:
        yield
    finally:
        _distributing = before


def map_over_ranks(
    items: Sequence[Item],
    work: Callable[[Item], Result],
    *,
    label: str = "",
    size: Callable[[Item], int] = lambda item: 1,
    progress: Progress = silent,
) -> list[Result]:
    """Return `work(item)` for every item, in their order, on every rank; each rank computes some of them.

    Calls of `map_over_ranks` inside `work` are not distributed again.

    Args:
        size: the units of the progress bar that an item counts for.

    Raises:
        SurgeryError: another process failed. An exception of `work` in this process is raised here, after all other
            processes have been told, so that none is left waiting.
    """
    world = n_active_processes()
    if world > 1:
        connect()  # before the work, or nobody would notice a process that is killed while it works
    # Every n-th item rather than a run of them: neighbours are often of like size, and each rank gets some of the long.
    indices = range(rank() if world > 1 else 0, len(items), world)
    done: list[tuple[int, Result]] = []
    failure: Exception | None = None
    try:
        with progress(label, sum(size(items[at]) for at in indices), "steps") as advance:
            for at in indices:
                with single_process():
                    result = work(items[at])
                done.append((at, result))
                advance(size(items[at]))
    except Exception as error:
        if world == 1:
            raise
        failure = error
    if world == 1:
        return [result for _, result in done]
    # Failures travel as text: not every exception can be pickled.
    text = None if failure is None else failure_text(failure)
    parts: list[tuple[list[tuple[int, Result]], str | None]] = _gather((done, text))
    if failure is not None:
        raise failure
    for _, message in parts:
        if message is not None:
            raise SurgeryError(message)
    results = dict(pair for part, _ in parts for pair in part)
    return [results[at] for at in range(len(items))]


def on_main(fn: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    """Call `fn(*args, **kwargs)` on rank 0 while the others wait, and return its result on every rank.

    Raises:
        SurgeryError: the call failed, on every rank; another process has ended.
    """
    return map_over_ranks([None], lambda _: fn(*args, **kwargs))[0]


@contextmanager
def entered_on_main(context: AbstractContextManager[Any]) -> Iterator[None]:
    """Enter `context`, such as a lock, on rank 0, and leave it there at the end of the block.

    Raises:
        SurgeryError: it could not be entered, on every rank.
    """
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(context)

        on_main(enter)
        yield


def failure_text(error: Exception) -> str:
    """Return the message to other processes about a failure in this one."""
    # The text of many exceptions says nothing without their name: KeyError("x") is 'x'.
    what = str(error) if isinstance(error, SurgeryError) else f"{type(error).__name__}: {error}"
    return f"process {rank()} failed: {what}"


def local_device(device: str) -> str:
    """Return the device for this process: with several processes, `cuda` is a GPU for each.

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
    """Return the sum of `counts`, whole numbers, over all processes, on every rank."""
    if n_active_processes() == 1:
        return counts
    parts: list[Tensor] = _gather(counts)
    return torch.stack(parts).sum(0)


def barrier() -> None:
    """Wait for all processes; do nothing with one."""
    if n_active_processes() > 1:
        _gather(None)


def connect() -> None:
    """Wait until all processes have started and connect them; do nothing with one.

    Programs call it first: a process that is killed before it has connected is noticed only after `START_TIMEOUT`.
    Without it the first collective call connects.

    Raises:
        SurgeryError: some do not start within `START_TIMEOUT`; the address of the launcher is not set.
    """
    if n_processes() > 1:
        _connect()


def _gather(value: Any) -> list[Any]:
    import torch.distributed as dist

    _connect()
    parts: list[Any] = [None] * n_processes()
    try:
        dist.all_gather_object(parts, value)
    # It is a RuntimeError as well, but says nothing about the connection.
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo has no exception type of its own for a connection that is cut
        raise _connection_lost(error) from error
    return parts


def _connection_lost(error: RuntimeError) -> SurgeryError:
    return SurgeryError(
        f"another process has ended, or does not answer ({str(error).splitlines()[0]})",
        where=_process_name(),
        hint="What that one said last tells why. The same command goes on where this one stopped.",
    )


@cache
def _connect() -> None:
    import torch.distributed as dist

    if not dist.is_initialized():
        store = _open_store()
        _await_all(store)
        try:
            dist.init_process_group(
                _backends(), store=store, rank=rank(), world_size=n_processes(), timeout=COLLECTIVE_TIMEOUT
            )
        except RuntimeError as error:
            raise _connection_lost(error) from error
    # Left to the interpreter's exit, the connection's threads may outlive what they use, which aborts the process.
    atexit.register(_disconnect)


def _open_store() -> Store:
    """Return the key-value store by which processes find each other; rank 0 hosts it, or its launcher.

    torch's own rendezvous waits for all processes in one blocking call, during which Ctrl-C is not noticed.
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
    hosts = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not hosts:
        _wait_until(lambda: _answers(host, port), lambda: f"nothing answers at {host}, port {port}, where all meet")
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, n_processes(), is_master=hosts, timeout=START_TIMEOUT, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        raise SurgeryError(
            f"the processes cannot meet at {host}, port {port} ({str(error).splitlines()[0]})", where=_process_name()
        ) from error
    # A launcher that restarts all processes keeps its store: keys of the failed attempt must not count for this one.
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
        _wait_until(lambda: store.check([key(number) for number in range(n_processes())]), missing)
    except RuntimeError as error:
        raise _connection_lost(error) from error


def _wait_until(done: Callable[[], bool], missing: Callable[[], str]) -> None:
    """Return once `done()`. Raises SurgeryError with what is `missing()` after `START_TIMEOUT`."""
    deadline = time.monotonic() + START_TIMEOUT.total_seconds()
    while not done():
        if time.monotonic() > deadline:
            raise SurgeryError(
                f"{missing()}, after {START_TIMEOUT.total_seconds() / 60:g} minutes",
                where=_process_name(),
                hint="Start the same command everywhere.",
            )
        time.sleep(_POLL_INTERVAL)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def _process_name() -> str:
    return f"process {rank()}"


def _backends() -> str:
    """Return the backends: gloo for tensors on the CPU, which is all that we send; for training on another device
    that device's own, which is set up when it is first used."""
    import torch.distributed as dist

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    backend = "gloo" if device is None else dist.Backend.default_device_backend_map.get(device.type, "gloo")
    return "gloo" if device is None or backend == "gloo" else f"cpu:gloo,{device.type}:{backend}"


def _disconnect() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
