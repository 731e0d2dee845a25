"""One process at a time, whatever ends the one before."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from surgery.errors import SurgeryError
from surgery.io.locks import exclusive_lock

ROOT = Path(__file__).parents[3]
HOLD = """
import sys
from pathlib import Path
from surgery.io.locks import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), where="x", busy="busy", remove=sys.argv[2] == "remove"):
    print("held", flush=True)
    sys.stdin.read()
"""


def held(path: Path, how: str = "keep") -> subprocess.Popen[str]:
    """Another process that holds the lock until it is told to stop."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def take(path: Path, **asked: float) -> None:
    with exclusive_lock(path, where=path.parent, busy="another run is at work here", **asked):
        pass


@pytest.mark.parametrize("how", ["keep", "remove"])
def test_a_lock_that_another_process_holds_is_an_error_at_once_and_free_after_its_kill(tmp_path, how):
    process = held(tmp_path / "new" / ".lock", how)
    try:
        with pytest.raises(SurgeryError, match=rf"new: another run is at work here \(process {process.pid}\). Wait"):
            take(tmp_path / "new" / ".lock")
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    take(tmp_path / "new" / ".lock")


def test_infinite_patience_waits_for_the_holder(tmp_path):
    process = held(tmp_path / ".lock")
    threading.Timer(0.3, process.communicate).start()
    take(tmp_path / ".lock", patience=math.inf)
    assert process.wait() == 0


def test_two_locks_in_one_process_exclude_each_other_too(tmp_path):
    with exclusive_lock(tmp_path / ".lock", where="run", busy="busy"), pytest.raises(SurgeryError, match="run: busy"):
        take_same = exclusive_lock(tmp_path / ".lock", where="run", busy="busy")
        with take_same:
            pass


def test_a_removed_lock_file_lets_no_two_in(tmp_path, monkeypatch):
    """The holder removes the file between the other's opening and locking: what was locked counts for nothing."""
    path = tmp_path / ".lock"
    with ExitStack() as first:
        first.enter_context(exclusive_lock(path, where="run", busy="busy", remove=True))
        plain, opened = os.open, []

        def open_late(*arguments, **keywords):
            descriptor = plain(*arguments, **keywords)
            if not opened:
                opened.append(descriptor)
                first.close()
            return descriptor

        monkeypatch.setattr("surgery.io.locks.os.open", open_late)
        with exclusive_lock(path, where="run", busy="busy") as descriptor:
            assert opened
            assert os.fstat(descriptor).st_ino == path.stat().st_ino
            assert path.read_text() == str(os.getpid())


def test_a_lock_file_that_is_removed_is_gone(tmp_path):
    with exclusive_lock(tmp_path / ".lock", where="run", busy="busy", remove=True):
        assert (tmp_path / ".lock").exists()
    assert not list(tmp_path.iterdir())


def test_a_link_a_pipe_and_a_folder_in_the_place_of_the_lock_file_are_refused(tmp_path):
    (tmp_path / "precious").write_text("keep")
    (tmp_path / "link").symlink_to("precious")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, reason in (("link", "is a link"), ("pipe", "is a pipe"), ("folder", "directory")):
        with pytest.raises(SurgeryError, match=rf"{name}: .*{reason}"):
            take(tmp_path / name)
    assert (tmp_path / "precious").read_text() == "keep"
