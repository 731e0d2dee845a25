"""Runs that go on under other circumstances: another plan, another path, stages in other places, disks that fill."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.growth_runs import (
    BATCH,
    CPU,
    SEQUENCE,
    STEPS,
    TOKENS,
    curves,
    grown,
    no_pictures,
    prepared,
    weights,
    write_corpora,
    write_plan,
    write_substrate,
)

from surgery.errors import SurgeryError
from surgery.growth import run as run_module
from surgery.growth.baseline import train_baselines
from surgery.growth.embedding.build import make_embedding
from surgery.growth.options import RunOptions
from surgery.growth.plan import GrowthPlan
from surgery.growth.prefix_cache import cache as cache_module
from surgery.growth.prefix_cache.cache import PrefixCache
from surgery.growth.prepare import load_plan, prepare_run
from surgery.growth.report import growth_report
from surgery.growth.results import Growth, read_growth
from surgery.growth.run import grow
from surgery.growth.training import stage_checkpoint as save_stage_module
from surgery.growth.training.loop import _Run

STEP = BATCH * SEQUENCE
ONE = [{"tokens": TOKENS}]


class StopError(Exception):
    """What ends a run in the middle."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread_and_no_pictures() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are split by threads
    with pytest.MonkeyPatch.context() as patch:
        no_pictures(patch)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_corpora(folder)
    write_substrate(folder)
    return folder


def stop_at(patch: pytest.MonkeyPatch, holder: Any, name: str, call: int = 1) -> None:
    plain, seen = getattr(holder, name), []

    def stopped(*arguments: Any, **keywords: Any) -> Any:
        seen.append(None)
        if len(seen) == call:
            raise StopError
        return plain(*arguments, **keywords)

    patch.setattr(holder, name, stopped)


def same(one: Growth, other: Growth, *runs: Path) -> None:
    assert curves(one) == curves(other)
    left, right = (weights(run) for run in runs)
    assert list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


# What another plan left behind


