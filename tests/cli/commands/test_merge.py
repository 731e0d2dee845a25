"""`surgery merge` as people type it: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.architectures import add_tokenizer, build, sibling
from support.cli import run_command

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and its children `a` and `b`."""
    folder = tmp_path_factory.mktemp("family")
    base = add_tokenizer(build("llama", folder / "base", dtype=torch.float32))
    for seed, name in enumerate("ab", start=1):
        sibling(base, folder / name, seed=seed)
    return folder


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: Path, code: int, *words: object
) -> str:
    """What a refused command says; it must have written nothing."""
    assert run_command(monkeypatch, *words, "-o", out) == code
    assert not out.exists() and not out.with_name(out.name + ".partial").exists()
    return capsys.readouterr().err


def test_a_method_by_name_prints_the_models_shares(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["merge", "ties", family / "a", family / "b", "--base", family / "base", "--weight", "0.5"]
    assert run_command(monkeypatch, *words, "--weight", "[0, 1]", "--density", "0.4", "-o", out) == 0
    printed = capsys.readouterr()
    assert "What went into the merge" in printed.out and "39.9 %" in printed.out
    assert f"Wrote {out}" in printed.err
    assert (out / "README.md").read_text().count("ties") > 1


def test_one_json_object_and_a_picture(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, out = tmp_path / "far.png", tmp_path / "out"
    words = ["merge", "slerp", family / "a", "--base", family / "base", "--t", "[0, 0.5, 1]", "-o", out]
    assert run_command(monkeypatch, *words, "--plot", picture, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["method"] == "slerp" and len(report["models"]) == 1
    assert picture.read_bytes().startswith(PNG)


def test_a_config_is_merged_wherever_the_options_stand(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "linear.yml"
    models = [{"model": str(family / name), "parameters": {"weight": 1.0}} for name in "ab"]
    config.write_text(yaml.dump({"merge_method": "linear", "models": models}))
    assert run_command(monkeypatch, "merge", config, "-o", tmp_path / "one") == 0
    assert run_command(monkeypatch, "merge", "-o", tmp_path / "two", config) == 0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    a, b = (load_file(family / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.double(), (a[name].double() + b[name].double()) / 2, rtol=1e-6, atol=1e-7)


def test_a_dry_run_writes_nothing(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["merge", "linear", family / "a", family / "b", "--weight", "1", "--dry-run", "-o", tmp_path / "out"]
    assert run_command(monkeypatch, *words) == 0
    assert list(tmp_path.iterdir()) == []


def test_every_method_is_listed_with_its_parameters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "merge", "methods") == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("breadcrumbs_ties", "epsilon*=0.15", "arXiv:2306.01708", "required"))


def test_methods_as_json_and_help_behind_a_method(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "merge", "methods", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["ties"]["base"] == "required" and listed["slerp"]["models"] == [1, 1]
    assert run_command(monkeypatch, "merge", "ties", "--help") == 0
    assert "--density" in capsys.readouterr().out


def test_what_is_typed_comes_back_in_the_card_without_what_changes_no_byte(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(family)
    words = ["merge", "linear", "a", "b", "--weight", "-0.5", "--weight", "[1, 2]", "--no-normalize", "--seed", "3"]
    for threads in (1, 2):
        assert run_command(monkeypatch, *words, "--threads", threads, "-o", tmp_path / str(threads)) == 0
    one, two = ((tmp_path / str(n) / "README.md").read_text() for n in (1, 2))
    assert one == two
    assert "surgery merge linear a b --seed 3 --weight -0.5 --weight '[1, 2]' --no-normalize -o OUT\n" in one


def test_nothing_may_stand_beside_a_config_that_says_it_itself(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yml"
    config.write_text(f"merge_method: passthrough\nmodels: [{{model: {family / 'a'}}}]\n")
    words = ["merge", config, family / "b", "--weight", "1", "--seed", "3"]
    said = refused(monkeypatch, capsys, tmp_path / "out", 2, *words)
    assert f"a config says all of this itself: {family / 'b'}, --weight, --seed. Edit the config." in said
    picture = tmp_path / "far.png"
    assert run_command(monkeypatch, "merge", config, "--plot", picture, "-o", tmp_path / "out") == 0
    assert "No picture: every tensor is a copy" in capsys.readouterr().err and not picture.exists()


def test_faults_of_a_config_name_key_and_line(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "bad.yml"
    config.write_text(
        f"merge_method: ties\nbase_model: {family / 'base'}\nmodels:\n- model: {family / 'a'}\n"
        "  parameters:\n    weight: 1\n    densty: 0.5\n    density: 1.5\ndtypo: float32\n"
    )
    said = refused(monkeypatch, capsys, tmp_path / "out", 2, "merge", config)
    assert "bad.yml:7: models[0].parameters.densty: unknown key" in said and '"density"' in said
    assert "bad.yml:8: models[0].parameters.density: got 1.5, expected a number in [0, 1]" in said
    assert "bad.yml:9: dtypo: unknown key" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ties", "A", "B", "--weight", "1"], "ties needs a base model"),
        (["linear", "A", "B", "--weight", "1", "--weight", "2", "--weight", "3"], "got 3 values for 2 models"),
        (["tise", "A", "--weight", "1"], "ties"),
        (["linear", "A", "B", "--weight", "2001-99-99"], "--weight"),
        (["linear", "A", "B", "--weight", "&a [*a]"], "--weight"),
        (["linear", "A", "B"], "--weight: linear needs a number, and none is given"),
    ],
)
def test_a_wrong_command_is_refused_by_the_name_of_its_option(
    words: list[str],
    said: str,
    family: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [str(family / word.lower()) if word in ("A", "B") else word for word in words]
    assert said in refused(monkeypatch, capsys, tmp_path / "out", 2, "merge", *filled)


def test_nan_in_a_source_is_found_before_anything_is_written(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ill = sibling(family / "a", tmp_path / "ill", seed=9)
    tensors = load_file(ill / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, ill / "model.safetensors", metadata={"format": "pt"})
    words = ["merge", "linear", family / "b", ill, "--weight", "1"]
    said = refused(monkeypatch, capsys, tmp_path / "out", 1, *words)
    assert f'NaN or infinite values: 1 in "model.norm.weight" of {ill}' in said
    assert run_command(monkeypatch, *words, "--allow-nonfinite", "-o", tmp_path / "out") == 0


def test_weights_that_sum_to_zero_are_refused(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", "linear", family / "a", family / "b", "--weight", "1", "--weight", "-1"]
    assert "sum to zero" in refused(monkeypatch, capsys, tmp_path / "out", 1, *words)


def test_different_vocabularies_name_the_option(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = sibling(family / "a", tmp_path / "other", seed=4)
    add_tokenizer(other, [f"w{i}" for i in reversed(range(4, 96))])
    words = ["merge", "linear", family / "b", other, "--weight", "1"]
    said = refused(monkeypatch, capsys, tmp_path / "out", 1, *words)
    assert "vocabularies" in said and "tokenizer_source" in said
    assert run_command(monkeypatch, *words, "--tokenizer-source", "union", "-o", tmp_path / "out") == 0
