"""Merges of models that are saved in different layouts: the results are those of one layout, to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.layouts import build_model, in_memory, noisy, save_both
from support.merges import run as run_in

from merges.report import MergeReport
from surgery.engine.verification import verify
from surgery.errors import SurgeryError

LINEAR = """\
models:
  - {model: ⟨a⟩, parameters: {weight: 1.0}}
  - {model: ⟨b⟩, parameters: {weight: 0.3}}
merge_method: linear
"""
TIES = """\
models:
  - {model: ⟨a⟩, parameters: {density: 0.7, weight: 1.0}}
  - {model: ⟨b⟩, parameters: {density: 0.5, weight: 0.5}}
merge_method: ties
base_model: ⟨base⟩
"""
DARE = TIES.replace("ties", "dare_ties")
SLERP = """\
models: [{model: ⟨a⟩}, {model: ⟨b⟩}]
merge_method: slerp
base_model: ⟨a⟩
parameters: {t: [{filter: self_attn, value: [0, 0.5, 1]}, {value: 0.3}]}
"""
FRANKEN = """\
slices:
  - sources: [{model: ⟨a⟩, layer_range: [0, 2]}]
  - sources: [{model: ⟨b⟩, layer_range: [1, 2]}]
merge_method: passthrough
"""
CONFIGS = {"linear": LINEAR, "ties": TIES, "dare_ties": DARE, "slerp": SLERP, "passthrough": FRANKEN}
Folders = dict[tuple[str, bool], Path]


def save_children(family: str, folder: Path) -> Folders:
    """Save a base and two children of it: (role, as transformers saves it) → folder."""
    folders: Folders = {}
    for number, role in enumerate(("base", "a", "b")):
        model = build_model(family)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor += 0.01 * number * torch.randn(tensor.shape, generator=generator)
        folders[role, True], folders[role, False] = save_both(model, folder / role)
    return folders


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return save_children("mixtral", tmp_path_factory.mktemp("mixtral"))


def run(text: str, out: Path) -> MergeReport:
    return run_in(text, out.parent, out)


def merged(text: str, folders: Folders, saved: dict[str, bool], out: Path) -> MergeReport:
    for role, as_saved in saved.items():
        text = text.replace(f"⟨{role}⟩", str(folders[role, as_saved]))
    return run(text, out)


def assert_layouts_do_not_matter(text: str, folders: Folders, out: Path) -> None:
    """Assert that a merge gives the bytes that it gives with all models in the layout of the template."""
    template = "base" if "⟨base⟩" in text else "a"
    for as_saved in (True, False):
        same = merged(text, folders, dict.fromkeys(("base", "a", "b"), as_saved), out / f"same{as_saved}")
        assert not any(label.startswith("names of") for label in same.preflight)
        mixed = {"base": not as_saved, "a": as_saved, "b": not as_saved} | {template: as_saved}
        report = merged(text, folders, mixed, out / f"mixed{as_saved}")
        assert any(label.startswith("names of") for label in report.preflight)
        ours, theirs = (load_file(out / f"{kind}{as_saved}" / "model.safetensors") for kind in ("mixed", "same"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert verify(str(out / f"mixed{as_saved}")).ok


@pytest.mark.parametrize("method", CONFIGS)
def test_a_merge_gives_the_same_bytes_whatever_the_layouts(method: str, children: Folders, tmp_path: Path) -> None:
    """OUT has the layout of the base, or of the first model; all models' names are matched to that."""
    assert_layouts_do_not_matter(CONFIGS[method], children, tmp_path)


