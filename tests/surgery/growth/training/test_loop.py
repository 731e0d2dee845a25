"""Promises of surgery.growth.training.loop: it learns, touches nothing else, and goes on as if it had never stopped."""

from __future__ import annotations

import json
import math
import random
import signal
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.forks import Fork
from support.growth import BATCH, COUNT, SEQUENCE, Windows, make_stage, train, train_live
from support.models import make_live, open_folder, save
from support.processes import fork_ranks
from torch.nn import functional

from surgery.errors import SurgeryError
from surgery.growth.plan import GrowthStage, Plateau, StageTraining
from surgery.growth.training.loop import StageResult, TrainingStep
from surgery.growth.training.schedule import has_plateaued, learning_rate

ROOT = Path(__file__).parents[4]
TOKENS_PER_STEP = BATCH * SEQUENCE

KINDS: dict[str, GrowthStage] = {
    "plain": make_stage(),
    "accumulate": make_stage(training={"accumulate": 2}),
    "lora": make_stage(("new", "head", "norm", "lora")),
    "all": make_stage(("all",)),
    "dropout": make_stage(),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other processes: sums are split by threads
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("train") / "m", num_hidden_layers=3)


def same(one: StageResult, other: StageResult) -> None:
    assert one.losses == other.losses
    assert list(one.weights) == list(other.weights)
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def test_it_learns_and_changes_only_what_trains(model: Path, tmp_path: Path) -> None:
    live, before = open_folder(model), open_folder(model)
    result = train_live(live, make_stage(steps=20), tmp_path / "state")
    assert (result.steps, result.tokens, result.stopped) == (20, 20 * TOKENS_PER_STEP, "tokens")
    assert result.losses[-1] < 0.8 * result.losses[0]
    assert result.curve[0] == (TOKENS_PER_STEP, result.losses[0]) and result.curve[-1][0] == result.tokens
    changed = set()
    for name, weight in before.model.named_parameters():
        if not torch.equal(weight, live.model.get_parameter(name)):
            changed.add(name)
    assert changed == set(result.weights)
    assert {name.rpartition(".")[0].partition("layers.")[2][:1] or name for name in changed} == {
        "2",
        "lm_head.weight",
        "model.norm.weight",
    }
    # Left as they were found: evaluating, frozen, without gradients.
    assert not live.model.training
    assert not any(p.requires_grad or p.grad is not None for p in live.model.parameters())


def test_optimizer_memory_is_for_what_trains_alone(model: Path, tmp_path: Path) -> None:
    for number, train_what in enumerate([("norm",), ("new", "head", "norm"), ("all",)]):
        result = train(model, make_stage(train_what, steps=1), tmp_path / str(number))
        expected = sum(weight.numel() for weight in result.weights.values())
        assert result.n_trained == expected and result.optimizer_bytes == 2 * 4 * expected


