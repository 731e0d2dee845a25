"""Commands that are killed, stopped or let down by the disk at random moments go on to the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "torture.py"


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_write_is_named_and_leaves_what_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    counts = tmp_path / "counts.json"
    command = [sys.executable, BENCHMARK, "--every-write", "--jobs", "1", "--only", "edit undo|push", "--json", counts]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(counts.read_text())
    # As many runs as writes, and each met a full disk.
    assert found["failures"] == [] and found["counts"]["faults"] == found["counts"]["reruns"] > 10
    # A push writes nothing to the disk.
    (push,) = [line.split() for line in done.stdout.splitlines() if line.startswith("push ")]
    assert push[1:6] == ["0"] * 5


@pytest.mark.slow
def test_killed_and_faulted_commands_go_on_to_the_same_bytes(tmp_path: Path) -> None:
    counts = tmp_path / "counts.json"
    command = [sys.executable, BENCHMARK, "--kills", "20", "--faults", "20", "--jobs", "1", "--json", counts]
    # The long ones, which `make torture` has too, take longer than a test may.
    command += ["--only", "vector|merge|edit|embed|push"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(counts.read_text())
    assert found["failures"] == [] and found["counts"]["kills"] >= 10 and found["counts"]["faults"] == 20