@pytest.mark.parametrize("family", ["gemma3", "granitemoe"])
def test_other_families_meet_too(family: str, tmp_path: Path) -> None:
    """Other places of the layers, and fused experts under another name; transformers loads both results alike."""
    folders = save_children(family, tmp_path / "models")
    assert_layouts_do_not_matter(LINEAR, folders, tmp_path)
    ours, theirs = (in_memory(tmp_path / f"mixed{as_saved}") for as_saved in (True, False))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_layers_beyond_the_template_come_in_its_layout(tmp_path: Path) -> None:
    """A passthrough that takes layers of a deeper model: their experts are fused as those of the first."""
    shallow, deep = build_model("mixtral"), build_model("mixtral", layers=4, seed=1)
    _, first = save_both(shallow, tmp_path / "shallow")
    second, fused = save_both(deep, tmp_path / "deep")
    text = (
        "merge_method: passthrough\nslices:\n- sources: [{model: ⟨a⟩, layer_range: [0, 2]}]\n"
        "- sources: [{model: ⟨b⟩, layer_range: [2, 4]}]\n"
    )
    folders: Folders = {("a", True): first, ("b", True): second, ("b", False): fused}
    merged(text, folders, {"a": True, "b": True}, tmp_path / "out")
    got, expected = load_file(tmp_path / "out" / "model.safetensors"), load_file(fused / "model.safetensors")
    for name in (name for name in expected if ".layers.2." in name or ".layers.3." in name):
        assert torch.equal(got[name], expected[name]), name
    assert not any(".experts.0." in name for name in got)


def test_what_is_not_one_network_is_refused_with_the_reason(tmp_path: Path) -> None:
    """Experts of another width, in another layout; nothing is written."""
    _, fused = save_both(build_model("mixtral"), tmp_path / "a")
    wide, _ = save_both(build_model("mixtral", intermediate_size=64), tmp_path / "b")
    text = LINEAR.replace("⟨a⟩", str(fused)).replace("⟨b⟩", str(wide))
    with pytest.raises(SurgeryError, match=r"is of matrices \[48, 32\] in .*, \[64, 32\] in"):
        run(text, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_noise_on_another_layout_is_averaged_as_on_its_own(tmp_path: Path) -> None:
    """Half of it one by one, and half of it fused and with noise: half the noise."""
    saved, in_memory_layout = save_both(build_model("qwen3_moe"), tmp_path / "m")
    other = noisy(in_memory_layout, tmp_path / "noisy", seed=3)
    text = LINEAR.replace("1.0", "0.5").replace("0.3", "0.5")
    run(text.replace("⟨a⟩", str(in_memory_layout)).replace("⟨b⟩", str(other)), tmp_path / "expected")
    run(text.replace("⟨a⟩", str(saved)).replace("⟨b⟩", str(other)), tmp_path / "out")
    ours, theirs = in_memory(tmp_path / "out"), in_memory(tmp_path / "expected")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


@pytest.mark.parametrize(("text", "whole"), [("gemma3_text", "gemma3"), ("qwen3_moe", "qwen3_vl_moe")])
def test_a_text_model_is_merged_with_the_language_model_of_a_multimodal_one(
    text: str, whole: str, tmp_path: Path
) -> None:
    """The tower is that of the multimodal model, whichever gives the layout; a line says so."""
    saved, fused = save_both(build_model(whole), tmp_path / "whole")
    build_model(text, seed=1).save_pretrained(tmp_path / "text")
    config = LINEAR.replace("1.0", "0.5").replace("0.3", "0.5")
    for number, (a, b) in enumerate(
        ((saved, tmp_path / "text"), (fused, tmp_path / "text"), (tmp_path / "text", saved))
    ):
        report = run(config.replace("⟨a⟩", str(a)).replace("⟨b⟩", str(b)), tmp_path / f"out{number}")
        ours, theirs, got = (in_memory(path) for path in (a, b, tmp_path / f"out{number}"))
        places = {name: _place(name, theirs) for name in got}
        assert sum(place is not None for place in places.values()) == len(in_memory(tmp_path / "text"))
        for name, tensor in got.items():
            place = places[name]
            expected = ours[name] if place is None else (ours[name] + theirs[place]) / 2
            torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-6)
        assert any("kept from" in line and "vis" in line for line in report.warnings)


def _place(name: str, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name that a tensor of a text model has in a multimodal one, or the other way round."""
    inner, outer = "model.", "model.language_model."
    names = (name, name.replace(outer, inner), name.replace(inner, outer, 1))
    return next((one for one in names if one in tensors), None)
