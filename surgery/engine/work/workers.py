"""Run a function on many units of work in parallel, and yield the results as they finish.

Workers are threads of this process or, where that is a program of ours (`surgery.runtime.environment`), forked from it.
Threads share the interpreter lock: with operations of a tenth of a millisecond they wait for it as often as for the
arithmetic, which costs a third of a merge's time on two processors and more on many. Forked workers share only the
state from before the fork. A CUDA context does not outlive a fork, and of other systems than Linux not all of their
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

_worker = threading.local()  # of a worker, a thread or a process: `work` and `reader`, for all its units


def default_threads() -> int:
    """Return the default number of workers: the processors that this process may use.

    Ranks on one machine share its processors.
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
    """Call `work` on every unit on `threads` workers, each with its own reader; yield results as units finish.

    Units are taken from the front. Where `units` is a deque, the consumer of the results may add to it meanwhile.
    `work` may run in a forked process, so only its result reaches the caller; units and results must be picklable. The
    first error stops the rest and is raised here.

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
                    # Two per worker: enough that none waits, few enough that new tasks at the front come soon.
                    while queue and len(pending) < 2 * threads:
                        pending.add(pool.submit(_call_work, queue.popleft()))
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise SurgeryError(
                "a worker process was ended from outside, most likely because the machine ran out of memory",
                hint="Run the same command again with fewer --threads: it goes on where it stopped.",
            ) from error
        finally:
            # Cancelled: what is queued should not run on after an error, or when the consumer stops early.
            pool.shutdown(cancel_futures=True)


def run_shared(
    units: Sequence[Work],
    work: Callable[[Work, TensorReader], Result],
    files: SourceFiles,
    *,
    threads: int | None,
) -> Iterator[Result]:
    """As `run`, with the units shared by the ranks; every rank yields all results.

    Those of other ranks come when all are done. An error on one rank is raised on all.
    """
    if n_active_processes() == 1:
        yield from run(units, work, files, threads=threads)
        return
    results: list[Result] = []
    failure: Exception | None = None
    try:
        for result in run(units[rank() :: n_active_processes()], work, files, threads=threads):
            results.append(result)
            yield result
    except Exception as error:
        failure = error  # raised below, where the other ranks wait: raised here it would leave them waiting

    def own_results(_: int) -> list[Result]:
        if failure is not None:
            raise failure
        return results

    for process, gathered in enumerate(map_over_ranks(range(n_active_processes()), own_results)):
        if process != rank():
            yield from gathered


@contextmanager
def one_thread_per_operation() -> Iterator[None]:
    """Keep torch from splitting single operations over threads while workers already use all processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _pool(count: int, *, forks: bool, start: tuple[Any, ...]) -> Executor:
    if not forks:
        return ThreadPoolExecutor(count, "surgery", initializer=_start_worker, initargs=start)
    # A fork inherits `start` as it is: neither the plan nor open files are ever pickled.
    context = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(count, context, initializer=_start_forked_worker, initargs=(os.getpid(), *start))


def _start_worker(work: Callable[[Any, TensorReader], Any], files: SourceFiles, pinned: bool) -> None:
    # OpenMP has a team of threads per calling thread: without this each worker thread would start one.
    torch.set_num_threads(1)
    _worker.work, _worker.reader = work, TensorReader(files, pinned=pinned)


def _start_forked_worker(parent: int, *start: Any) -> None:
    # Ctrl-C reaches every process of the terminal, the parent among them, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # or it would be a Ctrl-C
    # A worker must not continue to write when its parent was killed: the same command may already run again.
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    _start_worker(*start)


def _call_work(unit: Any) -> Any:
    return _worker.work(unit, _worker.reader)
