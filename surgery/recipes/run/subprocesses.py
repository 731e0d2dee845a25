"""Start steps as processes, without a shell and in sessions of their own, and stop them.

What a step prints and logs goes to files in its folder. It ends when its parent does.
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
from pathlib import Path
from typing import Protocol

from surgery.recipes.run.paths import StepPaths
from surgery.recipes.types import RecipeStep
from surgery.runtime import progress
from surgery.runtime.environment import rank
from surgery.runtime.version import SOURCE_TREE, __version__

POLL_SECONDS = 0.05  # between two polls of the children
# Signals that end a child, and the seconds it is given after each: Ctrl-C first, so that it can save its state.
STOP_SIGNALS = ((signal.SIGINT, 20.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
# With these variables rich takes a file for a terminal, and would write colour codes into it.
COLOUR_VARIABLES = frozenset({"FORCE_COLOR", "TTY_COMPATIBLE"})
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # sys/prctl.h


@dataclass(frozen=True)
class StepProcess:
    """What to start.

    Attributes:
        arguments: what follows `surgery` on the command line.
        environment: variables in addition to those of this process.
        locks: descriptors that the child inherits, so that the run stays locked until its last process is gone.
    """

    step: RecipeStep
    arguments: Sequence[str]
    paths: StepPaths
    environment: Mapping[str, str] = field(default_factory=dict)
    locks: tuple[int, ...] = ()


class RunningStep(Protocol):
    """A step that was started."""

    def poll(self) -> int | None:
        """Return its exit code; None while it runs."""

    def signal(self, number: int) -> None:
        """Send a signal to all of its processes."""


Runner = Callable[[StepProcess], RunningStep]


def surgery_command(arguments: Sequence[str]) -> list[str]:
    """Return the command that runs `surgery ARGUMENTS…` in another process."""
    # -P: else a folder `cli` in the current directory would be imported instead of ours.
    return [sys.executable, "-P", "-m", "cli.main", *arguments]


def child_environment() -> dict[str, str]:
    """Return the environment of such a process: that of this one, without what makes it colour its output files."""
    return {name: text for name, text in os.environ.items() if name not in COLOUR_VARIABLES} | _python_path()


def start(step: StepProcess) -> RunningStep:
    """Start a step as a process of this program; the `Runner` of real runs."""
    paths = step.paths
    paths.progress.unlink(missing_ok=True)
    text = paths.text if rank() == 0 else paths.log_of(rank()).with_suffix(".out.txt")
    with text.open("wb") as out, paths.log_of(rank()).open("wb") as log:
        process = subprocess.Popen(  # noqa: S603  # a command of ours, and no shell
            surgery_command(step.arguments),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            env={**child_environment(), **step.environment, progress.FILE: str(paths.progress.absolute())},
            # So that a terminal's Ctrl-C reaches only this process, which then stops the steps in order.
            start_new_session=True,
            pass_fds=step.locks,
            # A function may run between fork and exec only where no other thread can hold a lock: we run none here.
            preexec_fn=_die_with_parent(os.getpid()) if sys.platform == "linux" else None,
        )
    return _Process(process)


def stop(children: Collection[RunningStep], *, grace: Sequence[tuple[int, float]] = STOP_SIGNALS) -> None:
    """End all `children` by stronger and stronger signals; return once they are gone.

    Another Ctrl-C goes on to the next signal at once.
    """
    for number, seconds in grace:
        alive = [child for child in children if child.poll() is None]
        for child in alive:
            child.signal(number)
        end = time.monotonic() + seconds
        try:
            while any(child.poll() is None for child in alive) and time.monotonic() < end:
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            continue


class _Process:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def poll(self) -> int | None:
        return self._process.poll()

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it ended just now
            # The whole group: a step may have forked workers.
            os.killpg(self._process.pid, number)


def _die_with_parent(parent: int) -> Callable[[], None]:
    prctl, number, getppid, leave = _LIBC.prctl, int(signal.SIGKILL), os.getppid, os._exit

    def die() -> None:
        # It must not write on after its parent was killed: the same command may already run again.
        prctl(_PR_SET_PDEATHSIG, number)
        # The parent may have ended before prctl took effect: then nobody would ever send the signal.
        if getppid() != parent:
            leave(1)

    return die


def _python_path() -> dict[str, str]:
    """Return the PYTHONPATH of a child: needed only in a source tree that is not installed."""
    if __version__ != SOURCE_TREE:
        return {}
    root = str(Path(__file__).parents[3])
    return {"PYTHONPATH": os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)}
