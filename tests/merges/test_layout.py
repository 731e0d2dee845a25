"""Which tensors meet: by name inside a layer, by full name outside; and every one that finds no partner."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from merges.config.parse import parse_configs
from merges.layout import Layout, lay_out
from merges.methods.registry import METHODS
from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.preflight import Preflight
from surgery.engine.unshared import HINT

SPECS = {name: method.spec for name, method in METHODS.items()}
ENDS = {"model.embed_tokens.weight": (9, 4), "model.norm.weight": (4,), "lm_head.weight": (9, 4)}
PARTS = {"self_attn.q_proj.weight": (4, 4), "self_attn.o_proj.weight": (4, 4), "mlp.up_proj.weight": (6, 4)}
LAYERED = """\
merge_method: passthrough
slices:
- sources: [{model: A, layer_range: [0, 2]}]
- sources: [{model: B, layer_range: [2, 3]}]
"""
LINEAR = "merge_method: linear\nmodels: [{model: A}, {model: B}]\nparameters: {weight: 1}\n"


def shapes(n_layers: int, stack: str = "model.layers") -> dict[str, Sequence[int]]:
    return {**ENDS, **{f"{stack}.{i}.{part}": shape for i in range(n_layers) for part, shape in PARTS.items()}}


def write(folder: Path, tensors: Mapping[str, Sequence[int]], **config: object) -> None:
    folder.mkdir()
    save_file({name: torch.zeros(*shape) for name, shape in tensors.items()}, folder / "model.safetensors")
    numbers = {"model_type": "llama", "vocab_size": 9, "hidden_size": 4, "num_attention_heads": 2, **config}
    (folder / "config.json").write_text(json.dumps(numbers))


def laid_out(folder: Path, text: str) -> tuple[Layout, list[str]]:
    """The layout, and the faults; models are the folder's subfolders."""
    for name in "AB":
        text = text.replace(f"model: {name}", f"model: {folder / name}")
    (config,) = parse_configs(text, "c.yml", methods=SPECS)
    preflight = Preflight()
    layout = lay_out(preflight, config, {ref: open_checkpoint(ref) for ref in config.models})
    return layout, [fault.replace(f"{folder}/", "") for fault in preflight.errors]


def test_layers_are_renumbered_and_the_ends_come_from_the_outer_sections(tmp_path: Path) -> None:
    for name in "AB":
        write(tmp_path / name, shapes(3), num_hidden_layers=3)
    layout, faults = laid_out(tmp_path, LAYERED)
    assert not faults and layout.layers == (0, 1, 2)
    origin = {slot.name: (slot.inputs[0].file.parent.name, slot.inputs[0].name, slot.group) for slot in layout.slots}
    assert origin["model.embed_tokens.weight"] == ("A", "model.embed_tokens.weight", "embed")
    assert origin["model.layers.1.mlp.up_proj.weight"] == ("A", "model.layers.1.mlp.up_proj.weight", "layer 1")
    assert origin["model.layers.2.mlp.up_proj.weight"] == ("B", "model.layers.2.mlp.up_proj.weight", "layer 2")
    assert origin["model.norm.weight"] == ("B", "model.norm.weight", "final norm")
    assert origin["lm_head.weight"] == ("B", "lm_head.weight", "lm_head")
    groups = list(dict.fromkeys(slot.group for slot in layout.slots))
    assert groups == ["embed", "layer 0", "layer 1", "layer 2", "final norm", "lm_head"]


def test_each_section_has_its_own_depth(tmp_path: Path) -> None:
    for name in "AB":
        write(tmp_path / name, shapes(3), num_hidden_layers=3)
    layout, _ = laid_out(tmp_path, LAYERED)
    depths = {slot.group: slot.t for slot in layout.slots}
    assert depths == {"embed": 0, "layer 0": 0, "layer 1": 1, "layer 2": 1, "final norm": 0, "lm_head": 0}


def test_rows_of_tokens_are_known_wherever_they_are(tmp_path: Path) -> None:
    for name in "AB":
        write(tmp_path / name, shapes(2), num_hidden_layers=2)
    layout, _ = laid_out(tmp_path, LINEAR)
    assert [slot.name for slot in layout.slots if slot.per_token] == ["model.embed_tokens.weight", "lm_head.weight"]


