"""`--dequantise`: commands on quantised models write what they write for the same weights in bf16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import quantised as q
from support.architectures import add_tokenizer, build, sibling
from support.cli import Surgery, commands_in
from support.quantised import mxfp4, plain_twin, quantised, reconfigure
from torch import Tensor

from cli.commands.reproduce import reproduce
from surgery.checkpoint.resolve import open_checkpoint
from surgery.vectors.task_vector import open_vector


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fp8` and `moe` are quantised, `fp8-plain` and `moe-plain` what they are; `a`, `b`, `moe-a` are siblings."""
    folder = tmp_path_factory.mktemp("models")
    fp8 = quantised(folder / "fp8", q.modelopt)
    add_tokenizer(fp8)
    (fp8 / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    plain = plain_twin(fp8, folder / "fp8-plain")
    for seed, name in enumerate("ab", start=1):
        sibling(plain, folder / name, seed=seed)
    moe = mxfp4(folder / "moe", quantization_config={"quant_method": "mxfp4"})
    sibling(plain_twin(moe, folder / "moe-plain"), folder / "moe-a", seed=1)
    return folder


@pytest.fixture
def surgery(models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Surgery:
    return commands_in(models, monkeypatch, capsys)


def weights(folder: Path) -> Mapping[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


COMMANDS = {
    "extract": ("vector", "extract", "a", "{}"),
    "extract-tuned": ("vector", "extract", "{}", "a"),
    "adapter": ("vector", "extract", "a", "{}", "--rank", "2"),
    "transfer": ("vector", "transfer", "a", "b", "{}"),
    "transfer-half": ("vector", "transfer", "a", "{}", "b", "--scale", "0.5", "--dtype", "float32"),
    "linear": ("merge", "linear", "{}", "a", "--weight", "0.3"),
    "ties": ("merge", "ties", "a", "b", "--base", "{}", "--weight", "0.5", "--density", "0.5"),
    "alone": ("merge", "passthrough", "{}"),
}
MOE = {
    "extract": ("vector", "extract", "moe-a", "{}"),
    "transfer": ("vector", "transfer", "moe-a", "{}", "{}"),
    "slerp": ("merge", "slerp", "moe-a", "--base", "{}", "--t", "0.4"),
    "alone": ("merge", "passthrough", "{}"),
}


@pytest.mark.parametrize(
    ("model", "words"),
    [*(("fp8", words) for words in COMMANDS.values()), *(("moe", words) for words in MOE.values())],
    ids=[*COMMANDS, *(f"moe-{name}" for name in MOE)],
)
def test_outputs_are_those_of_the_weights(
    model: str, words: tuple[str, ...], surgery: Surgery, tmp_path: Path, models: Path
) -> None:
    refused = surgery(*(word.format(model) for word in words), "-o", tmp_path / "refused")
    assert refused.code == 1
    assert f"{model} is quantised (" in refused.err
    assert "--dequantise" in refused.err
    assert not (tmp_path / "refused").exists()

    done = surgery(*(word.format(model) for word in words), "--dequantise", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert f"dequantised {model}" in done.out + done.err
    plain = surgery(*(word.format(f"{model}-plain") for word in words), "-o", tmp_path / "plain")
    assert plain.code == 0, plain.err

    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "plain")
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert values.dtype == ours[name].dtype
        assert torch.equal(ours[name], values), name
    assert not list((tmp_path / "out").rglob("hf_quant_config.json"))
    for config in (tmp_path / "out").rglob("config.json"):
        assert "quantization_config" not in json.loads(config.read_text())
    command = json.loads((tmp_path / "out/surgery.json").read_text())["command"]
    assert "--dequantise" in command["line"].split()
    assert command["options"]["dequantise"] is True
    assert "dequantise" not in json.loads((tmp_path / "plain/surgery.json").read_text())["command"]["options"]


def test_a_vector_is_added_to_a_quantised_target(surgery: Surgery, tmp_path: Path, models: Path) -> None:
    assert surgery("vector", "extract", "a", "fp8", "--dequantise", "-o", tmp_path / "v").code == 0
    assert open_vector(tmp_path / "v").checkpoint.config
    assert surgery("vector", "apply", tmp_path / "v", "fp8", "-o", tmp_path / "out").code == 1
    done = surgery("vector", "apply", tmp_path / "v", "fp8", "--dequantise", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    tuned, restored = weights(models / "a"), weights(tmp_path / "out")
    assert tuned.keys() == restored.keys()
    assert all(torch.equal(restored[name], values) for name, values in tuned.items())
    assert open_checkpoint(tmp_path / "out").side_files.keys() == open_checkpoint(models / "a").side_files.keys()


def test_models_are_compared_by_their_weights(surgery: Surgery) -> None:
    same = surgery("diff", "fp8", "fp8-plain", "--dequantise", "--json")
    assert same.code == 0, same.err
    assert (same.json["whole"]["changed"], same.json["only_a"]) == (0, [])
    codes = surgery("diff", "fp8", "fp8-plain", "--json")
    assert "codes are compared, not weights" in codes.err
    assert codes.json["whole"]["changed"] > 0


def test_configs_are_merged_likewise(surgery: Surgery, tmp_path: Path) -> None:
    text = "merge_method: linear\nmodels: [{model: fp8, parameters: {weight: 0.3}}, {model: a}]\n"
    text += "parameters: {weight: 0.7}\n"
    (tmp_path / "c.yml").write_text(text)
    (tmp_path / "plain.yml").write_text(text.replace("fp8", "fp8-plain"))
    assert surgery("merge", tmp_path / "c.yml", "-o", tmp_path / "out").code == 1
    assert surgery("merge", tmp_path / "c.yml", "--dequantise", "-o", tmp_path / "out").code == 0
    assert surgery("merge", tmp_path / "plain.yml", "-o", tmp_path / "plain").code == 0
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "plain")
    assert all(torch.equal(ours[name], values) for name, values in theirs.items())


@pytest.mark.parametrize("words", [COMMANDS["transfer"], COMMANDS["linear"]])
def test_outputs_are_made_again(words: tuple[str, ...], surgery: Surgery, tmp_path: Path) -> None:
    assert surgery(*(word.format("fp8") for word in words), "--dequantise", "-o", tmp_path / "out").code == 0
    run = lambda line: surgery(*line, "--threads", "1").code  # noqa: E731
    assert reproduce(str(tmp_path / "out"), run=run, scratch=tmp_path).same


def test_what_cannot_be_read_is_refused_with_the_option_too(surgery: Surgery, tmp_path: Path) -> None:
    model = quantised(tmp_path / "gptq", q.gptq)
    done = surgery("vector", "transfer", "a", "b", model, "--dequantise", "-o", tmp_path / "out")
    assert done.code == 1
    assert "is quantised (GPTQ)" in done.err
    assert "Use the unquantised model" in done.err
    assert "--dequantise" not in done.err


def test_commands_without_the_option_say_how_to_go_on(surgery: Surgery, tmp_path: Path) -> None:
    done = surgery("edit", "heads", "fp8", "--head", "L0H1", "--no-measure", "-o", tmp_path / "out")
    assert done.code == 1
    assert "surgery merge passthrough fp8 --dequantise -o OUT" in " ".join(done.err.split())


def test_shards_stay_as_they_are(surgery: Surgery, tmp_path: Path, models: Path) -> None:
    model = shutil.copytree(models / "moe", tmp_path / "moe")
    tensors = dict(weights(model))
    (model / "model.safetensors").unlink()
    names = {name: f"part-{'experts' in name:d}.safetensors" for name in tensors}
    for file in set(names.values()):
        save_file({name: t for name, t in tensors.items() if names[name] == file}, model / file, {"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    done = surgery("vector", "transfer", "moe-a", "moe-plain", model, "--dequantise", "-o", tmp_path / "out")

    assert done.code == 0, done.err
    assert surgery("vector", "transfer", "moe-a", "moe-plain", "moe-plain", "-o", tmp_path / "plain").code == 0
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert index == {name: f"part-{'experts' in name:d}.safetensors" for name in index}
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "plain")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], values) for name, values in theirs.items())


def test_settings_beside_plain_weights_are_dropped(surgery: Surgery, tmp_path: Path) -> None:
    model = reconfigure(build("llama", tmp_path / "plain"), quantization_config={"quant_method": "fp8"})
    assert surgery("merge", "passthrough", model, "--dequantise", "-o", tmp_path / "out").code == 0
    assert weights(tmp_path / "out").keys() == weights(model).keys()
