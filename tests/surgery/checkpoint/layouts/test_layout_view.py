"""Views of a checkpoint in the layout of another: the values are those that the other has, in either direction."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.layouts import WEIGHTS, build_model, in_memory, renamed, save_both, values, with_tensors

from surgery.checkpoint.checkpoint import read_folder
from surgery.checkpoint.layouts.fused_matrices import expert_layouts
from surgery.checkpoint.layouts.layout_view import LayoutView, seen_as
from surgery.checkpoint.reader import SourceFiles, TensorReader
from surgery.checkpoint.stored_tensor import StoredTensor

PAIRS = [
    *("gemma3", "qwen2_5_vl", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "olmoe", "granitemoe"),
    *("phimoe", "glm4_moe", "llama4", "gpt_oss", "phi3", "qwen3_vl_moe", "gpt_neox", "lfm2_moe"),
]


def view(folder: Path, reference: Path) -> LayoutView:
    return seen_as(read_folder(folder), read_folder(reference))


def assert_same_network(folder: Path, reference: Path) -> LayoutView:
    """Assert that `folder`, seen as `reference`, has its names and its bytes."""
    seen = view(folder, reference)
    expected = load_file(reference / WEIGHTS)
    got = values(seen.checkpoint)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    assert not seen.problems
    return seen


@pytest.mark.parametrize("name", PAIRS)
def test_what_transformers_saves_and_what_it_holds_in_memory_are_the_same_network(name: str, tmp_path: Path) -> None:
    """Both ways, for every family whose names or experts transformers converts on loading; and it loads both alike."""
    saved, converted = save_both(build_model(name), tmp_path)
    for one, other in ((saved, converted), (converted, saved)):
        seen = assert_same_network(one, other)
        if load_file(saved / WEIGHTS).keys() != load_file(converted / WEIGHTS).keys():
            assert seen.description
    ours, theirs = in_memory(saved), in_memory(converted)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() | theirs.keys())


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_moe", "mixtral"])
def test_experts_stored_transposed_are_what_transformers_turns_them_into(name: str, tmp_path: Path) -> None:
    """Qwen3-VL-MoE is on the Hub as (n, H, 2·I); other families could be, and no shape is mistaken."""
    saved, converted = save_both(build_model(name), tmp_path)

    def turn(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: t.transpose(1, 2) if ".experts." in n and t.dim() == 3 else t for n, t in tensors.items()}

    turned = with_tensors(converted, tmp_path / "turned", turn)
    for one in (saved, converted):
        assert_same_network(turned, one)
        assert_same_network(one, turned)
    if name == "qwen3_vl_moe":
        ours, theirs = in_memory(turned), in_memory(converted)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() | theirs.keys())


def test_interleaved_experts_with_biases_come_apart_into_gate_and_up(tmp_path: Path) -> None:
    """gpt-oss: columns of gate and up take turns, and each expert has biases."""
    fused, _ = save_both(build_model("gpt_oss"), tmp_path)

    def apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = {}
        for name, tensor in tensors.items():
            block, _, part = name.rpartition(".")
            if not block.endswith("experts"):
                result[name] = tensor
                continue
            leaf = "bias" if part.endswith("_bias") else "weight"
            for expert, matrix in enumerate(tensor):
                halves = (
                    {"gate_proj": matrix[..., 0::2], "up_proj": matrix[..., 1::2]}
                    if part.startswith("gate_up")
                    else {"down_proj": matrix}
                )
                for word, half in halves.items():
                    result[f"{block}.{expert}.{word}.{leaf}"] = half.T if leaf == "weight" else half
        return result

    one_by_one = with_tensors(fused, tmp_path / "apart", apart)
    assert_same_network(fused, one_by_one)
    assert_same_network(one_by_one, fused)


WRAPPED: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "compiled layers": lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
    "data parallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "peft": lambda name: f"base_model.model.{name}",
    "peft layers": lambda name: f"base_model.model.{name}".replace("_proj.weight", "_proj.base_layer.weight"),
    "fsdp": lambda name: f"_fsdp_wrapped_module.{name}".replace(".mlp.", "._fsdp_wrapped_module.mlp."),
    "checkpointing": lambda name: name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "value head": lambda name: f"pretrained_model.{name}",
    "lightning": lambda name: f"model.{name}",
    "lightning, compiled": lambda name: f"_forward_module.model._orig_mod.{name}",
    "bare backbone": lambda name: name.removeprefix("model."),
    "sentence transformer": lambda name: f"0.auto_model.{name}",
    "gpt": lambda name: name.replace("model.", "transformer.", 1),
}


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_wrappers_and_missing_prefixes_mean_nothing(kind: str, family: str, tmp_path: Path) -> None:
    """Both ways, whatever was wrapped."""
    plain, _ = save_both(build_model(family), tmp_path)
    other = renamed(plain, tmp_path / "other", WRAPPED[kind])
    assert_same_network(plain, other)
    seen = assert_same_network(other, plain)
    assert seen.description is not None
    moved = {new: stored for stored, new in seen.renamed.items() if stored != new}
    assert all(seen.checkpoint.tensors[new].name_in_file == stored for new, stored in moved.items())


def test_an_encoder_alone_and_with_its_head_have_the_same_layers(tmp_path: Path) -> None:
    """BertModel against BertForMaskedLM, with the old names of its norms; the head and the pooler stay apart."""
    model = build_model("bert")
    model.save_pretrained(tmp_path / "masked")
    model.bert.save_pretrained(tmp_path / "bare")
    old = renamed(
        tmp_path / "masked",
        tmp_path / "old",
        lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
    )
    bare, masked = (load_file(tmp_path / kind / WEIGHTS) for kind in ("bare", "masked"))
    for whole in (tmp_path / "masked", old):
        seen = view(whole, tmp_path / "bare").checkpoint
        got = values(seen)
        shared = [name for name in bare if not name.startswith("pooler")]
        assert len(shared) > 30
        assert all(torch.equal(got[name], bare[name]) for name in shared)
        assert {name for name in got if name not in bare} == {n for n in masked if n.startswith("cls.")} or whole == old
        back = values(view(tmp_path / "bare", whole).checkpoint)
        expected = load_file(whole / WEIGHTS)
        assert all(torch.equal(back[name], expected[name]) for name in expected if not name.startswith("cls."))


@pytest.mark.parametrize(("text", "whole"), [("gemma3_text", "gemma3"), ("qwen2", "qwen2_5_vl")])
def test_a_text_model_meets_the_language_model_of_a_multimodal_one(text: str, whole: str, tmp_path: Path) -> None:
    """In both layouts of the multimodal model; its tower keeps its names, and its layers get the text model's."""
    saved, converted = save_both(build_model(whole), tmp_path)
    build_model(text, seed=1).save_pretrained(tmp_path / "text")
    expected = load_file(tmp_path / "text" / WEIGHTS)
    for folder in (saved, converted):
        theirs = load_file(folder / WEIGHTS)
        inside = view(tmp_path / "text", folder)
        assert set(inside.checkpoint.tensors) <= theirs.keys()
        assert len(inside.checkpoint.tensors) == len(expected)
        assert all(torch.equal(values(inside.checkpoint)[inside.renamed[n]], expected[n]) for n in expected)
        back = view(folder, tmp_path / "text")
        assert expected.keys() <= back.checkpoint.tensors.keys()
        others = back.checkpoint.tensors.keys() - expected.keys()
        assert others and all("vis" in name or "multi_modal" in name for name in others)
        assert others <= theirs.keys()
        got = values(back.checkpoint)
        assert all(torch.equal(got[new], theirs[stored]) for stored, new in back.renamed.items())


