"""Steps as processes: started without a shell in a session of their own, told to stop, and gone when their parent is.

In comes a `StepProcess`, out comes a `RunningStep` that can be asked whether it is done. What it prints and tells lies
in the step's folder.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import surgery
from surgery.recipes.run.paths import StepPaths
from surgery.recipes.types import RecipeStep
from surgery.runtime import progress
from surgery.runtime.environment import rank

POLL = 0.05  # seconds between two looks at the children
# Seconds that a child is given after Ctrl-C to leave in order, and after being told more firmly.
GRACE = ((signal.SIGINT, 20.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
# By these, rich takes a file for a terminal.
COLOURING = frozenset({"FORCE_COLOR", "TTY_COMPATIBLE"})
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # sys/prctl.h


@dataclass(frozen=True)
class StepProcess:
    """What is to be started: the words that follow `surgery`, and what the environment says besides.

    locks: descriptors that the child holds too, so that the run stays locked until its last process is gone.
    """

    node: RecipeStep
    words: Sequence[str]
    place: StepPaths
    environment: Mapping[str, str] = field(default_factory=dict)
    locks: tuple[int, ...] = ()


class RunningStep(Protocol):
    """A step that was started."""

    def poll(self) -> int | None:
        """Its exit code; None while it works."""

    def signal(self, number: int) -> None:
        """Sends a signal to all of its processes."""


Runner = Callable[[StepProcess], RunningStep]


def program(words: Sequence[str]) -> list[str]:
    """What starts the command line of this program in another process, given what follows `surgery`."""
    # -P: else a folder `cli` where the user stands would be taken for ours.
    return [sys.executable, "-P", "-m", "cli.main", *words]


def surroundings() -> dict[str, str]:
    """The environment of such a process: ours, without what would make it colour what it writes into files."""
    return {name: text for name, text in os.environ.items() if name not in COLOURING} | _paths()


def start(job: StepProcess) -> RunningStep:
    """The `Runner` of real runs."""
    place = job.place
    place.told.unlink(missing_ok=True)
    text = place.text if rank() == 0 else place.log_of(rank()).with_suffix(".out.txt")
    with text.open("wb") as out, place.log_of(rank()).open("wb") as log:
        process = subprocess.Popen(
            program(job.words),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            env={**surroundings(), **job.environment, progress.FILE: str(place.told.absolute())},
            start_new_session=True,
            pass_fds=job.locks,
            # Nothing of ours runs threads at this point, so that a function may run between fork and exec.
            preexec_fn=_dying_with(os.getpid()) if sys.platform == "linux" else None,
        )
    return _Process(process)


def stop(children: Collection[RunningStep], *, grace: Sequence[tuple[int, float]] = GRACE) -> None:
    """Ends all `children`, the longer they take the more firmly; returns once they are gone. Ctrl-C hurries it."""
    for number, seconds in grace:
        alive = [child for child in children if child.poll() is None]
        for child in alive:
            child.signal(number)
        end = time.monotonic() + seconds
        try:
            while any(child.poll() is None for child in alive) and time.monotonic() < end:
                time.sleep(POLL)
        except KeyboardInterrupt:
            continue


class _Process:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def poll(self) -> int | None:
        return self._process.poll()

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it ended just now
            os.killpg(self._process.pid, number)


def _dying_with(parent: int) -> Callable[[], None]:
    prctl, number, getppid, leave = _LIBC.prctl, int(signal.SIGKILL), os.getppid, os._exit

    def die() -> None:
        # It must not write on when its parent was killed: the same command may be at work again already.
        prctl(_PR_SET_PDEATHSIG, number)
        if getppid() != parent:
            leave(1)

    return die


def _paths() -> dict[str, str]:
    """Where Python finds us, run from a source tree that was not installed."""
    try:
        version("model-surgery")
        return {}
    except PackageNotFoundError:
        root = str(Path(surgery.__file__).parents[1])
        return {"PYTHONPATH": os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)}
