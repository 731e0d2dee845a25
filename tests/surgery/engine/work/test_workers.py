"""The same work on many units: threads and forked processes do the same, and end when they should."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from surgery.checkpoint.reader import SourceFiles, TensorReader
from surgery.engine.work.workers import run
from surgery.errors import SurgeryError
from surgery.runtime import environment as process


@pytest.fixture(params=["threads", "forks"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds of workers; forks where the system has them."""
    if request.param == "forks" and sys.platform != "linux":
        pytest.skip("only Linux forks safely")
    monkeypatch.setattr(process, "_cli_process", request.param == "forks")
    return str(request.param)


@pytest.fixture
def files() -> Iterator[SourceFiles]:
    with SourceFiles([]) as opened:
        yield opened


def test_units_added_while_results_come_in_are_done_too(form: str, files: SourceFiles) -> None:
    queue, seen = deque([3, 2]), []
    for done in run(queue, lambda unit, _: unit, files, threads=2):
        seen.append(done)
        if done > 1:
            queue.append(done - 1)
    assert sorted(seen) == [1, 1, 2, 2, 3]


def test_work_is_done_where_the_name_says(form: str, files: SourceFiles) -> None:
    held = set(run(range(20), lambda unit, _: os.getpid(), files, threads=2))
    assert (os.getpid() in held) == (form == "threads")


def test_the_first_error_of_a_worker_is_raised_whole(form: str, files: SourceFiles) -> None:
    def work(unit: int, reader: TensorReader) -> int:
        if unit == 3:
            raise SurgeryError("three", where="units", hint="Count again.", exit_code=2)
        return unit

    with pytest.raises(SurgeryError) as caught:
        list(run(range(1000), work, files, threads=3))
    assert (str(caught.value), caught.value.exit_code) == ("units: three. Count again.", 2)


def test_torch_gets_its_threads_back(form: str, files: SourceFiles) -> None:
    before = torch.get_num_threads()
    assert sorted(run(range(10), lambda unit, _: torch.get_num_threads(), files, threads=2)) == [1] * 10
    assert torch.get_num_threads() == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely")
def test_ctrl_c_while_workers_are_forked_is_heard(files: SourceFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python drops what is raised in the callbacks of a fork."""
    monkeypatch.setattr(process, "_cli_process", True)
    pressed: list[int] = []

    def press() -> None:
        if not pressed:  # callbacks cannot be taken back: those of later tests do nothing
            pressed.append(os.getpid())
            signal.raise_signal(signal.SIGINT)

    os.register_at_fork(after_in_parent=press)
    with pytest.raises(KeyboardInterrupt):
        list(run(range(3), lambda unit, _: unit, files, threads=2))
    assert pressed == [os.getpid()]


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_job_with_advice(files: SourceFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux forks safely")
    monkeypatch.setattr(process, "_cli_process", True)

    def work(unit: int, reader: TensorReader) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(SurgeryError, match=r"worker process was ended from outside.* fewer --threads"):
        list(run(range(3), work, files, threads=2))


ORPHANS = textwrap.dedent(
    """
    import os, signal, sys, time
    from surgery.checkpoint.reader import SourceFiles
    from surgery.runtime import environment as process
    from surgery.engine.work.workers import run

    def work(unit, reader):
        os.write(1, f"{os.getpid()}\\n".encode())  # in one piece: two workers share the pipe
        time.sleep(600)

    process.configure_cli_process()
    with SourceFiles([]) as files:
        list(run(range(2), work, files, threads=2))
    """
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely")
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(ORPHANS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, tmp_path / "job.py"], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        forked = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    deadline = time.monotonic() + 60
    while any(_runs(worker) for worker in forked):
        assert time.monotonic() < deadline, "the workers outlive their parent"


def _runs(worker: int) -> bool:
    try:
        return Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