def test_a_text_moe_meets_the_language_model_of_a_multimodal_one(tmp_path: Path) -> None:
    """Names, fusion and transposition at once: Qwen3-MoE one by one, Qwen3-VL-MoE fused and transposed."""
    _, whole = save_both(build_model("qwen3_vl_moe"), tmp_path)
    text, fused = save_both(build_model("qwen3_moe", seed=1), tmp_path / "text")
    seen = values(view(text, whole).checkpoint)
    expected = {
        (f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name): tensor
        for name, tensor in load_file(fused / WEIGHTS).items()
    }
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], tensor) for name, tensor in expected.items())


def test_a_fused_matrix_that_is_square_is_told_by_the_one_beside_it() -> None:
    """2·I = H: what reads the residual stream could be either way round, what writes it could not."""
    file = Path("x")

    def layouts(*shapes: tuple[int, int, int], hidden: int | None = 32) -> dict[str, bool]:
        words = ("gate_up_proj", "down_proj")
        names = [f"#.0.mlp.experts.{word}" for word in words]
        tensors = {n: StoredTensor(n, "F32", s, file, 0, 0) for n, s in zip(names, shapes, strict=False)}
        return {name.rpartition(".")[2]: one.transposed for name, one in expert_layouts(tensors, hidden).items()}

    assert layouts((4, 32, 32), (4, 32, 16)) == {"gate_up_proj": False, "down_proj": False}
    assert layouts((4, 32, 32), (4, 16, 32)) == {"gate_up_proj": True, "down_proj": True}
    assert layouts((4, 32, 32), (4, 16, 32), hidden=None) == {"gate_up_proj": True, "down_proj": True}
    assert layouts((4, 96, 32)) == {"gate_up_proj": False}
    # Alone, and without anything that tells: not guessed.
    assert layouts((4, 32, 32)) == {}
    assert layouts((4, 96, 32), hidden=None) == {}


