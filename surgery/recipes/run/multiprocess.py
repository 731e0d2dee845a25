"""A run under a launcher: every process walks the same steps one at a time, and starts its own share of each.

The first process decides, and the others learn it from there. A share that fails stops those of the other processes,
which see so by a file beside the step: a process that waits for another's answer in vain would not end by itself.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path

from surgery.recipes.run.display import Display
from surgery.recipes.run.paths import RunPaths, words
from surgery.recipes.run.step_runner import StepRunner
from surgery.recipes.run.subprocesses import POLL, Runner, RunningStep, StepProcess, stop
from surgery.recipes.types import Pipeline, RecipeStep
from surgery.runtime.collectives import map_over_ranks
from surgery.runtime.environment import n_processes, rank

# torchrun keeps a store of its own at the launcher's port; at a step's port the step's first process must open one.
AT_OWN_PORT = {"TORCHELASTIC_USE_AGENT_STORE": "False"}
STOPPED = -1000  # of a share that was stopped because another one failed: no signal has this number


def run_steps_on_all_ranks(
    program: Pipeline, places: RunPaths, runner: Runner, *, working: StepRunner | None, shown: Display | None
) -> None:
    """Does the steps of `program` in all processes; `working` and `shown` are those of the first.

    Raises:
        SurgeryError: the first process cannot read or write a file.
    """
    for node in program.nodes:

        def decide(item: int, node: RecipeStep = node) -> int | None:
            assert working is not None, "only the first process is asked"
            return _decide(working, node, shown)

        port = map_over_ranks([0], decide)[0]
        if port is None:
            continue
        place = places.of(node.name)
        marker = place.folder / "failed"
        environment = {"MASTER_PORT": str(port), **AT_OWN_PORT}
        since = time.monotonic()
        child = runner(StepProcess(node, words(node, places), place, environment))
        code = _wait(child, marker, shown)

        def own(item: int, code: int = code) -> int:
            return code

        codes = map_over_ranks(range(n_processes()), own)
        if working is not None and shown is not None:
            seconds = time.monotonic() - since
            # One that failed by itself says why; the others were stopped for its sake.
            number = next((at for at, each in enumerate(codes) if each not in (0, STOPPED)), 0)
            working.end(node, codes[number], seconds, log=place.log_of(number))
            shown.ended(node.name, working.endings[node.name], seconds)


def _decide(working: StepRunner, node: RecipeStep, shown: Display | None) -> int | None:
    """The port at which the processes of `node` meet; None where it is not to be done."""
    if working.is_blocked(node):
        working.leave_out(node)
    elif working.begin(node):
        place = working.places.of(node.name)
        (place.folder / "failed").unlink(missing_ok=True)
        if shown is not None:
            shown.started(node.name, place.told)
        with socket.socket() as free:
            free.bind(("", 0))
            return int(free.getsockname()[1])
    if shown is not None:
        shown.ended(node.name, working.endings[node.name], 0.0)
    return None


def _wait(child: RunningStep, marker: Path, shown: Display | None) -> int:
    """The exit code of this process's share, once it has ended by itself or for the sake of another that failed."""
    try:
        while (code := child.poll()) is None:
            if marker.exists():
                stop([child])
                return STOPPED
            time.sleep(POLL)
            if shown is not None:
                shown.look()
    except BaseException:
        stop([child])
        raise
    if code != 0 and not marker.exists():
        marker.write_text(f"process {rank()}", encoding="utf-8")
    return code
