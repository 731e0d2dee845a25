"""Plans: where each tensor goes, and what makes two plans the same job."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.architectures import build

from surgery.checkpoint.reader import TensorInput
from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.execution import execute
from surgery.engine.kernel import IDENTITY
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, PlannedTensor, check_output, copy_tensor, plan_files
from surgery.errors import SurgeryError
from surgery.io.input_files import MAX_TEXT_BYTES


def test_the_layout_is_that_of_the_model_it_is_like(tmp_path: Path) -> None:
    model = open_checkpoint(build("llama", tmp_path / "m", max_shard_size="10KB"))
    files = plan_files([copy_tensor(tensor) for tensor in model.tensors.values()], like=model)
    assert [file.name for file in files] == [shard.name for shard in model.shards]
    assert [file.header.raw for file in files] == [shard.header.raw for shard in model.shards]


def test_shards_are_no_larger_than_asked_for(tmp_path: Path) -> None:
    model = open_checkpoint(build("llama", tmp_path / "m"))
    files = plan_files([copy_tensor(tensor) for tensor in model.tensors.values()], like=model, shard_bytes=8000)
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.size - file.header.data_start <= 8000 or len(file.tensors) == 1 for file in files)
    assert sorted(t.name for file in files for t in file.tensors) == list(model.tensors)


def test_several_files_get_an_index_that_loaders_follow(tmp_path: Path) -> None:
    model = open_checkpoint(build("llama", tmp_path / "m"))
    files = plan_files([copy_tensor(tensor) for tensor in model.tensors.values()], shard_bytes=8000)
    plan = Plan({"name": "x"}, {"m": model}, files, model.side_files)
    execute(plan, tmp_path / "out", ExecutionOptions(), finish=lambda folder, outcome: None)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == model.n_bytes
    assert open_checkpoint(tmp_path / "out").tensors.keys() == model.tensors.keys()


def test_the_fingerprint_covers_all_that_decides_the_bytes(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4)}, tmp_path / "a.safetensors")
    save_file({"x": torch.ones(4)}, tmp_path / "b.safetensors")
    a, b = (open_checkpoint(tmp_path / f"{name}.safetensors") for name in "ab")

    def plan(source: object = a, dtype: str = "F32", **params: float) -> Plan:
        tensor = PlannedTensor("x", dtype, (4,), (TensorInput(source.tensors["x"]),), IDENTITY, params)  # type: ignore[attr-defined]
        return Plan({"name": "x"}, {"a": a}, plan_files([tensor]))

    prints = {
        plan().fingerprint([("a", 1, 2)]),
        plan(b).fingerprint([("a", 1, 2)]),
        plan(dtype="BF16").fingerprint([("a", 1, 2)]),
        plan(scale=2.0).fingerprint([("a", 1, 2)]),
        plan().fingerprint([("a", 1, 3)]),
        replace(plan(), command={"name": "y"}).fingerprint([("a", 1, 2)]),
    }
    assert len(prints) == 6
    assert plan().fingerprint([("a", 1, 2)]) == plan().fingerprint([("a", 1, 2)])


def test_memory_does_not_grow_with_the_model() -> None:
    def plan(rows: int) -> Plan:
        from surgery.checkpoint.stored_tensor import StoredTensor

        stored = StoredTensor("x", "BF16", (rows, 4096), Path("x"), 0, rows * 8192)
        return Plan({}, {}, plan_files([PlannedTensor("x", "BF16", stored.shape, (TensorInput(stored),), IDENTITY)]))

    assert plan(10_000).memory_bytes(4) == plan(1_000_000).memory_bytes(4) < 100 << 20


def test_writing_beside_a_source_is_allowed_and_into_it_is_not(tmp_path: Path) -> None:
    model = open_checkpoint(build("llama", tmp_path / "m"))
    check_output(tmp_path / "out", {"m": model})
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "m")
    for out in (tmp_path / "m", tmp_path / "m/out", link / "out"):
        with pytest.raises(SurgeryError, match="lies inside the m"):
            check_output(out, {"m": model})


def test_a_side_file_of_gigabytes_is_none(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    with path.open("wb") as file:
        file.truncate(MAX_TEXT_BYTES + 1)
    with pytest.raises(SurgeryError, match="more than the 64,000,000 of a file beside the weights"):
        Plan({}, {}, (), {"tokenizer_config.json": path})
    with path.open("wb") as file:
        file.truncate(MAX_TEXT_BYTES)
    Plan({}, {}, (), {"tokenizer_config.json": path})