def test_dense_projections_fused_or_apart_are_the_same(tmp_path: Path) -> None:
    """Phi-3's qkv_proj and gate_up_proj, and the same apart as Llama has them."""
    fused, _ = save_both(build_model("phi3"), tmp_path)

    def apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = {}
        for name, tensor in tensors.items():
            if "qkv_proj" in name:
                for part, rows in zip("qkv", tensor.split([32, 16, 16]), strict=True):
                    result[name.replace("qkv", part)] = rows
            elif "gate_up_proj" in name:
                result[name.replace("gate_up", "gate")], result[name.replace("gate_up", "up")] = tensor.chunk(2)
            else:
                result[name] = tensor
        return result

    other = with_tensors(fused, tmp_path / "apart", apart)
    assert_same_network(fused, other)
    assert_same_network(other, fused)


def test_other_networks_are_left_as_they_are_and_the_reason_is_kept(tmp_path: Path) -> None:
    """Another number of experts, other widths: nothing is put together from what does not fit."""
    one, fused = save_both(build_model("mixtral"), tmp_path)

    def without_last(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in tensors.items() if ".experts.3." not in name}

    def narrower(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: t[:24] if ".w1." in n or ".w3." in n else t for n, t in tensors.items()}

    fewer = view(with_tensors(one, tmp_path / "fewer", without_last), fused)
    assert "is of 4 experts in" in fewer.problems[0] and ", of 3 in" in fewer.problems[0]
    assert "model.layers.0.mlp.experts.gate_up_proj" not in fewer.checkpoint.tensors
    narrow = view(with_tensors(one, tmp_path / "narrow", narrower), fused)
    assert "matrices [48, 32] in" in narrow.problems[0] and "[24, 32] in" in narrow.problems[0]
    assert not narrow.regrouped or all("down_proj" in name for name in narrow.regrouped)


def test_the_same_names_give_the_same_object(tmp_path: Path) -> None:
    """Also where a shape differs, as that of an embedding after tokens were added."""
    build_model("llama").save_pretrained(tmp_path / "a")

    def longer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: torch.cat([t, t[:2]]) if "embed_tokens" in n else t for n, t in tensors.items()}

    with_tensors(tmp_path / "a", tmp_path / "b", longer)
    checkpoint = read_folder(tmp_path / "b")
    seen = seen_as(checkpoint, read_folder(tmp_path / "a"))
    assert seen.checkpoint is checkpoint
    assert seen.description is None


