"""Commands that are killed, stopped or let down by the disk at random moments go on to the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "torture.py"


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
