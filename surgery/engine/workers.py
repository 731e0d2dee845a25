"""The one loop of every job: the same work on many units, on all processors, results as they finish.

Workers are threads of this process or, where that is a program of ours (`surgery.runtime.environment`), forked from it.
Threads share an interpreter: with operations of a tenth of a millisecond they wait for its lock as often as for the
arithmetic, which costs a third of a merge on two processors and more on many. Forked workers share nothing but what was
there before the fork. A CUDA context does not outlive a fork, and of other systems than Linux not all of their
libraries do: there threads are used.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from surgery.checkpoint.reader import SourceFiles, TensorReader
from surgery.errors import SurgeryError
from surgery.runtime.collectives import map_over_ranks, n_active_processes
from surgery.runtime.environment import is_cli_process, n_local_processes, rank
from surgery.runtime.interrupts import DeferredInterrupt

Work = TypeVar("Work")
Result = TypeVar("Result")

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # prctl.h

_worker = threading.local()  # what a worker, be it a thread or a process, holds for all its units: `work` and `reader`


def default_threads() -> int:
    """Workers for a job when the user names no number of threads: the processors this process may use.

    Processes that a launcher started side by side share them.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(processors // n_local_processes(), 1)


def run(
    units: Iterable[Work],
    work: Callable[[Work, TensorReader], Result],
    files: SourceFiles,
    *,
    threads: int | None,
    pinned: bool = False,
) -> Iterator[Result]:
    """Does `work` on every unit on `threads` workers, each with a reader of its own; yields as units finish.

    Units are taken from the front. Where `units` is a deque, whoever takes the results may add to it meanwhile.
    `work` tells of what it did by its result alone; units and results must be picklable. The first error stops the
    rest and is raised here.

    Args:
        threads: how many workers; None for one per processor.
        pinned: readers' buffers are page-locked, for a GPU.
    """
    threads = threads or default_threads()
    forks = is_cli_process() and not pinned and sys.platform == "linux"
    with one_thread_per_operation(), _pool(threads, forks=forks, start=(work, files, pinned)) as pool:
        pending: set[Future[Any]] = set()
        queue = units if isinstance(units, deque) else deque(units)
        try:
            while queue or pending:
                # The first `submit` forks. A Ctrl-C in the callbacks of a fork would be dropped, and logging's lock,
                # which is taken and given back by such callbacks, would stay locked.
                with DeferredInterrupt():
                    while queue and len(pending) < 2 * threads:
                        pending.add(pool.submit(_do, queue.popleft()))
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise SurgeryError(
                "a worker process was ended from outside, most likely because the machine ran out of memory",
                hint="Run the same command again with fewer --threads: it goes on where it stopped.",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def run_shared(
    units: Sequence[Work],
    work: Callable[[Work, TensorReader], Result],
    files: SourceFiles,
    *,
    threads: int | None,
) -> Iterator[Result]:
    """As `run`, each process of a launcher's doing some of the units; each gets all results.

    What another process found comes when all are done. An error in one ends all.
    """
    if n_active_processes() == 1:
        yield from run(units, work, files, threads=threads)
        return
    found: list[Result] = []
    fault: Exception | None = None
    try:
        for result in run(units[rank() :: n_active_processes()], work, files, threads=threads):
            found.append(result)
            yield result
    except Exception as error:
        fault = error

    def told(_: int) -> list[Result]:
        if fault is not None:
            raise fault
        return found

    for process, theirs in enumerate(map_over_ranks(range(n_active_processes()), told)):
        if process != rank():
            yield from theirs


@contextmanager
def one_thread_per_operation() -> Iterator[None]:
    """Keeps torch from splitting single operations over threads while workers already fill the processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _pool(count: int, *, forks: bool, start: tuple[Any, ...]) -> Executor:
    if not forks:
        return ThreadPoolExecutor(count, "surgery", initializer=_begin, initargs=start)
    # A fork inherits `start` as it is: neither the plan nor open files are ever pickled.
    context = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(count, context, initializer=_begin_forked, initargs=(os.getpid(), *start))


def _begin(work: Callable[[Any, TensorReader], Any], files: SourceFiles, pinned: bool) -> None:
    # OpenMP's team is per calling thread: without this each of our threads would start a team of its own.
    torch.set_num_threads(1)
    _worker.work, _worker.reader = work, TensorReader(files, pinned=pinned)


def _begin_forked(parent: int, *start: Any) -> None:
    # Ctrl-C reaches every process of the terminal; the parent hears it too, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker must not write on when its parent was killed: the same command may be at work again already.
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    _begin(*start)


def _do(unit: Any) -> Any:
    return _worker.work(unit, _worker.reader)