def test_layers_that_predict_further_ahead_stay_behind_the_last(tmp_path: Path) -> None:
    ahead = {"model.layers.2.eh_proj.weight": (4, 8), **{f"model.layers.2.{part}": s for part, s in PARTS.items()}}
    for name in "AB":
        write(tmp_path / name, {**shapes(2), **ahead}, num_hidden_layers=2, num_nextn_predict_layers=1)
    stacked = LAYERED.replace("[2, 3]", "[0, 2]")
    layout, faults = laid_out(tmp_path, stacked)
    names = [slot.name for slot in layout.slots]
    assert not faults and len(names) == len(set(names))
    behind = {slot.name: slot.inputs[0] for slot in layout.slots if slot.name.startswith("model.layers.4.")}
    assert len(behind) == len(ahead)
    assert behind["model.layers.4.eh_proj.weight"].name == "model.layers.2.eh_proj.weight"
    assert {tensor.file.parent.name for tensor in behind.values()} == {"B"}


def test_rows_of_tokens_in_layers_that_predict_further_ahead_are_known(tmp_path: Path) -> None:
    per_token = ["model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"]
    rows = shapes(2)["model.embed_tokens.weight"]
    ahead = {**dict.fromkeys(per_token, rows), **{f"model.layers.2.{part}": s for part, s in PARTS.items()}}
    for name in "AB":
        write(tmp_path / name, {**shapes(2), **ahead}, num_hidden_layers=2, num_nextn_predict_layers=1)
    layout, faults = laid_out(tmp_path, LINEAR)
    known = [slot.name for slot in layout.slots if slot.per_token]
    assert not faults and known == ["model.embed_tokens.weight", "lm_head.weight", *per_token]


def test_stacks_of_other_names_meet_inside_their_layers(tmp_path: Path) -> None:
    write(tmp_path / "A", shapes(2), num_hidden_layers=2)
    write(tmp_path / "B", shapes(2, "model.decoder.layers"), num_hidden_layers=2)
    layout, faults = laid_out(tmp_path, LINEAR)
    assert not faults
    slot = next(slot for slot in layout.slots if slot.name == "model.layers.1.self_attn.q_proj.weight")
    assert slot.inputs[1].name == "model.decoder.layers.1.self_attn.q_proj.weight"


def test_a_stack_may_have_no_name(tmp_path: Path) -> None:
    bare = {name.removeprefix("model.layers."): shape for name, shape in shapes(3).items()}
    for name in "AB":
        write(tmp_path / name, bare, num_hidden_layers=3)
    layout, faults = laid_out(tmp_path, LAYERED)
    assert not faults
    assert {slot.name for slot in layout.slots} == set(bare)


def test_tensors_without_a_partner_are_one_fault_for_all(tmp_path: Path) -> None:
    more = {f"model.layers.{i}.self_attn.k_norm.weight": (2,) for i in range(2)}
    write(tmp_path / "A", shapes(2), num_hidden_layers=2)
    write(tmp_path / "B", {**shapes(2), **more}, num_hidden_layers=2)
    _, faults = laid_out(tmp_path, LINEAR)
    names = '"model.layers.0.self_attn.k_norm.weight", "model.layers.1.self_attn.k_norm.weight"'
    assert faults == [f"2 tensors: {names}: in B and not in A. {HINT}"]


def test_a_head_meets_the_embedding_that_stands_for_one(tmp_path: Path) -> None:
    tied = {name: shape for name, shape in shapes(2).items() if name != "lm_head.weight"}
    write(tmp_path / "A", tied, num_hidden_layers=2, tie_word_embeddings=True)
    write(tmp_path / "B", shapes(2), num_hidden_layers=2, tie_word_embeddings=False)
    layout, faults = laid_out(tmp_path, LINEAR)
    assert not faults
    head = next(slot for slot in layout.slots if slot.name == "lm_head.weight")
    assert [tensor.name for tensor in head.inputs] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert head.per_token and head.group == "lm_head"
