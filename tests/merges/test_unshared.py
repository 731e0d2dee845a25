"""Merges of models of which only some have a tensor: what is left out, kept, refused, and what the user says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import build, sibling
from torch import Tensor
from transformers import AutoModelForCausalLM

from merges.run import merge
from surgery.errors import SurgeryError

CONFIG = """\
models: [{{model: {0}}}, {{model: {1}}}]
merge_method: linear
parameters: {{weight: 0.5}}
"""
BASED = """\
models: [{{model: {0}, parameters: {{weight: 0.5}}}}]
base_model: {1}
merge_method: task_arithmetic
"""


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    a = build("llama", tmp_path / "a", dtype=torch.float32)
    return a, sibling(a, tmp_path / "b", seed=1)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def add(folder: Path, more: dict[str, Tensor], **config: object) -> None:
    save_file({**weights(folder), **more}, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def run(text: str, first: Path, second: Path, out: Path, **options: object) -> list[str]:
    """Merge, and return the warnings."""
    path = out.parent / "c.yml"
    path.write_text(text.format(first, second))
    return list(merge(path, out, **options).warnings)  # type: ignore[arg-type]


def mean_of(first: Path, second: Path) -> dict[str, Tensor]:
    a, b = weights(first), weights(second)
    return {name: ((a[name].double() + b[name].double()) / 2).float() for name in a.keys() & b.keys()}


BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8),
    "model.layers.1.self_attn.masked_bias": torch.tensor(-1e9),
}


@pytest.mark.parametrize("swapped", [False, True])
def test_computed_buffers_are_left_out_and_told(swapped: bool, pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    expected = mean_of(a, b)
    add(a, BUFFERS)
    first, second = (b, a) if swapped else (a, b)
    warnings = run(CONFIG, first, second, tmp_path / "out")
    (line,) = [line for line in warnings if "left out" in line]
    assert "2 of" in line and str(a) in line and "inv_freq" in line and "masked_bias" in line
    made = weights(tmp_path / "out")
    assert made.keys() == expected.keys()
    assert all(torch.allclose(made[name], expected[name], rtol=0, atol=1e-6) for name in made)


AHEAD = {"model.layers.2.eh_proj.weight": torch.rand(32, 64), "mtp.fc.weight": torch.rand(32, 64)}


@pytest.mark.parametrize("holder", [0, 1])
def test_what_predicts_further_ahead_is_kept_from_whoever_has_it(
    holder: int, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    expected = {**mean_of(*pair), **AHEAD}
    add(pair[holder], AHEAD)
    (line,) = [line for line in run(CONFIG, *pair, tmp_path / "out") if "kept from" in line]
    assert f"kept from {pair[holder]}" in line and "2 tensor(s)" in line
    made = weights(tmp_path / "out")
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in AHEAD.items())
    assert all(torch.allclose(made[name], expected[name], rtol=0, atol=1e-6) for name in made)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_of_several_holders_it_is_the_bases(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    c = sibling(a, tmp_path / "c", seed=2)
    heads = [{"v_head.summary.weight": torch.full((1, 32), float(i))} for i in range(2)]
    add(b, heads[0])
    add(c, heads[1])
    text = BASED.replace("models: [", "models: [{{model: " + str(b) + ", parameters: {{weight: 0.5}}}}, ")
    run(text, a, c, tmp_path / "out")
    assert torch.equal(weights(tmp_path / "out")["v_head.summary.weight"], heads[1]["v_head.summary.weight"])


def test_a_dtype_holds_for_what_is_kept(pair: tuple[Path, Path], tmp_path: Path) -> None:
    add(pair[1], AHEAD)
    run(CONFIG + "dtype: bfloat16\n", *pair, tmp_path / "out")
    assert torch.equal(weights(tmp_path / "out")["mtp.fc.weight"], AHEAD["mtp.fc.weight"].bfloat16())


def test_drop_leaves_out_what_would_be_kept(pair: tuple[Path, Path], tmp_path: Path) -> None:
    add(pair[0], AHEAD)
    warnings = run(CONFIG, *pair, tmp_path / "out", drop=["mtp.*", "*.eh_proj.*"])
    assert not weights(tmp_path / "out").keys() & AHEAD.keys()
    assert any("left out, as --drop says: 2 tensor(s)" in line for line in warnings)


EXTRA = {"model.layers.0.self_attn.q_norm.weight": torch.rand(8), "model.gate.weight": torch.rand(3)}


def test_learnt_tensors_are_an_error_that_names_both_models(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    add(b, EXTRA)
    with pytest.raises(SurgeryError) as caught:
        run(CONFIG, a, b, tmp_path / "out")
    text = str(caught.value)
    assert all(f'"{name}"' in text for name in EXTRA) and f"in {b} and not in {a}" in text
    assert "--keep GLOB" in text and "--drop GLOB" in text
    assert not list(tmp_path.glob("out*"))


def test_keep_and_drop_decide_and_are_recorded(pair: tuple[Path, Path], tmp_path: Path) -> None:
    add(pair[1], EXTRA)
    warnings = run(CONFIG, *pair, tmp_path / "out", keep=["*q_norm*"], drop=["model.gate.*"])
    made = weights(tmp_path / "out")
    name = "model.layers.0.self_attn.q_norm.weight"
    assert torch.equal(made[name], EXTRA[name]) and "model.gate.weight" not in made
    assert any(f"kept from {pair[1]}, as --keep says: 1 tensor(s) ({name})" in line for line in warnings)
    command = json.loads((tmp_path / "out/surgery.json").read_text())["command"]
    assert command["options"]["keep"] == ["*q_norm*"] and command["options"]["drop"] == ["model.gate.*"]
    assert "--keep '*q_norm*' --drop 'model.gate.*'" in command["line"]


def test_keep_keeps_a_computed_buffer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    add(pair[1], BUFFERS)
    run(CONFIG, *pair, tmp_path / "out", keep=["*inv_freq"])
    made, (name, other) = weights(tmp_path / "out"), BUFFERS
    assert torch.equal(made[name], BUFFERS[name]) and other not in made


@pytest.mark.parametrize("option", ["keep", "drop"])
def test_a_glob_without_a_match_is_an_error(option: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    add(pair[1], EXTRA)
    with pytest.raises(SurgeryError, match=rf"--{option} 'nothing\*': matches none of") as caught:
        run(CONFIG, *pair, tmp_path / "out", **{"keep": ["*q_norm*", "*gate*"], option: ["nothing*"]})
    assert caught.value.exit_code == 2


def test_keep_is_for_tensors_that_only_some_have(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="matches none of 0 tensors that only some models have"):
        run(CONFIG, *pair, tmp_path / "out", keep=["*mlp*"])


def test_dropping_what_all_have_warns(pair: tuple[Path, Path], tmp_path: Path) -> None:
    warnings = run(CONFIG, *pair, tmp_path / "out", drop=["model.layers.1.mlp.*"])
    assert any("3 tensor(s) that all models have" in line and "random values" in line for line in warnings)
    assert len(weights(tmp_path / "out")) == len(weights(pair[0])) - 3


def test_globs_may_match_in_any_document(pair: tuple[Path, Path], tmp_path: Path) -> None:
    add(pair[0], AHEAD)
    text = f"name: half\n{CONFIG}---\nmodels: [{{{{model: half}}}}, {{{{model: {{1}}}}}}]\nmerge_method: linear\n"
    text += "parameters: {{weight: 0.5}}\n"
    run(text, *pair, tmp_path / "out", drop=["mtp.*"], keep=["model.layers.2.*"])
    made = weights(tmp_path / "out")
    assert "mtp.fc.weight" not in made and "model.layers.2.eh_proj.weight" in made


def test_a_vision_tower_is_kept(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tower = {f"visual.blocks.{i}.attn.qkv.weight": torch.rand(12, 4) for i in range(2)}
    tower |= {"visual.merger.mlp.0.weight": torch.rand(32, 4)}
    add(pair[1], tower)
    (line,) = [line for line in run(CONFIG, *pair, tmp_path / "out") if "kept" in line]
    assert f"kept from {pair[1]}" in line and "3 tensor(s)" in line
    assert all(torch.equal(weights(tmp_path / "out")[name], tensor) for name, tensor in tower.items())


def test_a_layer_past_the_configs_last_is_no_layer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A tune lacks it, and neither has `num_nextn_predict_layers`."""
    a, b = pair
    last = {n.replace("layers.1.", "layers.2."): x.clone() for n, x in weights(a).items() if "layers.1." in n}
    add(a, last)
    (line,) = [line for line in run(CONFIG, a, b, tmp_path / "out") if "kept" in line]
    assert f"{len(last)} tensor(s)" in line
    assert all(torch.equal(weights(tmp_path / "out")[name], tensor) for name, tensor in last.items())
