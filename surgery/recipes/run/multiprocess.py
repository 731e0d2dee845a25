"""Run a pipeline under a launcher: every rank goes through the same steps, one at a time, and starts its share of each.

Rank 0 decides which steps run. A share that fails stops those of the other ranks, which learn of it from a file beside
the step: a process that waits for the answer of one that is gone would not end by itself.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path

from surgery.recipes.run.paths import RunPaths, cli_arguments
from surgery.recipes.run.progress_display import Display
from surgery.recipes.run.step_runner import StepRunner
from surgery.recipes.run.subprocesses import POLL_SECONDS, Runner, RunningStep, StepProcess, stop
from surgery.recipes.types import Pipeline, RecipeStep
from surgery.runtime.collectives import map_over_ranks, on_main
from surgery.runtime.environment import n_processes, rank

# torchrun keeps a store of its own at the launcher's port; at a step's port the step's rank 0 must open one.
OWN_STORE = {"TORCHELASTIC_USE_AGENT_STORE": "False"}
STOPPED = -1000  # exit code of a share that was stopped because another one failed: no signal has this number
FAILED_MARKER = "failed"  # the file beside a step that says that a share of it failed


def run_steps_on_all_ranks(
    pipeline: Pipeline, paths: RunPaths, runner: Runner, *, step_runner: StepRunner | None, view: Display | None
) -> None:
    """Run the steps of `pipeline` on all ranks; `step_runner` and `view` are those of rank 0, None elsewhere.

    Raises:
        SurgeryError: rank 0 cannot read or write a file.
    """
    for step in pipeline.nodes:
        # Off rank 0 `on_main` calls nothing, so that the arguments may be None there.
        port = on_main(_begin, step_runner, step, view)
        if port is None:
            continue
        since = time.monotonic()
        code = _run_share(step, paths, runner, port, view)
        codes = map_over_ranks([code] * n_processes(), _own)
        if step_runner is not None and view is not None:
            seconds = time.monotonic() - since
            # One that failed by itself says why; the others were stopped because of it.
            failed = next((number for number, each in enumerate(codes) if each not in (0, STOPPED)), 0)
            step_runner.end(step, codes[failed], seconds, log=paths.of(step.name).log_of(failed))
            view.ended(step.name, step_runner.statuses[step.name], seconds)


def _own(code: int) -> int:
    """Return `code`: `map_over_ranks` gives item n of a list to rank n, so that this gathers every rank's own."""
    return code


def _begin(step_runner: StepRunner | None, step: RecipeStep, view: Display | None) -> int | None:
    """Make `step` ready on rank 0; return the port at which its processes meet, or None if it is not to be run."""
    assert step_runner is not None, "only rank 0 has one"
    if step_runner.is_blocked(step):
        step_runner.leave_out(step)
    elif step_runner.begin(step):
        paths = step_runner.paths.of(step.name)
        (paths.folder / FAILED_MARKER).unlink(missing_ok=True)
        if view is not None:
            view.started(step.name, paths.progress)
        # Not the launcher's port, at which the processes of this run themselves meet.
        with socket.socket() as free:
            free.bind(("", 0))
            return int(free.getsockname()[1])
    if view is not None:
        view.ended(step.name, step_runner.statuses[step.name], 0.0)
    return None


def _run_share(step: RecipeStep, paths: RunPaths, runner: Runner, port: int, view: Display | None) -> int:
    """Run this rank's share of `step`, and return its exit code."""
    step_paths = paths.of(step.name)
    environment = {"MASTER_PORT": str(port), **OWN_STORE}
    child = runner(StepProcess(step, cli_arguments(step, paths), step_paths, environment))
    return _wait(child, step_paths.folder / FAILED_MARKER, view)


def _wait(child: RunningStep, marker: Path, view: Display | None) -> int:
    """Wait until this rank's share has ended, by itself or because another one failed; return its exit code."""
    try:
        while (code := child.poll()) is None:
            if marker.exists():
                stop([child])
                return STOPPED
            time.sleep(POLL_SECONDS)
            if view is not None:
                view.refresh()
    except BaseException:
        stop([child])
        raise
    # Only the first one that failed writes it; those that were stopped for its sake have returned above.
    if code != 0 and not marker.exists():
        marker.write_text(f"process {rank()}", encoding="utf-8")
    return code