def test_two_tensors_never_get_one_name(tmp_path: Path) -> None:
    """A model that has two copies of its layers, wrapped and not, is left as it is."""
    build_model("llama").save_pretrained(tmp_path / "a")

    def twice(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**{f"module.{n}": t for n, t in tensors.items()}, **{n: t + 1 for n, t in tensors.items()}}

    both = with_tensors(tmp_path / "a", tmp_path / "b", twice)
    seen = view(both, tmp_path / "a")
    expected = load_file(both / WEIGHTS)
    got = values(seen.checkpoint)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_zeros_of_a_vector_are_seen_where_the_reference_has_them(tmp_path: Path) -> None:
    """An expert that did not move is zero inside a fused tensor; a fused tensor that did not move, in each expert."""
    one, fused = (read_folder(path) for path in save_both(build_model("mixtral"), tmp_path))
    block = "model.layers.0.block_sparse_moe.experts"
    still = {f"{block}.2.w1.weight", *(f"{block}.{e}.w2.weight" for e in range(4)), "lm_head.weight"}
    moved = replace(one, tensors={n: t for n, t in one.tensors.items() if n not in still})
    seen = seen_as(moved, fused, absent=still)
    assert seen.absent == {"model.layers.0.mlp.experts.down_proj", "lm_head.weight"}
    got, expected = values(seen.checkpoint), values(fused)
    assert got.keys() | seen.absent == expected.keys()
    gate_up = expected["model.layers.0.mlp.experts.gate_up_proj"].clone()
    gate_up[2, :48] = 0
    assert torch.equal(got["model.layers.0.mlp.experts.gate_up_proj"], gate_up)

    still = {"model.layers.1.mlp.experts.gate_up_proj"}
    moved = replace(fused, tensors={n: t for n, t in fused.tensors.items() if n not in still})
    seen = seen_as(moved, one, absent=still)
    block = "model.layers.1.block_sparse_moe.experts"
    assert seen.absent == {f"{block}.{expert}.{part}.weight" for expert in range(4) for part in ("w1", "w3")}


def test_few_tensors_of_a_vector_are_enough_to_recognise_its_names(tmp_path: Path) -> None:
    """A vector of one projection of one layer has no stack to be found: that of the target says what it looks like."""
    saved, converted = (read_folder(path) for path in save_both(build_model("gemma3"), tmp_path))
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    seen = seen_as(replace(saved, tensors={name: saved.tensors[name]}, config={}), converted)
    assert list(seen.checkpoint.tensors) == ["model.language_model.layers.1.mlp.up_proj.weight"]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Mixtral one by one and fused."""
    return save_both(build_model("mixtral"), tmp_path_factory.mktemp("mixtral"))


@settings(deadline=None)
@given(st.booleans(), st.data())
def test_any_slice_of_a_regrouped_tensor_is_the_slice_of_the_whole(
    mixtral: tuple[Path, Path], fuse: bool, data: st.DataObject
) -> None:
    """Put together or cut out."""
    one, other = mixtral if fuse else mixtral[::-1]
    seen = view(one, other)
    name = data.draw(st.sampled_from(seen.regrouped))
    tensor = seen.checkpoint.tensors[name]
    begin = data.draw(st.integers(0, tensor.n_elements))
    end = data.draw(st.integers(begin, tensor.n_elements))
    with SourceFiles(tensor.files) as files:
        got = TensorReader(files).tensor(tensor, begin, end, "x")
        expected = load_file(other / WEIGHTS)[name].reshape(-1)[begin:end]
        assert torch.equal(got, expected)


def test_what_is_renamed_is_told_in_one_line(tmp_path: Path) -> None:
    """By the parts of the names that differ, numbers left out."""
    saved, converted = save_both(build_model("gemma3"), tmp_path)
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "gemma3"
    text = view(saved, converted).description
    assert text == ("62 tensor(s) seen under other names: * → model.*, language_model.model.* → model.language_model.*")


def test_codes_of_quantised_experts_are_not_regrouped(tmp_path: Path) -> None:
    """Their scales would stay behind, and nothing would tell any more that they are codes."""
    one, fused = save_both(build_model("mixtral"), tmp_path)

    def quantised(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        codes = {n: t.to(torch.float8_e4m3fn) if ".experts." in n else t for n, t in tensors.items()}
        return codes | {f"{n}_scale": torch.ones(()) for n in tensors if ".experts." in n}

    codes = with_tensors(one, tmp_path / "codes", quantised)
    seen = view(codes, fused)
    assert not seen.regrouped
    names = seen.checkpoint.tensors.keys()
    assert all(f"{n}_scale" in names for n in names if ".experts." in n and n.endswith(".weight"))
