"""Vectors between models that are saved in different layouts: the results are those of one layout, to the bit."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.architectures import add_tokenizer
from support.layouts import WEIGHTS, build_model, in_memory, noisy, renamed, save_both, with_tensors
from torch import Tensor

from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.manifest import read_manifest
from surgery.engine.options import ExecutionOptions
from surgery.engine.preflight import Preflight
from surgery.engine.storage.journal import Journal, SegmentRecord
from surgery.engine.verification import verify
from surgery.errors import SurgeryError
from surgery.io.atomic import MANIFEST
from surgery.vectors.align import VectorSettings
from surgery.vectors.application import apply, transfer
from surgery.vectors.comparison import compare, diff
from surgery.vectors.extraction import extract
from surgery.vectors.scale_sweep import _check_and_align, _EditedModel
from surgery.vectors.selection import TensorSelection
from surgery.vectors.task_vector import open_vector
from surgery.vectors.to_lora import extract_adapter

FAMILIES = ["gemma3", "mixtral", "qwen2_5_vl"]
Folders = dict[tuple[str, bool], Path]


def save_three(family: str, folder: Path) -> Folders:
    """Save a base, a tune of it and a target: (role, as transformers saves it) → folder."""
    folders = {}
    for number, role in enumerate(("base", "tuned", "target")):
        model = build_model(family)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                # One expert, one norm and the head stay as they are in the tune.
                noise = 0.01 * number * torch.randn(tensor.shape, generator=generator)
                if "experts.gate_up" in name:
                    noise[2] = 0
                if "layers.1.input_layernorm" not in name and "lm_head" not in name and tensor.is_floating_point():
                    tensor += noise
        folders[role, True], folders[role, False] = save_both(model, folder / role)
    return folders


@pytest.fixture(scope="module", params=FAMILIES)
def three(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return save_three(request.param, tmp_path_factory.mktemp(request.param))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def assert_equal(one: Path, other: Path) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("target_saved", [True, False])
def test_a_transfer_gives_the_same_bytes_whatever_the_layouts(
    three: Folders, target_saved: bool, tmp_path: Path
) -> None:
    """OUT has the layout of the target; the manifest's hashes hold for the files as they are."""
    target = three["target", target_saved]
    transfer(str(three["tuned", target_saved]), str(three["base", target_saved]), str(target), tmp_path / "expected")
    for number, (tuned_saved, base_saved) in enumerate(product([True, False], repeat=2)):
        tuned, base = three["tuned", tuned_saved], three["base", base_saved]
        out = tmp_path / f"out{number}"
        report = transfer(str(tuned), str(base), str(target), out)
        assert_equal(out, tmp_path / "expected")
        told = [label for label in report.preflight if label.startswith("names of")]
        assert len(told) == (tuned_saved != target_saved) + (base_saved != target_saved)
        assert verify(str(out)).ok
        manifest = read_manifest(out)
        same = read_manifest(tmp_path / "expected")
        for role, saved in (("tuned", tuned_saved), ("base", base_saved)):
            if saved == target_saved:
                assert manifest["inputs"][role] == same["inputs"][role]
            assert manifest["inputs"][role]["tensors_read"] == len(load_file(three[role, saved] / WEIGHTS))


@pytest.mark.parametrize(("vector_saved", "target_saved"), [(True, False), (False, True)])
def test_a_vector_applies_to_a_target_of_another_layout(
    three: Folders, vector_saved: bool, target_saved: bool, tmp_path: Path
) -> None:
    """Zeros that it does not store and the sketch of its base included; base + vector is still the tune."""
    extract(str(three["tuned", vector_saved]), str(three["base", not vector_saved]), tmp_path / "v")
    extract(str(three["tuned", target_saved]), str(three["base", target_saved]), tmp_path / "w")
    for role in ("target", "base"):
        target = str(three[role, target_saved])
        report = apply(str(tmp_path / "v"), target, tmp_path / role)
        apply(str(tmp_path / "w"), target, tmp_path / f"{role}-expected")
        assert_equal(tmp_path / role, tmp_path / f"{role}-expected")
        assert "median cosine" in report.preflight["same ancestor"]
        assert "1.000" in report.preflight["same ancestor"] or role == "target"
    assert_equal(tmp_path / "base", three["tuned", target_saved])