def test_steps_are_those_of_adamw(model: Path, tmp_path: Path) -> None:
    stage = make_stage(steps=4, training={"clip": 0.5, "accumulate": 2})
    result = train(model, stage, tmp_path / "state")
    live, windows, losses = open_folder(model), Windows(), []
    windows.require(10**6)
    parameters = {name: live.model.get_parameter(name).requires_grad_() for name in result.weights}
    groups = [
        {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    live.model.double()
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False)
    for step in range(4):
        batch = windows.windows([windows.window_at(2 + step * BATCH + row) for row in range(BATCH)])
        logits = live.model(input_ids=batch[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 4, stage.training)
        optimizer.step()
        losses.append(loss.item())
    assert result.losses == pytest.approx(losses, rel=1e-5)
    for name, parameter in parameters.items():
        torch.testing.assert_close(result.weights[name].double(), parameter.detach(), atol=1e-5, rtol=1e-4)


def test_a_cached_prefix_gives_the_losses_of_none(model: Path, tmp_path: Path) -> None:
    plain = train(model, make_stage(steps=10), tmp_path / "a")
    cached = train(model, make_stage(steps=10), tmp_path / "b", cache=tmp_path / "cache")
    assert cached.losses == pytest.approx(plain.losses, rel=1e-6)
    assert cached.prefix.read == 40 - COUNT and cached.prefix.computed == COUNT
    again = train(model, make_stage(steps=10), tmp_path / "c", cache=tmp_path / "cache")
    same(cached, again)
    assert again.prefix.read == 40


@pytest.mark.parametrize("kind", [*KINDS, "cache"])
def test_interrupted_and_resumed_it_ends_as_if_it_had_never_stopped(kind: str, model: Path, tmp_path: Path) -> None:
    stage, cache = KINDS.get(kind, KINDS["accumulate"]), tmp_path / "cache" if kind == "cache" else None
    if kind == "dropout":
        model = save("llama", tmp_path / "m", attention_dropout=0.3)
    whole = train(model, stage, tmp_path / "whole", cache=tmp_path / "other" if cache else None)
    seen: list[TrainingStep] = []

    def log(step: TrainingStep) -> None:
        seen.append(step)
        if len(seen) in (2, 5):
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(model, stage, tmp_path / "state", cache=cache, log=log)
    assert signal.getsignal(signal.SIGINT) is before
    resumed = train(model, stage, tmp_path / "state", cache=cache, log=log)
    same(whole, resumed)
    assert [step.tokens for step in seen] == [(n + 1) * TOKENS_PER_STEP for n in range(6)]
    assert tuple(step.loss for step in seen) == whole.losses
    # Once more: nothing is left to do, and the same comes out.
    same(whole, train(model, stage, tmp_path / "state", cache=cache, log=log))
    assert len(seen) == 6


CHILD = """
import sys
from pathlib import Path

sys.path[:0] = sys.argv[4:]
import torch
from support.growth import make_stage, train
from test_loop import KINDS

torch.set_num_threads(1)
model, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def log(step):
    print(step.tokens, flush=True)

cache = out / "cache" if kind == "accumulate" else None
train(model, KINDS[kind], out / "state", cache=cache, save_every=0, log=log)
print("done", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["accumulate", "lora"])
def test_killed_at_any_time_it_ends_as_if_it_had_never_been(kind: str, model: Path, tmp_path: Path) -> None:
    stage, cached = KINDS[kind], kind == "accumulate"
    whole = train(model, stage, tmp_path / "whole", cache=tmp_path / "other" if cached else None)
    kill_after = random.randint(1, 5)
    child = Fork(CHILD, model, tmp_path, kind, *paths())
    for _ in range(kill_after):
        assert child.stdout.readline()
    child.kill()
    code, _, complaints = child.wait()
    assert code == -signal.SIGKILL, complaints
    steps: list[TrainingStep] = []
    resumed = train(model, stage, tmp_path / "state", cache=tmp_path / "cache" if cached else None, log=steps.append)
    assert 6 - kill_after - 1 <= len(steps) <= 6 - kill_after + 1
    same(whole, resumed)


def paths() -> list[str]:
    return [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]


RANK = """
import json, os, signal, sys
from pathlib import Path

sys.path[:0] = sys.argv[4:]
import torch
from support.growth import train
from safetensors.torch import save_file
from accelerate import PartialState
from surgery.errors import SurgeryError
from surgery.runtime.collectives import barrier
from surgery.runtime.environment import rank
from test_loop import KINDS

torch.set_num_threads(1)
model, out, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if how == "fsdp":
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    }
    # Accelerate shards on accelerators only: told that these are some, it uses the same code with gloo on CPUs.
    from accelerate.utils import DistributedType
    barrier()
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU

found, weights = {}, {}
for kind in ("accumulate", "lora", "all"):
    steps, folder = [], out / kind

    def log(step):
        steps.append(step)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)

    cache = out / "cache" if how == "ddp" and kind == "accumulate" else None
    interrupted = False
    try:
        train(model, KINDS[kind], folder, cache=cache, log=log)
    except KeyboardInterrupt:
        interrupted = True
    kept = json.loads((folder / "state.json").read_text())["state"]["step"]
    result = train(model, KINDS[kind], folder, cache=cache, log=log)
    found[kind] = {
        "losses": result.losses, "bytes": result.optimizer_bytes, "n": result.n_trained, "kept": kept,
        "interrupted": interrupted, "logged": len(steps),
    }
    weights |= {f"{kind}/{name}": value.contiguous() for name, value in result.weights.items()}
