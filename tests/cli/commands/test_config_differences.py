"""What commands say of models whose tensors fit each other, and whose configs mean something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.architectures import add_tokenizer, build, sibling
from support.cli import run_command

Said = Callable[..., str]

# Family, keys of the base, keys of the tuned model, and the key that is told.
CASES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("llama", {"rope_theta": 10_000.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta"),
    ("llama", {}, {"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling"),
    ("gemma2", {}, {"query_pre_attn_scalar": 128}, "query_pre_attn_scalar"),
    ("gemma2", {}, {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
    ("gemma2", {}, {"final_logit_softcapping": 25.0}, "final_logit_softcapping"),
    ("mistral", {"sliding_window": None}, {"sliding_window": 32}, "sliding_window"),
    ("gemma2", {}, {"layer_types": ["full_attention", "full_attention"]}, "layer_types"),
    ("granite", {}, {"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ("granite", {}, {"residual_multiplier": 0.22}, "residual_multiplier"),
    ("granite", {}, {"attention_multiplier": 0.015625}, "attention_multiplier"),
    ("granite", {}, {"logits_scaling": 8.0}, "logits_scaling"),
    ("qwen3_moe", {}, {"num_experts_per_tok": 4}, "num_experts_per_tok"),
    ("qwen3_moe", {}, {"norm_topk_prob": True}, "norm_topk_prob"),
    ("llama", {}, {"max_position_embeddings": 131072}, "max_position_embeddings"),
    ("llama", {}, {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {}, {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
    ("llama", {"tie_word_embeddings": False}, {"tie_word_embeddings": True}, "tie_word_embeddings"),
]
SAME: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"rope_theta": 500000}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ("llama", {"torch_dtype": "float32", "rope_scaling": None}, {"dtype": "bfloat16", "use_cache": False}),
    ("gemma2", {}, {"layer_types": ["sliding_attention", "full_attention"], "hidden_activation": "gelu_pytorch_tanh"}),
]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and its child `tuned`, for tests to copy."""
    folder = tmp_path_factory.mktemp("family")
    add_tokenizer(build("llama", folder / "base"))
    sibling(folder / "base", folder / "tuned", seed=1)
    return folder


@pytest.fixture
def said(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[Said, Path]:
    """What a command says of copies of the two models."""
    for name in ("base", "tuned"):
        shutil.copytree(family / name, tmp_path / name)

    def run(*words: object) -> str:
        capsys.readouterr()
        assert run_command(monkeypatch, *words) == 0
        return capsys.readouterr().err

    return run, tmp_path


def set_config(folder: Path, family: str, keys: dict[str, Any], *, inside: bool) -> None:
    path = folder / "config.json"
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    whole = json.loads(path.read_text())
    config = (
        {key: whole[key] for key in sizes} | {"head_dim": 8, "model_type": family, "tie_word_embeddings": False} | keys
    )
    if inside:
        config = {"model_type": "llava", "text_config": config, "tie_word_embeddings": config["tie_word_embeddings"]}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(("model_type", "ours", "theirs", "key"), CASES)
def test_a_transfer_tells_what_differs(
    model_type: str, ours: dict[str, Any], theirs: dict[str, Any], key: str, inside: bool, said: tuple[Said, Path]
) -> None:
    run, folder = said
    set_config(folder / "base", model_type, ours, inside=inside)
    set_config(folder / "tuned", model_type, theirs, inside=inside)
    base, tuned = folder / "base", folder / "tuned"
    text = run("vector", "transfer", tuned, base, base, "-o", folder / "out", "--dry-run")
    (line,) = [line for line in text.splitlines() if line.lstrip().removeprefix("warning").lstrip().startswith(key)]
    assert f"in {base}" in line and f"in {tuned}" in line and f"as {base} has it" in line


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(("model_type", "ours", "theirs"), SAME)
def test_spellings_of_one_value_are_not_told(
    model_type: str, ours: dict[str, Any], theirs: dict[str, Any], inside: bool, said: tuple[Said, Path]
) -> None:
    run, folder = said
    set_config(folder / "base", model_type, ours, inside=inside)
    set_config(folder / "tuned", model_type, theirs, inside=inside)
    base, tuned = folder / "base", folder / "tuned"
    assert "differs (" not in run("vector", "transfer", tuned, base, base, "-o", folder / "out", "--dry-run")
    assert "differs (" not in run("merge", "linear", tuned, base, "--weight", "1", "-o", folder / "merged", "--dry-run")


def test_every_command_on_several_models_tells_it(said: tuple[Said, Path]) -> None:
    run, folder = said
    base, tuned, out = folder / "base", folder / "tuned", folder / "out"
    set_config(base, "llama", {"rope_theta": 10_000.0}, inside=False)
    set_config(tuned, "llama", {"rope_theta": 500_000.0}, inside=False)
    before = (base / "config.json").read_bytes()
    vector, other = folder / "vector", folder / "other"
    assert f"rope_theta differs (changes positions): 500,000 in {tuned}; 10,000 in {base}" in run(
        "vector", "extract", tuned, base, "-o", vector
    )
    told = f"rope_theta differs (changes positions): 10,000 in {base}; 500,000 in {vector}. OUT gets 10,000"
    assert told in run("vector", "apply", vector, base, "-o", out)
    # OUT has the config of the reference, byte by byte.
    assert (out / "config.json").read_bytes() == before
    assert "rope_theta differs" in run("merge", "linear", base, tuned, "--weight", "1", "-o", folder / "merged")
    assert json.loads((folder / "merged" / "config.json").read_text())["rope_theta"] == 10_000.0
    assert f"rope_theta differs (changes positions): 10,000 in {base}; 500,000 in {tuned}" in run("diff", base, tuned)
    set_config(tuned, "llama", {"rope_theta": 10_000.0}, inside=False)
    run("vector", "extract", tuned, base, "-o", other)
    assert f"500,000 in {vector}; 10,000 in {other}" in run("vector", "compare", vector, other)


def test_a_merge_tells_each_key_once(said: tuple[Said, Path]) -> None:
    run, folder = said
    shutil.copytree(folder / "tuned", folder / "third")
    for name, eps in (("base", 1e-5), ("tuned", 1e-6), ("third", 1e-6)):
        set_config(folder / name, "llama", {"rms_norm_eps": eps}, inside=False)
    models = [folder / name for name in ("tuned", "third")]
    text = run(
        "merge",
        "task_arithmetic",
        *models,
        "--base",
        folder / "base",
        "--weight",
        "1",
        "-o",
        folder / "out",
        "--dry-run",
    )
    assert text.count("rms_norm_eps") == 1
    assert f"1e-05 in {folder / 'base'}; 1e-06 in {models[0]}, {models[1]}. OUT gets 1e-05" in text