def test_vectors_of_one_change_are_the_same_in_both_layouts(three: Folders, tmp_path: Path) -> None:
    """`compare` and `diff` see the second as the first."""
    for saved in (True, False):
        extract(str(three["tuned", saved]), str(three["base", saved]), tmp_path / str(saved))
    for order in (("True", "False"), ("False", "True")):
        report = compare([str(tmp_path / name) for name in order])
        assert report.whole.cosines[0, 1] == pytest.approx(1, abs=1e-6)
        assert report.whole.norms[0] == pytest.approx(report.whole.norms[1], rel=1e-6)
    one = diff(str(three["base", True]), str(three["tuned", True]))
    mixed = diff(str(three["base", True]), str(three["tuned", False]))
    assert mixed.whole == one.whole
    assert not mixed.only_a and not mixed.only_b and not mixed.reshaped
    assert "seen under other names" in str(mixed.tables()[0].note) and one.tables()[0].note is None
    assert diff(str(three["base", True]), str(three["base", False])).whole.relative == 0


def test_an_adapter_has_the_names_of_its_base(three: Folders, tmp_path: Path) -> None:
    """Whatever those of the tune are."""
    for saved in (True, False):
        base = str(three["base", saved])
        for number, other in enumerate((saved, not saved)):
            extract_adapter(str(three["tuned", other]), base, tmp_path / f"{saved}{number}", rank=4)
        assert_equal(tmp_path / f"{saved}0", tmp_path / f"{saved}1")


def test_a_wrapped_tune_gives_the_vector_of_the_plain_one(tmp_path: Path) -> None:
    """As a training under torch.compile and FSDP saves it; the vector fits the plain model again."""
    folders = save_three("mixtral", tmp_path)
    tuned, base = folders["tuned", True], str(folders["base", True])
    wrapped = renamed(tuned, tmp_path / "wrapped", lambda name: f"_orig_mod.module.{name}")
    extract(str(wrapped), base, tmp_path / "v")
    assert all(name.startswith("_orig_mod.module.") for name in load_file(tmp_path / "v" / "vector.safetensors"))
    apply(str(tmp_path / "v"), base, tmp_path / "out")
    assert_equal(tmp_path / "out", tuned)


