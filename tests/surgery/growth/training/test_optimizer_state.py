"""Promises of growth.training.optimizer_state: a state comes back as it was and where it belongs, or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from surgery.checkpoint.reader import SEGMENT, digest
from surgery.errors import SurgeryError
from surgery.growth.training.optimizer_state import (
    FLUSH_EVERY,
    MOMENTS,
    NUMBERS,
    TENSORS,
    flush_denormals,
    load_state,
    restore,
    save_state,
    snapshot,
)
from surgery.io.hashing import hash_parts
from surgery.models.parameters import parameter_hashes


def write(folder: Path, step: int, *, fingerprint: str = "ours") -> dict[str, torch.Tensor]:
    tensors = {"weight/a": torch.full((3, 2), float(step)), "step/a": torch.tensor(float(step))}
    save_state(folder, step, fingerprint=fingerprint, tensors=tensors, numbers={"losses": [0.1 + 0.2, 1 / 3]})
    return tensors


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_what_was_saved_comes_back_exactly(tmp_path: Path) -> None:
    tensors = write(tmp_path / "deep" / "state", 4)
    state = load_state(tmp_path / "deep" / "state", fingerprint="ours")
    assert state is not None and state.step == 4 and state.numbers == {"losses": [0.1 + 0.2, 1 / 3]}
    assert state.tensors.keys() == tensors.keys()
    assert all(torch.equal(state.tensors[name], tensors[name]) for name in tensors)


def test_a_new_state_takes_the_place_of_the_last(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path / "state", step)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    state = load_state(tmp_path / "state", fingerprint="ours")
    assert state is not None and state.step == 3


def test_without_a_state_there_is_none(tmp_path: Path) -> None:
    assert load_state(tmp_path / "state", fingerprint="ours") is None


def test_a_kill_while_writing_leaves_the_last_state(tmp_path: Path) -> None:
    write(tmp_path / "state", 1)
    half = tmp_path / "state.partial"
    half.mkdir()
    (half / TENSORS).write_bytes(b"half")
    state = load_state(tmp_path / "state", fingerprint="ours")
    assert state is not None and state.step == 1
    write(tmp_path / "state", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_kill_between_the_two_renames_leaves_the_last_state(tmp_path: Path) -> None:
    write(tmp_path / "state", 1)
    (tmp_path / "state").rename(tmp_path / "state.replaced")
    state = load_state(tmp_path / "state", fingerprint="ours")
    assert state is not None and state.step == 1
    write(tmp_path / "state", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("file", [TENSORS, NUMBERS])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_state_is_never_believed(file: str, damage: str, tmp_path: Path) -> None:
    write(tmp_path / "state", 1)
    path = tmp_path / "state" / file
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flipped" else content[:-5])
    with pytest.raises(SurgeryError, match=r"state: the state of training that is kept here is damaged .* Remove the"):
        load_state(tmp_path / "state", fingerprint="ours")


def test_a_number_that_was_changed_is_found(tmp_path: Path) -> None:
    write(tmp_path / "state", 1)
    path = tmp_path / "state" / NUMBERS
    held = json.loads(path.read_text())
    held["state"]["step"] = 2
    path.write_text(json.dumps(held))
    with pytest.raises(SurgeryError, match="does not match its hash"):
        load_state(tmp_path / "state", fingerprint="ours")


def test_the_older_state_stands_in_for_a_damaged_one(tmp_path: Path) -> None:
    write(tmp_path / "state", 1)
    (tmp_path / "state").rename(tmp_path / "state.replaced")
    (tmp_path / "state").mkdir()
    state = load_state(tmp_path / "state", fingerprint="ours")
    assert state is not None and state.step == 1


def test_the_state_of_something_else_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "state", 1, fingerprint="theirs")
    with pytest.raises(SurgeryError, match="that of another stage, model or corpus"):
        load_state(tmp_path / "state", fingerprint="ours")


def test_a_disk_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SurgeryError, match="cannot be written"):
        write(tmp_path / "file" / "state", 1)


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_goes_on_as_if_it_had_not_stopped(fused: bool) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        model[1].bias.requires_grad_(False)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model, torch.optim.AdamW(parameters, lr=0.1, fused=fused)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    step(model, optimizer)
    held = {name: value.clone() for name, value in snapshot(trained(model), optimizer).items()}
    assert len(held) == 3 * 4
    step(model, optimizer)
    other, anew = make()
    restore(trained(other), anew, held)
    step(other, anew)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_moments_never_become_denormal_and_weights_are_as_without_it() -> None:
    smallest = torch.finfo(torch.float32).tiny
    parameters, denormal = [], []
    for cleared in (True, False):
        table = nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3).clone())
        optimizer = torch.optim.AdamW([table], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        seen = False
        for step in range(2000):
            table.grad = torch.zeros(4, 3)
            table.grad[0] = 0.1
            table.grad[1] = 0.1 if step == 0 else 0.0  # then it gets no more
            optimizer.step()
            if cleared and (step + 1) % FLUSH_EVERY == 0:
                flush_denormals(optimizer)
            moments = torch.stack([optimizer.state[table][key] for key in MOMENTS]).abs()
            seen |= bool(((moments > 0) & (moments < smallest)).any())
        parameters.append(table.detach())
        denormal.append(seen)
    assert denormal == [False, True] and torch.equal(*parameters)


def test_hashes_are_those_of_segments() -> None:
    values = torch.arange(SEGMENT + 5, dtype=torch.float32)
    expected = hash_parts([digest(values[:SEGMENT].clone()), digest(values[SEGMENT:].clone())])
    assert parameter_hashes({"x": values.view(-1, 1)}) == {"x": expected}
    assert parameter_hashes({"x": values.view(-1, 1).T.contiguous().T}) == {"x": expected}


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
@pytest.mark.parametrize("file", [TENSORS, NUMBERS])
def test_what_is_no_file_of_the_state_is_damage_and_is_not_waited_for(file: str, kind: str, tmp_path: Path) -> None:
    write(tmp_path / "state", 1)
    path = tmp_path / "state" / file
    path.rename(tmp_path / "outside")
    if kind == "link":
        path.symlink_to(tmp_path / "outside")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(
        SurgeryError, match=rf"state: the state of training that is kept here is damaged .*{file}: is a"
    ):
        load_state(tmp_path / "state", fingerprint="ours")