save_file(weights, out / f"{rank()}.safetensors")
try:
    train(model, KINDS["plain"], out / "x", batch=3)
except SurgeryError as error:
    found["batch"] = str(error)
try:
    train(model, KINDS["plain"], out / "y", cache=out / "z")
except SurgeryError as error:
    found["cache"] = str(error)
(out / f"{rank()}.json").write_text(json.dumps(found))
"""


def launch(model: Path, out: Path, how: str) -> list[dict[str, Any]]:
    """What two processes that know of each other found; their weights lie in `out`."""
    codes, complaints, _ = fork_ranks(RANK, model, out, how, *paths())
    assert codes == [0, 0], complaints
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_as_one(how: str, model: Path, tmp_path: Path) -> None:
    ranks = launch(model, tmp_path, how)
    for kind in ("accumulate", "lora", "all"):
        one = train(model, KINDS[kind], tmp_path / f"one {kind}")
        for rank, found in enumerate(ranks):
            facts = found[kind]
            assert facts["losses"] == pytest.approx(one.losses, rel=1e-5)
            # One process was interrupted after two steps; both stop and save together, one step later at the latest.
            assert facts["interrupted"] and facts["kept"] == 3
            assert facts["logged"] == (6 if rank == 0 else 0)
            assert facts["n"] == one.n_trained
            assert facts["bytes"] == (one.optimizer_bytes if how == "ddp" else one.optimizer_bytes // 2)
            weights = load_file(tmp_path / f"{rank}.safetensors")
            for name, weight in one.weights.items():
                torch.testing.assert_close(weights[f"{kind}/{name}"], weight, atol=1e-4, rtol=1e-3)
    for found in ranks:
        assert "batch: got 3 windows, which 2 process(es) in 1 part(s) each cannot share" in found["batch"]
        assert ("does not work where FSDP shards" in found["cache"]) if how == "fsdp" else "cache" not in found


@pytest.mark.parametrize(
    ("save_every", "what"),
    [
        (0, r"step 3: weights or their moments are no longer finite; the state after step 2 is kept in .*"),
        (5, r"step 4: the loss is nan, its gradient's norm nan; no state was saved yet"),
    ],
)
def test_what_is_not_finite_stops_it_and_is_not_saved(
    save_every: float, what: str, model: Path, tmp_path: Path
) -> None:
    live, stage = open_folder(model), make_stage()
    weight = live.model.get_parameter("lm_head.weight")

    def log(step: TrainingStep) -> None:
        if step.tokens == 3 * TOKENS_PER_STEP:
            weight.data[5] = math.nan

    with pytest.raises(SurgeryError, match=rf"^m: {what}\. Lower the learning rate, which is 0\.01, and"):
        train_live(live, stage, tmp_path / "state", save_every=save_every, log=log)
    steps: list[TrainingStep] = []
    train(model, stage, tmp_path / "state", log=steps.append)
    assert len(steps) == (4 if save_every == 0 else 6) and all(math.isfinite(step.loss) for step in steps)


def test_an_infinite_gradient_is_not_applied(model: Path, tmp_path: Path) -> None:
    stage = make_stage(training={"learning_rate": 1e30, "warmup": 0})
    with pytest.raises(
        SurgeryError, match=r"step 2: the loss is .*no state was saved yet. Lower the learning rate, wh"
    ):
        train(model, stage, tmp_path / "state")


@pytest.mark.parametrize("other", ["model", "stage", "window", "tokens"])
def test_the_state_of_another_training_is_refused(other: str, model: Path, tmp_path: Path) -> None:
    stage = make_stage(steps=2)
    train(model, stage, tmp_path / "state")
    options: dict[str, Any] = {"window": {"first_window": 3}}.get(other, {})
    if other == "model":
        model = save("llama", tmp_path / "m", num_hidden_layers=3, seed=1)
    if other == "stage":
        stage = make_stage(steps=3)
    if other == "tokens":
        options["store"] = Windows()
        options["store"].identity = "other"
    with pytest.raises(SurgeryError, match="is that of another stage, model or corpus"):
        train(model, stage, tmp_path / "state", **options)


def test_a_batch_that_cannot_be_shared_is_refused_before_anything_starts(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"batch: got 4 windows, which 1 process\(es\) in 3 part.* multiple of 3"):
        train(model, make_stage(training={"accumulate": 3}), tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_a_prefix_of_another_depth_is_refused(model: Path, tmp_path: Path) -> None:
    live = open_folder(model)
    with pytest.raises(SurgeryError, match="prefix: got one up to layer 1 in None, expected 2 in None"):
        train_live(live, make_stage(), tmp_path / "state", cache=tmp_path / "c", depth=1)


def test_a_plateau_ends_the_stage(model: Path, tmp_path: Path) -> None:
    stage = make_stage(steps=9, plateau=Plateau(tokens=2 * TOKENS_PER_STEP, by=100))
    steps: list[TrainingStep] = []
    result = train(model, stage, tmp_path / "state", log=steps.append)
    assert (result.stopped, result.steps) == ("plateau", 4)
    again = train(model, stage, tmp_path / "state", log=steps.append)
    assert again.stopped == "plateau" and len(steps) == 4
    same(result, again)


def test_losses_have_plateaued_once_they_no_longer_fall_by_so_much() -> None:
    plateau = Plateau(tokens=20, by=0.1)
    assert not has_plateaued([3.0, 3.0, 3.0], plateau, 10)
    assert has_plateaued([3.0, 3.0, 3.0, 3.0], plateau, 10)
    assert has_plateaued([3.0, 3.0, 2.92, 2.92], plateau, 10)
    assert not has_plateaued([3.0, 3.0, 2.85, 2.85], plateau, 10)
    assert not has_plateaued([9.0, 3.0, 3.0], Plateau(tokens=5, by=0.0), 10)
    assert has_plateaued([9.0, 3.0, 3.1], Plateau(tokens=5, by=0.0), 10)
    assert not has_plateaued([3.0] * 9, None, 10)


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"warmup": 0.4, "decay": "linear", "final_rate": 0.1}, [0.5, 1, 0.7, 0.4, 0.1]),
        ({"warmup": 0.4, "decay": "cosine", "final_rate": 0.0}, [0.5, 1, 0.75, 0.25, 0]),
        ({"warmup": 0.4, "decay": "constant"}, [0.5, 1, 1, 1, 1]),
        ({"warmup": 0.0, "decay": "linear", "final_rate": 0.0}, [0.8, 0.6, 0.4, 0.2, 0]),
        ({"warmup": 1.0}, [0.2, 0.4, 0.6, 0.8, 1]),
        ({"warmup": 0.01, "decay": "constant"}, [1, 1, 1, 1, 1]),
    ],
)
def test_the_learning_rate_rises_and_falls(settings: Mapping[str, Any], rates: Sequence[float]) -> None:
    training = StageTraining(learning_rate=2.0, **settings)
    assert [learning_rate(step, 5, training) for step in range(5)] == pytest.approx([2 * rate for rate in rates])


def test_progress_is_told_in_tokens_with_the_loss(model: Path, tmp_path: Path) -> None:
    told: list[Any] = []

    @contextmanager
    def progress(label: str, total: int, unit: str = "bytes"):
        told.append((label, total, unit))
        yield lambda amount, note="": told.append((amount, note))

    result = train(model, make_stage(steps=2), tmp_path / "state", label="Stage 1", progress=progress)
    assert told == [
        ("Stage 1", 2 * TOKENS_PER_STEP, "tokens"),
        *((TOKENS_PER_STEP, f"loss {loss:.3f}") for loss in result.losses),
    ]
    told.clear()
    train(model, make_stage(steps=2), tmp_path / "state", progress=progress)
    assert told == [("Training", 2 * TOKENS_PER_STEP, "tokens"), (2 * TOKENS_PER_STEP, "")]


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen3", "gemma2", "falcon_h1"])
def test_models_of_any_family_train(family: str, tmp_path: Path) -> None:
    live = make_live(family, tmp_path / "m")
    train_what = ("new", "norm", "lora")
    result = train_live(live, make_stage(train_what, steps=8), tmp_path / "state")
    assert result.losses[-1] < result.losses[0]