def test_another_network_is_refused_with_the_reason(tmp_path: Path) -> None:
    """One with fewer experts, whatever its layout."""
    folders = save_three("mixtral", tmp_path)
    tuned = with_tensors(
        folders["tuned", True],
        tmp_path / "fewer",
        lambda found: {name: tensor for name, tensor in found.items() if ".experts.3." not in name},
    )
    with pytest.raises(SurgeryError, match=r"is of 3 experts in .*, of 4 in|is of 4 experts in .*, of 3 in"):
        transfer(str(tuned), str(folders["base", False]), str(folders["target", False]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stopped_and_started_again_it_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of views are resumed as those of stored tensors; segments of 64 elements cut matrices at any place."""
    for module in ("surgery.checkpoint.reader", "surgery.engine.work.computation", "surgery.engine.plan"):
        monkeypatch.setattr(f"{module}.SEGMENT", 64)
    folders = save_three("mixtral", tmp_path)
    arguments = [str(folders["tuned", True]), str(folders["base", False]), str(folders["target", False])]
    transfer(*arguments, tmp_path / "fresh")
    append, left = Journal.append, 300

    def stopping(self: Journal, record: SegmentRecord) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", stopping)
        with pytest.raises(KeyboardInterrupt):
            transfer(*arguments, tmp_path / "out", options=ExecutionOptions(threads=1))
    assert (tmp_path / "out.partial").is_dir()
    transfer(*arguments, tmp_path / "out")
    for name in ("model.safetensors", MANIFEST):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_a_sweep_sets_the_weights_that_an_application_writes(tmp_path: Path) -> None:
    """A vector of experts one by one, on a model that transformers holds fused."""
    folders = save_three("mixtral", tmp_path)
    extract(str(folders["tuned", True]), str(folders["base", True]), tmp_path / "v")
    target = add_tokenizer(folders["target", False])
    apply(str(tmp_path / "v"), str(target), tmp_path / "out", scale=0.5)
    preflight, model = Preflight(), open_checkpoint(target)
    seen, aligned = _check_and_align(preflight, model, open_vector(tmp_path / "v"), VectorSettings())
    with _EditedModel(seen, aligned, TensorSelection(), "cpu") as edited:
        edited.set_scale(0.5)
        got, expected = edited.loaded.model.state_dict(), tensors(tmp_path / "out")
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert any(label.startswith("names of") for label in preflight.facts)


TEXTS = [("gemma3_text", "gemma3"), ("qwen2", "qwen2_5_vl"), ("qwen3_moe", "qwen3_vl_moe")]


@pytest.mark.parametrize(("text", "whole"), TEXTS)
def test_a_text_models_vector_moves_the_language_model_of_a_multimodal_one(
    text: str, whole: str, tmp_path: Path
) -> None:
    """In both layouts of the target, from disk and at once; its tower stays to the byte, and transformers loads it."""
    build_model(text, seed=1).save_pretrained(tmp_path / "base")
    tuned, base = str(noisy(tmp_path / "base", tmp_path / "tuned", seed=3)), str(tmp_path / "base")
    extract(tuned, base, tmp_path / "v")
    moved = {
        name: new - old
        for (name, new), old in zip(in_memory(Path(tuned)).items(), in_memory(Path(base)).values(), strict=True)
    }
    for target in save_both(build_model(whole), tmp_path / "whole"):
        before = in_memory(target)
        report = transfer(tuned, base, str(target), tmp_path / f"out-{target.name}", allow_unrelated=True)
        assert not any("num_experts" in line or "num_local_experts" in line for line in report.warnings)
        apply(str(tmp_path / "v"), str(target), tmp_path / f"applied-{target.name}", allow_unrelated=True)
        assert_equal(tmp_path / f"out-{target.name}", tmp_path / f"applied-{target.name}")
        after = in_memory(tmp_path / f"out-{target.name}")
        inside = {name.replace("model.language_model.", "model."): name for name in before if "vis" not in name}
        assert moved.keys() <= inside.keys()
        for name, tensor in before.items():
            update = moved.get(name.replace("model.language_model.", "model."), torch.zeros(()))
            torch.testing.assert_close(after[name], tensor + update, atol=1e-6, rtol=1e-6)
            assert update.numel() > 1 or torch.equal(after[name], tensor)


@pytest.mark.parametrize(("text", "whole"), TEXTS[:2])
def test_a_multimodal_models_vector_moves_the_text_model(text: str, whole: str, tmp_path: Path) -> None:
    """The updates of its tower have no place there, and are left out with a line where the tower did not move."""
    model = build_model(whole)
    _, base = save_both(model, tmp_path / "base")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "language_model" in name:
                tensor += 0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
    tuned, _ = save_both(model, tmp_path / "tuned")
    build_model(text, seed=1).save_pretrained(tmp_path / "text")
    extract(str(tuned), str(base), tmp_path / "v")
    apply(str(tmp_path / "v"), str(tmp_path / "text"), tmp_path / "out", allow_unrelated=True)
    before, after = in_memory(tmp_path / "text"), in_memory(tmp_path / "out")
    old, new = in_memory(base), in_memory(tuned)
    for name, tensor in before.items():
        place = name if name in old else name.replace("model.", "model.language_model.")
        torch.testing.assert_close(after[name], tensor + new[place] - old[place], atol=1e-6, rtol=1e-6)
