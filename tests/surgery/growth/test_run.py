"""Promises of a whole growth: plain checkpoints, a frozen substrate, runs that go on, the same losses with a cache."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.architectures import add_tokenizer, build
from support.forks import Fork
from support.growth_runs import (
    BATCH,
    CPU,
    SEQUENCE,
    STEPS,
    TOKENS,
    WIDTH,
    curves,
    grown,
    no_pictures,
    prepared,
    weights,
    write_corpora,
    write_plan,
    write_substrate,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.engine.verification import verify
from surgery.errors import SurgeryError
from surgery.growth.data.tokenizer_training import train_tokenizer
from surgery.growth.options import RunOptions
from surgery.growth.plan import Plateau
from surgery.growth.prepare import load_plan
from surgery.growth.results import REPORT, Growth, read_growth
from surgery.growth.run import grow
from surgery.io.atomic import MANIFEST
from surgery.io.json_io import read_json

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other processes: sums are split by threads
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_corpora(folder)
    write_substrate(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    no_pictures(monkeypatch)  # those of `run` are real: a fixture of the whole file begins before


@pytest.fixture(scope="module")
def run(bench: Path) -> Path:
    """A run of three stages, done."""
    grown(bench, bench / "run", evaluate={"texts": [str(bench / "words.txt")], "limit": 1})
    return bench / "run"


# What comes out


def test_every_stage_is_a_plain_llama_on_the_frozen_embedding(bench: Path, run: Path) -> None:
    table = load_file(bench / "emb/embedding.safetensors")["embedding"]
    before: dict[str, torch.Tensor] = {}
    for number in (1, 2, 3):
        folder = run / f"stage-{number}"
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert type(model).__name__ == "LlamaForCausalLM" and len(model.model.layers) == number
        assert not model.config.tie_word_embeddings
        ids = tokenizer("12+7=", return_tensors="pt").input_ids
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
        held = load_file(folder / "model.safetensors")
        assert torch.equal(held["model.embed_tokens.weight"], table)
        below = [name for name in before if ".layers." in name]
        assert len(below) == 9 * (number - 1)
        assert all(torch.equal(held[name], before[name]) for name in below)
        assert number == 1 or not torch.equal(held["lm_head.weight"], before["lm_head.weight"])
        assert verify(folder).ok
        before = held


def test_frozen_tensors_are_proven_by_their_hashes(run: Path) -> None:
    stages = read_growth(run).stages
    assert [model.training.proven for model in stages] == [1, 10, 19]
    first, second = (read_json(run / f"stage-{number}" / MANIFEST)["tensors"] for number in (1, 2))
    same = {name for name in first if first[name]["xxh3"] == second[name]["xxh3"]}
    assert same == {name for name in first if "lm_head" not in name and name != "model.norm.weight"}


def test_growth_learns_and_its_cost_is_that_of_what_trains(run: Path) -> None:
    growth = read_growth(run)
    trained = [model.training for model in growth.stages]
    assert trained[0].last_loss < trained[0].first_loss and trained[2].last_loss < trained[0].last_loss
    assert {record.tokens for record in trained} == {TOKENS}
    # AdamW keeps two numbers of four bytes for each that trains, and those are the same at every depth.
    assert {(r.trained_parameters, r.optimizer_bytes) for r in trained} == {
        (trained[0].trained_parameters, 8 * trained[0].trained_parameters)
    }
    assert [record.parameters - trained[0].parameters for record in trained] == [0, 2208, 4416]


def test_results_report_and_scores_are_there(run: Path) -> None:
    growth = read_growth(run)
    assert {score.metric for score in growth.stages[2].scores} == {"perplexity", "nats per token", "bits per byte"}
    page = (run / REPORT).read_text()
    assert "Loss against depth" in page and "stage-3" in page and "No baseline was trained" in page
    assert not (run / "cache").exists() and not list(run.glob("*.training")) and not list(run.glob("*.start"))


# Going on


def test_the_same_command_does_nothing_again(bench: Path, run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    growth = grow(prepared(bench, run, plan=bench / "run.yml"), CPU)
    assert growth == read_growth(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before


def test_a_plan_may_go_on_behind_what_is_done(bench: Path, tmp_path: Path) -> None:
    grown(bench, tmp_path / "run", stages=[{"tokens": TOKENS}])
    first = weights(tmp_path / "run")
    growth = grown(bench, tmp_path / "run", stages=[{"tokens": TOKENS}, {"tokens": TOKENS, "init": "copy"}])
    assert [model.training.layers for model in growth.stages] == [1, 2]
    again = weights(tmp_path / "run")
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_another_plan_never_overwrites_what_is_done(bench: Path, run: Path) -> None:
    for changes in ({"seed": 1}, {"corpus": "words.txt"}, {"training": {"learning_rate": 0.02}}):
        with pytest.raises(SurgeryError, match=r"another seed|another plan|another corpus"):
            grown(bench, run, **changes)


KILLING = """
import os, signal, sys
from importlib import import_module
from pathlib import Path

import torch

sys.path[:0] = sys.argv[5:]
from support.forks import Fork
from support.growth_runs import CPU, prepared
from surgery.growth.run import grow

