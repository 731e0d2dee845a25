"""Two thousand mutated files, through everything that reads files: a result or a `SurgeryError` each, and no harm done.

`make fuzz` runs a hundred thousand. `support.fuzzing` says what is held to; `support.fuzz_targets` what is run.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"
INPUTS = 2_000


@pytest.mark.slow
def test_every_mutated_file_gives_a_result_or_a_surgery_error(tmp_path: Path) -> None:
    # In a process of its own, which forks before it has threads.
    done = subprocess.run(
        [sys.executable, PROGRAM, "--inputs", str(INPUTS), "--jobs", "1", "--failures", str(tmp_path / "failures")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Refusing all of them would be no proof, and neither would be running none.
    total = next(line for line in done.stdout.splitlines() if line.startswith("| all |")).split("|")
    inputs, results, refused = (int(cell.replace(",", "")) for cell in total[2:5])
    assert inputs == INPUTS == results + refused
    assert INPUTS / 10 < results < INPUTS * 9 / 10
