"""Run many inputs in forked workers, count what became of them, and keep what failed.

Workers are forked from a process that has imported everything, so that an input costs milliseconds. A worker that says
nothing for `SILENT_SECONDS`, or ends, fails the input that it was at; another one goes on with the next.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from support.fuzzing import HUNG_SECONDS, TRIES, FuzzTarget, Outcome, Workplace, run_input

SILENT_SECONDS = HUNG_SECONDS * (TRIES + 1)
REPORT_SECONDS = 30.0
# Address space of a worker beyond what it has: an input that wants more gets a MemoryError, and the machine stays up.
_ROOM = 6_000_000_000


@dataclass
class TargetCounts:
    """What became of the inputs of one target. slowest in seconds, peak in MB."""

    results: int = 0
    refused: int = 0
    failures: list[Outcome] = field(default_factory=list)
    slowest: float = 0.0
    peak: float = 0.0
    seconds: float = 0.0

    @property
    def inputs(self) -> int:
        return self.results + self.refused + len(self.failures)

    def add(self, outcome: Outcome) -> None:
        """Count one outcome."""
        self.results += outcome.kind == "result"
        self.refused += outcome.kind == "refused"
        if outcome.kind == "failed":
            self.failures.append(outcome)
        self.slowest = max(self.slowest, outcome.seconds)
        self.peak = max(self.peak, outcome.mb)
        self.seconds += outcome.seconds


@dataclass(frozen=True)
class Campaign:
    """Inputs 0 to `inputs` − 1, shared out over targets by their weights and over `jobs` workers by turns.

    only: names of the targets whose inputs are run; the others' numbers are left out. None means all.
    """

    targets: Sequence[FuzzTarget]
    corpus: Path
    folder: Path
    inputs: int
    seed: int = 0
    jobs: int = 1
    caches: Sequence[Path] = ()
    only: frozenset[str] = frozenset()

    @property
    def schedule(self) -> list[FuzzTarget]:
        """Targets by turns, those of weight 2 twice in a round, those of every 2 in every second round."""
        most = max(target.weight for target in self.targets)
        rounds = math.lcm(*(target.every for target in self.targets))
        return [
            target
            for number in range(rounds)
            for turn in range(most)
            for target in self.targets
            if target.weight > turn and number % target.every == 0
        ]

    def target_of(self, number: int) -> FuzzTarget:
        """Return the target of the input `number`."""
        schedule = self.schedule
        return schedule[number % len(schedule)]


@dataclass
class _Worker:
    process: Any
    connection: Connection
    job: int
    at: int
    heard: float


def run_campaign(
    campaign: Campaign, *, minutes: float | None = None, report: Callable[[str], None] = lambda _: None
) -> Mapping[str, TargetCounts]:
    """Run the inputs, for at most `minutes`, and return the counts by target.

    Args:
        report: is told of each failure at once, and every 30 seconds how far it is.
    """
    counts = {target.name: TargetCounts() for target in campaign.targets}
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    workers = [_start(campaign, job, job, end) for job in range(campaign.jobs)]
    told = time.monotonic()
    while workers:
        if time.monotonic() > told + REPORT_SECONDS:
            told = time.monotonic()
            done = sum(row.inputs for row in counts.values())
            report(
                f"{done:,} of {campaign.inputs:,} inputs, {sum(len(row.failures) for row in counts.values())} failures"
            )
        ready = wait([worker.connection for worker in workers], timeout=1.0)
        for worker in list(workers):
            alive = worker.connection in ready and _listen(worker, counts, report)
            if alive or (worker.connection not in ready and time.monotonic() - worker.heard < SILENT_SECONDS):
                continue
            workers.remove(worker)
            worker.process.kill()
            worker.process.join()
            if worker.at < 0:  # it is done
                continue
            target = campaign.target_of(worker.at)
            why = f"its process ended ({worker.process.exitcode}), or hung"
            _add(Outcome(target.name, worker.at, "failed", why, 0.0, 0.0), counts, report)
            workers.append(_start(campaign, worker.job, worker.at + campaign.jobs, end))
    return counts


def _start(campaign: Campaign, job: int, first: int, end: float) -> _Worker:
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_work, args=(campaign, job, first, end, send))
    process.start()
    send.close()
    return _Worker(process, receive, job, first, time.monotonic())


def _listen(worker: _Worker, counts: Mapping[str, TargetCounts], report: Callable[[str], None]) -> bool:
    """Take one message of a worker; return False where it has ended."""
    try:
        message = worker.connection.recv()
    except EOFError:
        return False
    worker.heard = time.monotonic()
    if isinstance(message, int):
        worker.at = message
        return message >= 0
    _add(message, counts, report)
    return True


def _add(outcome: Outcome, counts: Mapping[str, TargetCounts], report: Callable[[str], None]) -> None:
    counts[outcome.target].add(outcome)
    if outcome.kind == "failed":
        report(f"{outcome.target} {outcome.number}: {outcome.why.partition(chr(10))[0][:500]}")


def _work(campaign: Campaign, job: int, first: int, end: float, send: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # What libraries print would drown the counts.
    null = os.open(os.devnull, os.O_WRONLY)
    if "SURGERY_FUZZ_LOUD" not in os.environ:
        os.dup2(null, 1)
        os.dup2(null, 2)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + _ROOM, in_use + _ROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    place = Workplace(campaign.folder / f"worker-{job}", campaign.corpus, campaign.seed, campaign.caches)
    place.prepare()
    for number in range(first, campaign.inputs, campaign.jobs):
        if time.monotonic() > end:
            break
        target = campaign.target_of(number)
        if campaign.only and target.name not in campaign.only:
            continue
        send.send(number)
        send.send(run_input(target, number, place))
    send.send(-1)
    sys.stdout.flush()
    os._exit(0)
