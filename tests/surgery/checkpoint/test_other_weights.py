"""Two sets of weights in one folder: which counts is told."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.architectures import add_tokenizer, build
from support.cli import commands_in

from surgery.checkpoint.other_weights import find_other_weights
from surgery.checkpoint.resolve import open_checkpoint
from surgery.errors import SurgeryWarning


def files(folder: Path, *names: str) -> Path:
    tensors = load_file(folder / "model.safetensors")
    for name in names:
        if name.endswith(".safetensors"):
            save_file(tensors, folder / name)
        else:
            (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("beside", "told"),
    [
        ((), []),
        (("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "scaler.pt", "notes.txt"), []),
        (("pytorch_model.bin",), ["pytorch_model.bin"]),
        (("pytorch_model.bin.index.json",), ["pytorch_model.bin.index.json"]),
        (("other.safetensors", "consolidated.safetensors"), ["consolidated.safetensors", "other.safetensors"]),
        (("adapter_config.json", "adapter_model.bin"), ["adapter_config.json", "adapter_model.bin"]),
        (("m.gguf", "tf_model.h5", "flax_model.msgpack"), ["flax_model.msgpack", "m.gguf", "tf_model.h5"]),
    ],
)
def test_weights_that_are_not_read_are_named(tmp_path, beside, told):
    folder = files(build("llama", tmp_path / "m"), *beside)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opened = open_checkpoint(folder)
    assert find_other_weights(opened) == told
    assert [warning.category for warning in caught] == [SurgeryWarning] * bool(told)
    if told:
        assert str(caught[0].message).startswith(f"{folder}: only model.safetensors counts here; not read: {told[0]}")


def test_an_index_that_is_not_followed_is_named(tmp_path):
    folder = build("llama", tmp_path / "m", max_shard_size="10KB")
    other = {"weight_map": {"a": "other.safetensors"}}
    (folder / "other.safetensors.index.json").write_text(json.dumps(other))
    with pytest.warns(SurgeryWarning, match=r"not read: other\.safetensors\.index\.json$"):
        opened = open_checkpoint(folder)
    assert opened.index == folder / "model.safetensors.index.json"


def test_each_command_tells_it_once_and_goes_on(tmp_path, monkeypatch, capsys):
    surgery = commands_in(tmp_path, monkeypatch, capsys)
    folder = files(add_tokenizer(build("llama", tmp_path / "m")), "pytorch_model.bin")
    add_tokenizer(build("llama", tmp_path / "b", seed=1))
    for words in (
        ["inspect", "m"],
        ["vector", "extract", "m", "b", "-o", "v", "--allow-unrelated"],
        ["vector", "apply", "v", "m", "-o", "t", "--allow-unrelated"],
    ):
        found = surgery(*words)
        assert found.code == 0, found.err
        assert found.err.count("warning: m: only model.safetensors counts here; not read: pytorch_model.bin") == 1
    assert "weights not read" in surgery("inspect", "m").out
    assert surgery("inspect", "--json", "m").json["not_read"] == ["pytorch_model.bin"]
    assert folder.is_dir() and not (tmp_path / "t" / "pytorch_model.bin").exists()
