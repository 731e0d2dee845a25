"""Promises of runtime.collectives: two real processes find what one finds, and neither waits for one that failed."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import make_sequences, open_folder, probe_for, save
from support.processes import fork_ranks, free_port, known_to
from torch import Tensor

from probes.model.ablation import ablate_each_head, all_heads
from probes.model.activations import hidden_states_at, project_hidden_states
from probes.model.residual_stream import trace_residual_stream
from probes.refusal.heads.attribution import attribute_heads, head_inputs
from probes.side_effects.effects import ComparedModel, greedy_answers, measure_divergence
from surgery.checkpoint.selectors import Head
from surgery.errors import SurgeryError
from surgery.models.loaded_model import LoadedModel
from surgery.runtime import collectives as parallel
from surgery.runtime.collectives import connect, local_device, map_over_ranks

ROOT = Path(__file__).parents[3]
PROCESSES = 2

SCRIPT = """
import json, sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

sys.path[:0] = sys.argv[3:]
from test_collectives import everything
from support.models import open_folder
from probes.model.activations import token_budget
from surgery.runtime.collectives import barrier, local_device, map_over_ranks
from surgery.runtime.environment import rank

torch.set_num_threads(1)
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
tensors, texts = everything(open_folder(folder))
save_file(tensors, out / f"{rank()}.safetensors")

room = (9000, 3000)[rank()]
def trial(tokens):
    if tokens > room:
        raise torch.OutOfMemoryError("CUDA out of memory.")

card = SimpleNamespace(device=torch.device("cuda"), name="card")
budget = token_budget(card, 100, trial, start=16000)
(out / f"{rank()}.json").write_text(json.dumps({"texts": texts, "budget": budget, "device": local_device("cuda")}))
barrier()

def fail(item):
    if item == 3:
        raise ValueError("item 3 is no good")
    return item

map_over_ranks(range(4), fail)
"""


def everything(live: LoadedModel) -> tuple[dict[str, Tensor], list[str]]:
    """All that is shared between processes, of more batches than there are processes."""
    sequences = make_sequences((9, 5, 12, 7, 12), answer=3)
    weight, bias = probe_for(live)
    found = {"states": hidden_states_at(live, sequences, [[0, 4]] * 5, max_tokens=20)}
    traces = project_hidden_states(
        live, sequences, torch.ones(live.n_depths, live.width), torch.zeros(live.n_depths), max_tokens=20
    )
    found |= {f"trace {number}": trace for number, trace in enumerate(traces)}
    scores = attribute_heads(live, sequences, weight, bias, stream=trace_residual_stream(live), max_tokens=20)
    found |= {f"exact {layer}": row for layer, row in scores.exact.items()} | {"total": scores.total}
    found |= {f"z {layer}": row for layer, row in head_inputs(live, sequences, 3, max_tokens=20).items()}
    found["ablated"] = ablate_each_head(live, sequences, all_heads(live), weight, bias, last=3).ablated
    edited = ComparedModel(live, {Head(0, 1): 0.0})
    away = measure_divergence(ComparedModel(live), {"set": edited}, sequences, max_tokens=20)["set"]
    found["kl"] = torch.from_numpy(away.kl.copy())
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}, greedy_answers(
        edited, sequences, tokens=4
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("qwen3", tmp_path_factory.mktemp("shared") / "m")


@pytest.fixture(scope="module")
def launched(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], list[str]]:
    """Where two processes that know of each other wrote what they found; their exit codes and complaints."""
    out = tmp_path_factory.mktemp("out")
    paths = [ROOT, ROOT / "tests", Path(__file__).parent]
    codes, complaints, _ = fork_ranks(SCRIPT, folder, out, *paths, world=PROCESSES)
    return out, codes, complaints


@pytest.mark.slow
def test_every_process_has_the_results_of_one(folder, launched):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as there: sums are split by threads
    try:
        tensors, texts = everything(open_folder(folder))
    finally:
        torch.set_num_threads(threads)
    for rank in range(PROCESSES):
        found = load_file(launched[0] / f"{rank}.safetensors")
        assert sorted(found) == sorted(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(found[name], tensor), name
        assert json.loads((launched[0] / f"{rank}.json").read_text())["texts"] == texts


@pytest.mark.slow
def test_all_processes_take_the_batches_that_fit_the_smallest_card(launched):
    found = [json.loads((launched[0] / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    assert [row["budget"] for row in found] == [2000, 2000]
    assert [row["device"] for row in found] == ["cuda:0", "cuda:1"]


@pytest.mark.slow
def test_a_fault_in_one_process_ends_all_of_them(launched):
    _, codes, complaints = launched
    assert codes == [1, 1]
    assert "SurgeryError: process 1 failed: ValueError: item 3 is no good" in complaints[0]
    assert "ValueError: item 3 is no good" in complaints[1]


@pytest.fixture
def launched_alone(monkeypatch: pytest.MonkeyPatch) -> int:
    """As if a launcher had started this process as the first of two; the port at which they would meet."""
    port = free_port()
    known = known_to(0, world=2, port=port)
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel, "START_TIMEOUT", timedelta(seconds=0.3))
    return port


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "text"),
    [("0", "of 2 processes these have not begun: 1, after"), ("1", "nothing answers at 127.0.0.1, port {port}, where")],
)
def test_a_process_that_never_begins_is_missed(monkeypatch, launched_alone, rank, text):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SurgeryError, match=f"process {rank}: {text.format(port=launched_alone)}"):
        map_over_ranks([1, 2], abs)


@pytest.mark.slow
def test_processes_that_are_not_told_where_to_meet_say_so(monkeypatch, launched_alone):
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(SurgeryError, match=r"WORLD_SIZE says that there are 2 processes.* or unset WORLD_SIZE\."):
        connect()


def test_what_is_told_goes_over_gloo_beside_what_a_gpu_trains_over(monkeypatch):
    assert parallel._backends() == "gloo"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for device, backends in (("cuda", "cpu:gloo,cuda:nccl"), ("mps", "gloo")):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda kind=device: torch.device(kind))
        assert parallel._backends() == backends


def test_one_process_works_in_order_and_raises_what_is_raised():
    assert map_over_ranks([3, 1, 2], lambda item: item * item) == [9, 1, 4]
    assert map_over_ranks([], lambda item: item) == []
    with pytest.raises(ZeroDivisionError):
        map_over_ranks([1, 0], lambda item: 1 / item)


def test_one_process_takes_the_device_it_is_given():
    assert [local_device(device) for device in ("cpu", "cuda", "cuda:1", "auto")] == ["cpu", "cuda", "cuda:1", "auto"]


def test_a_spread_model_is_not_shared(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SurgeryError, match="device: auto spreads one model over all devices"):
        local_device("auto")
    assert local_device("cpu") == "cpu"