torch.set_num_threads(1)
bench, run, place, calls = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
module, _, name = place.rpartition(":")
holder = import_module(module)
*path, last = name.split(".")
for step in path:
    holder = getattr(holder, step)
plain, seen = getattr(holder, last), []

def killed(*arguments, **keywords):
    seen.append(None)
    if len(seen) == calls:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*arguments, **keywords)

setattr(holder, last, killed)
grow(prepared(bench, run, plan=bench / "killed.yml"), type(CPU)(device="cpu", save_every=0))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "calls"),
    [
        ("surgery.growth.training.loop:_Run._step", 4),
        ("surgery.growth.training.loop:_Run._step", STEPS + 2),
        ("surgery.growth.training.loop:save_state", STEPS + 3),
        ("surgery.growth.prefix_cache.cache:PrefixCache.write", 4),
        ("surgery.growth.training.stage_checkpoint:write_checkpoint", 2),
        # Of the first model, its deeper one, stage 1, its deeper one, and stage 2.
        ("surgery.engine.checkpoint_writer:build_manifest", 5),
        ("surgery.growth.run:write_results", 2),
    ],
)
def test_a_killed_run_ends_as_one_that_was_not(bench: Path, tmp_path: Path, place: str, calls: int) -> None:
    write_plan(bench, "killed.yml", stages=[{"times": 2, "tokens": TOKENS}], cache={"use": "on"})
    whole = bench / "whole"
    if not whole.exists():
        grow(prepared(bench, whole, plan=bench / "killed.yml"), CPU)
    child = Fork(KILLING, bench, tmp_path / "run", place, calls, ROOT, ROOT / "tests")
    code, _, complaints = child.wait()
    assert code == -signal.SIGKILL, complaints
    growth = grow(prepared(bench, tmp_path / "run", plan=bench / "killed.yml"), CPU)
    assert curves(growth) == curves(read_growth(whole))
    one, other = weights(tmp_path / "run"), weights(whole)
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


# The prefix cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_are_the_same_with_a_cache(bench: Path, tmp_path: Path, dtype: str) -> None:
    plain = grown(bench, tmp_path / "plain", cache={"use": "off"})
    cached = grown(bench, tmp_path / "cached", cache={"use": "on", "dtype": dtype})
    uses = [model.training.cache for model in cached.stages]
    assert [(use.used, use.computed, use.extended) for use in uses] == [
        (False, 0, 0),
        (True, STEPS * BATCH, 0),
        (True, 0, STEPS * BATCH),
    ]
    tolerance = 1e-6 if dtype == "float32" else 2e-2
    for one, other in zip(curves(plain), curves(cached), strict=True):
        assert one == pytest.approx(other, abs=tolerance)


def test_more_passes_are_read_back(bench: Path, tmp_path: Path) -> None:
    count = grown(bench, tmp_path / "one", stages=[{"tokens": TOKENS}]).stages[0].training.tokens
    (tmp_path / "few.txt").write_text((bench / "sums.txt").read_text()[:400])
    (tmp_path / "emb").symlink_to(bench / "emb")
    run = prepared(
        tmp_path,
        tmp_path / "run",
        corpus="few.txt",
        stages=[{"tokens": count}, {"tokens": 4 * count}],
        cache={"use": "on"},
    )
    use = grow(run, CPU).stages[1].training.cache
    windows = use.bytes // (SEQUENCE * WIDTH * 4 + 16)
    assert use.computed == windows < STEPS * BATCH * 4 and use.read == 4 * STEPS * BATCH - windows


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ({"train": ["new", "head", "lora"]}, "no prefix cache"),
        ({"at": 0}, "the prefix is the embedding alone"),
    ],
)
def test_what_changes_below_is_never_cached(bench: Path, tmp_path: Path, stage: dict[str, Any], reason: str) -> None:
    growth = grown(bench, tmp_path / "run", stages=[{"tokens": TOKENS}, {"tokens": TOKENS, **stage}])
    assert not growth.stages[1].training.cache.used and growth.stages[1].training.cache.reason.startswith(reason)


def test_no_room_for_the_cache_is_said_when_it_was_asked_for(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"the prefix cache cannot be used: it needs .* and the plan allows 1 kB"):
        grown(bench, tmp_path / "run", cache={"use": "on", "disk": "1 kB"})
    growth = grown(bench, tmp_path / "other", cache={"disk": "1 kB"})
    assert "and the plan allows 1 kB" in growth.stages[1].training.cache.reason


# Other plans


def test_updates_of_old_layers_are_merged_into_a_plain_checkpoint(bench: Path, tmp_path: Path) -> None:
    stages = [{"tokens": TOKENS}, {"tokens": TOKENS, "train": ["new", "head", "norm", "lora"], "lora": {"rank": 2}}]
    growth = grown(bench, tmp_path / "run", stages=stages)
    first, second = (load_file(tmp_path / f"run/stage-{number}/model.safetensors") for number in (1, 2))
    moved = [name for name in first if ".layers.0." in name and not torch.equal(first[name], second[name])]
    assert sorted(second) == sorted({*first, *(name.replace("s.0.", "s.1.") for name in first if ".layers.0." in name)})
    assert len(moved) == 7 and not [name for name in moved if "norm" in name]
    assert growth.stages[1].training.proven == 1


