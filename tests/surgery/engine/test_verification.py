"""Promises of engine.verify: the hash says which weights, and neither where they lie nor how they are sharded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import build
from xxhash import xxh3_128

import surgery.engine.verification
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.selectors import Head
from surgery.edits.heads import scale_heads
from surgery.engine.options import ExecutionOptions
from surgery.engine.verification import weights_hash
from surgery.errors import SurgeryError


def hash_of(folder: Path, **options: int) -> str:
    return weights_hash(open_checkpoint(folder), options=ExecutionOptions(**options))


def test_it_is_the_hash_of_the_sorted_tensors(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m", dtype=torch.float32)
    lines = []
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        assert tensor.numel() < 2**20  # one segment each
        lines.append(f"{name} {xxh3_128(xxh3_128(tensor.numpy().tobytes()).digest()).hexdigest()}\n")
    assert hash_of(folder) == xxh3_128("".join(lines).encode()).hexdigest()


def test_shards_folders_and_threads_change_nothing(tmp_path: Path) -> None:
    whole = build("llama", tmp_path / "whole")
    sharded = build("llama", tmp_path / "sharded", max_shard_size="10KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    expected = hash_of(whole)
    assert hash_of(sharded) == hash_of(Path(shutil.copytree(whole, tmp_path / "moved"))) == expected
    assert hash_of(whole, threads=1) == hash_of(whole, threads=3) == expected


def test_it_is_what_manifests_say_of_their_inputs(tmp_path: Path) -> None:
    folder = build("qwen3", tmp_path / "m")
    scale_heads(str(folder), tmp_path / "out", scales={Head(0, 1): 0.0})
    manifest = json.loads((tmp_path / "out" / "surgery.json").read_text(encoding="utf-8"))
    (entry,) = manifest["inputs"].values()
    assert entry["xxh3"] == hash_of(folder) != hash_of(tmp_path / "out")


@pytest.mark.parametrize("change", ["one bit", "a name", "a tensor less", "the format"])
def test_other_weights_have_another_hash(change: str, tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m")
    before = hash_of(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "one bit":
        tensors[name].view(torch.int16)[3, 5] ^= 1
    elif change == "a name":
        tensors[name + "s"] = tensors.pop(name)
    elif change == "a tensor less":
        del tensors[name]
    else:
        tensors[name] = tensors[name].float()
    save_file(tensors, file, metadata={"format": "pt"})
    assert hash_of(folder) != before


def test_what_is_not_weights_does_not_count(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m")
    before = hash_of(folder)
    (folder / "README.md").write_text("another text", encoding="utf-8")
    save_file(
        load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt", "x": "y"}
    )
    assert hash_of(folder) == before


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build("llama", tmp_path / "m")
    plain = surgery.engine.verification.hash_tensor

    def meddling(reader: object, tensor: object) -> str:
        found: str = plain(reader, tensor)  # type: ignore[arg-type]
        with (folder / "model.safetensors").open("ab") as file:
            file.write(b"\0")
        return found

    monkeypatch.setattr(surgery.engine.verification, "hash_tensor", meddling)
    with pytest.raises(SurgeryError, match=r"model\.safetensors"):
        hash_of(folder)


def test_progress_counts_all_bytes(tmp_path: Path) -> None:
    from contextlib import contextmanager

    folder, seen = build("llama", tmp_path / "m", max_shard_size="10KB"), []

    @contextmanager
    def progress(label: str, total: int, unit: str = "bytes"):  # type: ignore[no-untyped-def]
        seen.append((label, total))
        yield lambda n: seen.append(n)

    weights_hash(open_checkpoint(folder), options=replace(ExecutionOptions(), progress=progress))
    (label, total), *steps = seen
    assert label == "Hashing the model"
    assert (
        sum(steps) == total == sum(t.numel() * 2 for f in folder.glob("*.safetensors") for t in load_file(f).values())
    )
