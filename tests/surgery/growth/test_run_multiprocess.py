"""Two processes on CPUs, started as a user starts them, walk the whole way and find what one finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.growth_runs import BATCH, SEQUENCE, STEPS, TOKENS, curves, write_corpora, write_plan, write_substrate

from surgery.growth.results import Growth, read_growth

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
# What a run may take before it counts as hanging, on a machine with ten others at work; it takes about fifteen.
SECONDS = 600
STAGES = [{"times": 2, "tokens": TOKENS}, {"at": 1, "tokens": TOKENS, "data": "continue"}]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_corpora(folder)
    write_substrate(folder)
    write_plan(
        folder,
        embed=str(folder / "emb"),
        corpus=str(folder / "sums.txt"),
        stages=STAGES,
        cache={"use": "on"},
        evaluate={"texts": str(folder / "words.txt"), "limit": 1},
    )
    return folder


def run(bench: Path, out: Path, *launcher: str) -> str:
    """Runs `surgery grow run`; returns its complaints."""
    command = ["-m", "cli.main", "grow", "run", bench / "plan.yml", "-o", out, "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    started = [sys.executable, *(("-m", "torch.distributed.run", *launcher) if launcher else ()), *command]
    done = subprocess.run(
        started, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def uses(growth: Growth) -> list[tuple[bool, int, int, int]]:
    found = [model.training.cache for model in growth.stages]
    return [(use.used, use.read, use.extended, use.computed) for use in found]


def test_two_processes_grow_as_one(bench: Path) -> None:
    assert "Warning" not in run(bench, bench / "one")
    launched = (
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "127.0.0.1:0",
    )
    assert "Warning" not in run(bench, bench / "two", *launched)
    one, two = read_growth(bench / "one"), read_growth(bench / "two")
    assert [model.training.processes for model in (*one.stages, *two.stages)] == [1, 1, 1, 2, 2, 2]
    for ours, theirs in zip(curves(one), curves(two), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5)
    for ours, theirs in zip(one.scores, two.scores, strict=True):
        assert theirs.value == pytest.approx(ours.value, rel=1e-4)
    for number in (1, 2, 3):
        left, right = (load_file(bench / f"{name}/stage-{number}/model.safetensors") for name in ("one", "two"))
        for name, tensor in left.items():
            torch.testing.assert_close(right[name], tensor, atol=1e-4, rtol=1e-3)
    # Each process makes, and later extends or reads, the states of its own half of the windows.
    drawn = STEPS * BATCH
    assert uses(one) == [(False, 0, 0, 0), (True, 0, 0, drawn), (True, 0, 0, drawn)]
    assert uses(two) == [(False, 0, 0, 0), (True, 0, 0, drawn // 2), (True, 0, 0, drawn // 2)]
    assert {use.training.cache.bytes for use in two.stages[1:]} == {2 * drawn * (SEQUENCE * 16 * 4 + 16)}
    # What is done is kept, by all of them.
    before = (bench / "two/stage-3/model.safetensors").stat().st_mtime_ns
    run(bench, bench / "two", *launched)
    assert (bench / "two/stage-3/model.safetensors").stat().st_mtime_ns == before
    assert read_growth(bench / "two") == two
