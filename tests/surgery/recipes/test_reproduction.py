"""Outputs made again from their manifests: vectors, merges, edits, deepened models; and what stands against it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import add_tokenizer, build, sibling
from support.cli import Surgery, commands_in
from support.hub_server import HubServer

from cli.commands.reproduce import reproduce
from surgery.errors import SurgeryError
from surgery.recipes.reproduction import Reproduction

Again = Callable[[str], Reproduction]

COMMANDS = {
    "vector": ("vector", "extract", "a", "base"),
    "moved": ("vector", "transfer", "a", "base", "b", "--scale", "0.5", "--exclude", "*.norm.*"),
    "mean": ("merge", "linear", "a", "b", "--weight", "0.3"),
    "drawn": ("merge", "dare_ties", "a", "b", "--base", "base", "--weight", "0.5", "--density", "0.5", "--seed", "3"),
    "without": ("vector", "transfer", "a", "base", "b", "--drop", "*.layers.1.mlp.*"),
    "dropped": ("merge", "deep/down/merge.yml", "--drop", "*.layers.1.mlp.*", "--drop", "*q_proj*"),
    "configured": ("merge", "deep/down/merge.yml"),
    "both": ("merge", "logits", "a", "b"),
    "edited": ("edit", "heads", "a", "--head", "L0H1", "--no-measure"),
    "deeper": ("grow", "add", "a", "--init", "random", "--seed", "2"),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    base = add_tokenizer(build("llama", folder / "base", dtype=torch.float32))
    for seed, name in enumerate("ab", start=1):
        sibling(base, folder / name, seed=seed)
    (folder / "deep/down").mkdir(parents=True)
    (folder / "deep/down/merge.yml").write_text(
        "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.25}\n"
    )
    return folder


@pytest.fixture
def surgery(bench: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Surgery:
    return commands_in(bench, monkeypatch, capsys)


@pytest.fixture
def again(surgery: Surgery, tmp_path: Path) -> Again:
    """Reproduces an output; its commands run in this process."""

    def run(ref: str) -> Reproduction:
        return reproduce(ref, run=lambda words: surgery(*words, "--threads", "1").code, scratch=tmp_path)

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_what_was_made_is_made_again(bench: Path, surgery: Surgery, again: Again, tmp_path: Path, name: str) -> None:
    made = surgery(*COMMANDS[name], "-o", name, "--threads", "1")
    assert made.code == 0, made.err
    (bench / "deep/down/merge.yml").touch()  # a config may be gone: the manifest has it
    found = again(name)
    assert found.same and found.tensors > 5 and not found.inputs and not found.versions
    assert not list(tmp_path.iterdir())


def test_the_config_of_a_merge_need_not_be_there(bench: Path, surgery: Surgery, again: Again) -> None:
    assert surgery(*COMMANDS["configured"], "-o", "kept", "--threads", "1").code == 0
    (bench / "deep/down/merge.yml").rename(bench / "deep/down/gone.yml")
    try:
        assert again("kept").same
    finally:
        (bench / "deep/down/gone.yml").rename(bench / "deep/down/merge.yml")


def test_another_input_is_said(bench: Path, surgery: Surgery, again: Again) -> None:
    shutil.copytree(bench / "b", bench / "changing")
    assert surgery("merge", "linear", "a", "changing", "--weight", "0.5", "-o", "drifted", "--threads", "1").code == 0
    tensors = load_file(bench / "changing/model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, bench / "changing/model.safetensors", metadata={"format": "pt"})
    found = again("drifted")
    assert not found.same and found.different == ("model.norm.weight",)
    assert found.inputs == ("changing",) or len(found.inputs) == 1
    assert "NOT the same" in found.table().title


def test_an_input_may_be_called_as_the_output_is_in_recorded_lines(bench: Path, surgery: Surgery, again: Again) -> None:
    shutil.copytree(bench / "a", bench / "OUT")
    assert surgery("merge", "linear", "OUT", "b", "--weight", "0.5", "-o", "named", "--threads", "1").code == 0
    assert again("named").same


def test_the_command_says_yes_or_no(bench: Path, surgery: Surgery) -> None:
    # A folder that is called as our own package is must not be run in its place.
    (bench / "cli").mkdir()
    (bench / "cli/main.py").write_text("raise SystemExit(9)")
    if not (bench / "mean").exists():
        assert surgery(*COMMANDS["mean"], "-o", "mean", "--threads", "1").code == 0
    said = surgery("reproduce", "mean", "--json")
    assert said.code == 0 and said.json["same"] and said.json["line"].startswith("surgery merge linear a b")
    manifest = json.loads((bench / "mean/surgery.json").read_text())
    name = next(iter(manifest["tensors"]))
    manifest["tensors"][name]["xxh3"] = "0" * 32
    shutil.copytree(bench / "mean", bench / "forged")
    (bench / "forged/surgery.json").write_text(json.dumps(manifest))
    said = surgery("reproduce", "forged")
    assert said.code == 1 and "NOT the same" in said.out


def test_a_repository_is_made_again_from_pinned_inputs(
    bench: Path, again: Again, server: HubServer, monkeypatch: pytest.MonkeyPatch, surgery: Surgery
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    server.add("org/b", bench / "b")
    assert surgery("merge", "linear", "a", "org/b", "--weight", "0.5", "-o", "mixed", "--threads", "1").code == 0
    server.add("org/mixed", bench / "mixed")
    found = again("org/mixed")
    assert found.same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"command": {"line": "rm -rf / -o OUT"}}, "its command cannot be run again: rm"),
        ({"command": {"line": "surgery push a org/b -o OUT"}}, "cannot be run again"),
        ({"command": {"line": "surgery merge 'a -o OUT"}}, "its command cannot be read"),
        ({"command": {"line": "surgery inspect a"}}, "cannot be run again"),
        ({"command": {"line": "surgery merge linear a b -o OUT -o /else"}}, "cannot be run again"),
        ({"command": {"line": "surgery merge linear a b -o OUT --out=/else --overwrite"}}, "cannot be run again"),
        ({"command": {"line": "surgery merge linear a b -o OUT --plot /else"}}, "cannot be run again"),
        ({"command": {"line": "surgery merge linear a OUT"}}, "cannot be run again"),
        ({"command": {"line": "surgery lab build -o OUT"}}, "cannot be run again"),
        ({"command": {"line": "surgery merge linear a b -o OUT", "inside": "../b"}}, "outside of what its command"),
        ({"command": {}}, "names no tensors, or no command"),
        ({"tensors": {}}, "names no tensors, or no command"),
        ({"command": {"line": "surgery merge linear a gone -o OUT"}}, "its models gone is not here"),
        ({"command": {"line": "surgery merge linear a lab:none -o OUT"}}, "is not here .*none"),
        ({"command": {"line": "surgery merge linear a b --seed none -o OUT"}}, "seed: got 'none', expected a whole"),
        ({"command": {"line": "surgery merge liner a b -o OUT"}}, "its what liner is not here .*did you mean linear"),
        ({"command": {"line": "surgery merge linear -o OUT"}}, "its command failed with exit code 2"),
    ],
)
def test_what_cannot_be_made_again_is_said(
    bench: Path, again: Again, tmp_path_factory: pytest.TempPathFactory, change: dict[str, object], message: str
) -> None:
    folder = tmp_path_factory.mktemp("wrong")
    tensors = {"x": {"dtype": "F32", "shape": [1], "xxh3": "0"}}
    manifest = {"schema": 1, "kind": "model", "tensors": tensors, "command": {"line": "surgery x -o OUT"}}
    (folder / "surgery.json").write_text(json.dumps(manifest | change))
    with pytest.raises(SurgeryError, match=message):
        again(str(folder))


def test_what_is_not_there_is_said(again: Again) -> None:
    with pytest.raises(SurgeryError, match="no such folder, and not a Hub id"):
        again("nothing")
