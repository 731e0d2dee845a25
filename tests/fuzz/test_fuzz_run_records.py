"""The run that the fuzzer damages is whole before."""

from __future__ import annotations

from pathlib import Path

from support.fuzz_run_records import intact_steps, write_run

from surgery.recipes.run.paths import STEPS


def test_the_unchanged_run_has_all_of_its_steps(tmp_path: Path) -> None:
    write_run(tmp_path / "seed")
    steps = sorted(path.name for path in (tmp_path / "seed" / "run" / STEPS).iterdir())
    assert sorted(intact_steps(tmp_path / "seed")) == steps != []
    next((tmp_path / "seed" / "run" / STEPS / steps[0]).glob("*.txt")).write_text("other")
    assert sorted(intact_steps(tmp_path / "seed")) == steps[1:]