def test_a_stage_stops_on_a_plateau(bench: Path, tmp_path: Path) -> None:
    plateau = Plateau(tokens=2 * BATCH * SEQUENCE, by=9.0).model_dump()
    growth = grown(bench, tmp_path / "run", stages=[{"tokens": 50 * TOKENS, "plateau": plateau}])
    assert (growth.stages[0].training.stopped, growth.stages[0].training.steps) == ("plateau", 4)


def test_stages_go_on_in_the_corpus_where_the_plan_says_so(bench: Path, tmp_path: Path) -> None:
    stages = [{"tokens": TOKENS}, {"tokens": TOKENS, "data": "continue"}, {"tokens": TOKENS}]
    growth = grown(bench, tmp_path / "run", stages=stages)
    assert [model.training.first_window for model in growth.stages] == [0, STEPS * BATCH, 0]


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_models_of_other_families_are_deepened_and_trained(bench: Path, tmp_path: Path, family: str) -> None:
    folder = tmp_path / "model"
    build(family, folder)
    add_tokenizer(folder)
    rng = random.Random(0)
    (bench / "w.txt").write_text(" ".join(f"w{rng.randrange(4, 20)}" for _ in range(600)))
    stages = [{"tokens": 6 * TOKENS, "at": "middle", "train": ["new", "norm"]}]
    growth = grown(bench, tmp_path / "run", corpus="w.txt", start=str(folder), model=None, stages=stages)
    assert (growth.stages[0].training.layers, growth.stages[0].training.new) == (3, (1,))
    assert growth.stages[0].training.last_loss < growth.stages[0].training.first_loss
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/stage-1")
    assert model.config.num_hidden_layers == 3 and model.config.model_type == family


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"tokens": 9, "at": 3}]}, "stage 1 adds layers before layer 3, where there are 0: use top"),
        ({"stages": [{"tokens": 9, "init": "copy"}]}, "stage 1 copies layers, where there are none yet"),
        ({"stages": [{"tokens": 9, "add": 0, "train": ["head"]}]}, "stage 1 trains a model without any layer"),
        ({"training": {"accumulate": 3}}, "a batch of 4 windows cannot be divided into 3 parts"),
        ({"model": {"heads": 2, "context": 4}}, "windows of 8 tokens do not fit into the model's context of 4"),
        ({"model": {"heads": 3}}, "heads"),
        ({"model": {"hidden": 17}}, "hidden: got 17, expected the embedding's width, 16"),
        ({"corpus": "empty.txt"}, "empty.txt"),
        ({"corpus": "none.txt"}, "no such file"),
        ({"corpus": "short.txt"}, "fewer than one window of 9"),
        ({"evaluate": {"texts": ["none.txt"]}}, "none.txt"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_a_line(
    bench: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (bench / "empty.txt").write_text(" \n")
    (bench / "short.txt").write_text("1")
    with pytest.raises(SurgeryError) as caught:
        grown(bench, tmp_path / "run", **changes)
    assert message in str(caught.value)
    assert not list((tmp_path / "run").glob("stage*"))


def test_an_embedding_of_another_tokenizer_is_refused(bench: Path, tmp_path: Path) -> None:
    write_corpora(tmp_path)
    shutil.copytree(bench / "emb", tmp_path / "emb")
    texts = [(tmp_path / name).read_text() for name in ("sums.txt", "words.txt")]
    train_tokenizer(texts, tmp_path / "tok", vocab=330)
    for path in (tmp_path / "tok").glob("tokenizer*"):
        shutil.copy(path, tmp_path / "emb")
    with pytest.raises(SurgeryError, match=r"its tokenizer has 330 tokens, the embedding 320 rows"):
        prepared(tmp_path, tmp_path / "run")


def test_a_plan_says_what_it_begins_with_and_learns_from(bench: Path, tmp_path: Path) -> None:
    path = str(write_plan(tmp_path))
    for given, message in (
        ({}, "says neither embed nor start"),
        ({"embed": "e"}, "names no corpus"),
    ):
        with pytest.raises(SurgeryError, match=message):
            load_plan(path, **given)
    with pytest.raises(SurgeryError, match="says both embed and start"):
        load_plan(str(write_plan(tmp_path, embed="a", start="b")))


def test_a_folder_of_something_else_is_left_alone(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine").write_text("")
    with pytest.raises(SurgeryError, match="is not empty, and no growth"):
        grown(bench, tmp_path / "run")


def test_logs_for_tensorboard_are_written_where_asked(bench: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    grown(bench, tmp_path / "run", options=RunOptions(device="cpu", logs=True), stages=[{"tokens": TOKENS}])
    assert list((tmp_path / "run/logs/stage-1").glob("events*"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_growth_runs_on_a_gpu(bench: Path, tmp_path: Path) -> None:
    growth: Growth = grown(bench, tmp_path / "run", options=RunOptions(device="cuda"))
    assert growth.stages[2].training.last_loss < growth.stages[0].training.first_loss
