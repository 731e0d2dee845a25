"""Linear probes score any states, and their file is read back or rejected."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.linear_probes import make_data

from probes.refusal.linear.probes import Probes
from surgery.errors import SurgeryError


def test_scores_take_any_leading_shape_and_dtype() -> None:
    given = make_data()
    probes = given.train(shuffles=0)
    grid = given.states.reshape(6, 10, 3, 20)
    assert torch.equal(probes.scores(grid).reshape(60, 3), probes.scores(given.states))
    half = given.states.bfloat16()
    assert probes.scores(half).dtype == torch.float32
    assert torch.equal(probes.scores(half), probes.scores(half.double()))


def test_saved_probes_are_the_same_when_loaded(tmp_path: Path) -> None:
    probes = dataclasses.replace(make_data().train(shuffles=1), about={"model": "org/m", "layers": [0, 1, 2]})
    path = probes.save(tmp_path / "run" / "probes.safetensors")
    loaded = Probes.load(path)
    for name in ("weights", "biases", "out_of_fold", "fold"):
        assert torch.equal(getattr(loaded, name), getattr(probes, name))
    for name in ("metrics", "folds", "counts", "C", "seed", "notes", "about"):
        assert getattr(loaded, name) == getattr(probes, name)
    before = path.read_bytes()
    assert loaded.save(path).read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["probes.safetensors"]
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["probes"])["schema"] == 1


def test_files_that_are_no_probes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(SurgeryError, match=r"p\.safetensors: cannot be read"):
        Probes.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(SurgeryError, match=r"p\.safetensors: the header claims"):
        Probes.load(path)
    save_file({"weights": torch.zeros(2, 3)}, path)
    with pytest.raises(SurgeryError, match="is not a file of refusal probes"):
        Probes.load(path)
    save_file({"weights": torch.zeros(2, 3)}, path, {"probes": '{"schema": 2}'})
    with pytest.raises(SurgeryError, match="holds probes of schema 2, expected 1"):
        Probes.load(path)
    save_file({"weights": torch.zeros(2, 3)}, path, {"probes": '{"schema": 1, "metrics": []}'})
    with pytest.raises(SurgeryError, match='lacks "biases"'):
        Probes.load(path)
    probes = make_data(20, 4).train(shuffles=0)
    dataclasses.replace(probes, metrics=probes.metrics[1:]).save(path)
    with pytest.raises(SurgeryError, match="weights, biases and metrics are not of the same layers"):
        Probes.load(path)
    with pytest.raises(SurgeryError, match="cannot be written"):
        probes.save(path / "below.safetensors")