@pytest.mark.parametrize("changes", [{"model": {"heads": 4, "mlp": 24}}, {"dtype": "bfloat16"}])
def test_a_stopped_run_is_begun_anew_by_another_plan(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    with monkeypatch.context() as patch, pytest.raises(StopError):
        stop_at(patch, run_module, "train_checkpoint")
        grown(bench, tmp_path / "run", stages=ONE)
    found = grown(bench, tmp_path / "run", stages=ONE, **changes)
    same(found, grown(bench, tmp_path / "new", stages=ONE, **changes), tmp_path / "run", tmp_path / "new")


def test_a_run_that_was_stopped_before_it_had_tokens_goes_on(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(StopError):
        stop_at(patch, run_module, "add_layers")
        grown(bench, tmp_path / "run", stages=ONE, cache={"use": "off"})
    assert len(grown(bench, tmp_path / "run", stages=ONE, cache={"use": "off"}).stages) == 1


def test_files_are_known_by_what_they_hold(bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grown(bench, tmp_path / "run", stages=ONE)
    before = weights(tmp_path / "run")
    monkeypatch.chdir(bench)
    plan = load_plan(str(tmp_path / "run.yml"), embed="emb", corpus=["sums.txt"])
    growth = grow(prepare_run(plan, tmp_path / "run"), CPU)
    assert growth.plan.embed == "emb" and growth.stages[0].training.steps == STEPS
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "run").items())
    make_embedding("tok", tmp_path / "emb", kind="random", width=16, seed=1)
    plan = load_plan(str(tmp_path / "run.yml"), embed=str(tmp_path / "emb"), corpus=["sums.txt"])
    with pytest.raises(SurgeryError, match="was made by another plan"):
        grow(prepare_run(plan, tmp_path / "run"), CPU)


def test_baselines_belong_to_one_growth_and_its_measures(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, texts = tmp_path / "run", [str(bench / "words.txt"), str(bench / "sums.txt")]
    grown(bench, run, stages=ONE, evaluate={"texts": texts[:1], "limit": 1})
    asked: dict[str, Any] = {"budget": "tokens", "embedding": "frozen", "options": CPU}
    first = train_baselines(prepared(bench, run, plan=tmp_path / "run.yml"), **asked)
    # Another plan is not compared with.
    other = write_plan(tmp_path, stages=ONE, training={"learning_rate": 0.02})
    with pytest.raises(SurgeryError, match="holds a growth of another plan, start or corpus"):
        train_baselines(prepared(bench, run, plan=other), **asked)
    # Other texts: all models are measured on them, in whichever order the commands come.
    more = write_plan(tmp_path, stages=ONE, evaluate={"texts": texts, "limit": 1})
    tasks = [
        {score.task for score in model.scores}
        for model in train_baselines(prepared(bench, run, plan=more), **asked).stages
    ]
    assert tasks == [set(texts)]
    back = grow(prepared(bench, run, plan=tmp_path / "run.yml"), CPU)
    assert [model.scores for model in back.baselines] == [()]
    assert train_baselines(prepared(bench, run, plan=tmp_path / "run.yml"), **asked).baselines == first.baselines
    # One stage more: the baseline of one layer is none for two.
    longer = write_plan(tmp_path, stages=[*ONE, *ONE])
    assert grow(prepared(bench, run, plan=longer), CPU).baselines == ()


def test_results_are_whole_while_a_done_run_is_looked_through(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = grown(bench, tmp_path / "run", stages=[{"times": 2, "tokens": TOKENS}])
    with pytest.raises(StopError):
        stop_at(monkeypatch, run_module, "evaluate_model", call=2)
        grow(prepared(bench, tmp_path / "run", plan=tmp_path / "run.yml"), CPU)
    assert read_growth(tmp_path / "run") == whole


# Stages in other places, and of other lengths


@pytest.mark.parametrize("at", [0, 1, "middle"])
def test_layers_may_be_added_below_others(bench: Path, tmp_path: Path, at: int | str) -> None:
    stages = [{"add": 2, "tokens": TOKENS}, {"at": at, "init": "random", "tokens": TOKENS}, {"tokens": TOKENS}]
    plain = grown(bench, tmp_path / "plain", stages=stages, cache={"use": "off"})
    cached = grown(bench, tmp_path / "cached", stages=stages, cache={"use": "on"})
    for one, other in zip(curves(plain), curves(cached), strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    number, drawn = 0 if at == 0 else 1, STEPS * BATCH
    records = [model.training for model in cached.stages]
    assert [record.new for record in records] == [(0, 1), (number,), (3,)]
    uses = [(record.cache.used, record.cache.extended, record.cache.computed) for record in records]
    # The third stage builds upon what the second cached, below the layer that this one trained.
    assert uses == [(False, 0, 0), (number > 0, 0, drawn * number), (True, drawn * number, drawn * (1 - number))]
    # Of 9 tensors in a layer; the embedding, the norm and the head are the others.
    assert [record.proven for record in records] == [1, 1 + 2 * 9, 1 + 3 * 9]
    # Old layers keep their weights, under their new numbers.
    held = weights(tmp_path / "cached")
    for old, now in enumerate(layer for layer in range(3) if layer != number):
        of_old, of_now = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (old, now))
        assert torch.equal(held[f"stage-1/{of_old}"], held[f"stage-2/{of_now}"])
    assert f"at {at}" in growth_report(cached).to_html()


def test_a_stage_goes_on_where_a_plateau_ended_the_last_also_after_a_stop(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plateau = {"tokens": 2 * STEP, "by": 9.0}
    stages = [
        {"tokens": 9 * STEP, "plateau": plateau},
        {"tokens": 9 * STEP, "plateau": plateau, "data": "continue"},
        {"tokens": 2 * STEP, "data": "continue"},
    ]
    settings: dict[str, Any] = {"stages": stages, "cache": {"use": "on"}}
    whole = grown(bench, tmp_path / "whole", **settings)
    assert [(m.training.first_window, m.training.steps, m.training.stopped) for m in whole.stages] == [
        (0, 4, "plateau"),
        (4 * BATCH, 4, "plateau"),
        (8 * BATCH, 2, "tokens"),
    ]
    every = RunOptions(device="cpu", save_every=0)
    for holder, name, call in (
        (_Run, "finish", 1),
        (_Run, "_step", 3),
        (_Run, "finish", 1),
        (save_stage_module, "write_checkpoint", 1),
        (_Run, "_step", 2),
    ):
        with monkeypatch.context() as patch, pytest.raises(StopError):
            stop_at(patch, holder, name, call)
            grown(bench, tmp_path / "run", options=every, **settings)
    same(whole, grown(bench, tmp_path / "run", **settings), tmp_path / "whole", tmp_path / "run")


def test_passes_are_those_over_the_same_windows() -> None:
    def passes(*stages: dict[str, Any]) -> list[float | None]:
        plan = GrowthPlan.model_validate({"stages": stages, "sequence": 8, "batch": 4})
        return [run_module._cache_passes(plan, at, 24) for at in range(len(stages))]

    stage = {"tokens": 24 * 8}
    assert passes(stage, stage, stage) == [3, 2, 1]
    assert passes(stage, {**stage, "data": "continue"}, stage) == [1, 1, 1]
    assert passes(stage, {**stage, "at": "middle"}, stage) == [1, 2, 1]
    assert passes(stage, {**stage, "train": ["all"]}, stage) == [1, None, 1]
    assert passes({"tokens": 4 * 24 * 8}, stage) == [5, 1]


def test_the_embedding_is_called_frozen_only_where_it_was(bench: Path, tmp_path: Path) -> None:
    growth = grown(bench, tmp_path / "run", stages=[*ONE, {"tokens": TOKENS, "train": "all"}])
    assert [model.training.embedding for model in growth.stages] == ["frozen", "trained"]
    assert "the embedding trained too" in growth_report(growth).intro
    card = (tmp_path / "run/stage-2/README.md").read_text()
    assert "its embedding trained in this stage" in card and "frozen embedding" not in card


# Disks


def test_a_cache_elsewhere_is_the_runs_own_and_gone_at_the_end(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Path] = []
    plain = run_module.remove_folder

    def remove(folder: Path) -> None:
        kept.append(folder)
        assert folder.exists() or folder.name.endswith(".start")
        plain(folder)

    monkeypatch.setattr(run_module, "remove_folder", remove)
    stages = [{"times": 2, "tokens": TOKENS}]
    for name in ("one", "two"):
        grown(bench, tmp_path / name, stages=stages, cache={"use": "on", "folder": str(tmp_path / "fast")})
    caches = [folder for folder in kept if folder.parent == tmp_path / "fast"]
    assert len(set(caches)) == 2 and not list((tmp_path / "fast").iterdir())


@pytest.mark.parametrize("use", ["auto", "on"])
def test_a_disk_that_fills_while_states_are_written_ends_no_training(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    stages = [{"times": 3, "tokens": TOKENS}]
    whole = grown(bench, tmp_path / "whole", stages=stages, cache={"use": "on"})
    monkeypatch.setattr("surgery.growth.prefix_cache.decide._disk_seconds", lambda *_: (0.0, 1e-12))
    plain, written = PrefixCache._write_row, []

    def full(*arguments: Any) -> None:
        written.append(None)
        if len(written) > 30:  # all of the second stage's states fit, and some of the third's
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(*arguments)

    monkeypatch.setattr(PrefixCache, "_write_row", full)
    growth = grown(bench, tmp_path / "run", stages=stages, cache={"use": use})
    assert curves(growth) == curves(whole)
    second, third = (model.training.cache for model in growth.stages[1:])
    assert "failed" not in second.reason and "then its disk failed: " in third.reason
    assert second.computed == third.extended == STEPS * BATCH
    assert len(written) == 31


@pytest.mark.parametrize("use", ["auto", "on"])
def test_a_disk_that_is_full_once_the_cache_was_decided_on(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    monkeypatch.setattr("surgery.growth.prefix_cache.decide._disk_seconds", lambda *_: (0.0, 1e-12))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module, "_preallocate", full)
    stages = [{"times": 3, "tokens": TOKENS}]
    if use == "on":
        with pytest.raises(SurgeryError, match="the prefix cache needs"):
            grown(bench, tmp_path / "run", stages=stages, cache={"use": use})
        return
    cache = grown(bench, tmp_path / "run", stages=stages, cache={"use": use}).stages[1].training.cache
    assert not cache.used and cache.reason.startswith("no prefix cache: the prefix cache needs")
