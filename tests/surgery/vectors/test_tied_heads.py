"""Vectors and targets with tied embeddings, and with tensors that only some of the models have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import build, sibling
from torch import Tensor
from transformers import AutoModelForCausalLM

from surgery.engine.edit_report import EditReport
from surgery.errors import SurgeryError
from surgery.vectors.application import apply, transfer
from surgery.vectors.extraction import extract
from surgery.vectors.scale_sweep import sweep
from surgery.vectors.to_lora import extract_adapter

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM = "model.norm.weight"


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def write(folder: Path, tensors: dict[str, Tensor], **config: object) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def noise(shape: torch.Size, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) / 100


@pytest.fixture
def trio(tmp_path: Path) -> tuple[Path, Path, Path]:
    """tuned, base and target, all tied, none with a head stored."""
    base = build("llama", tmp_path / "base", dtype=torch.float32, tied=True)
    return sibling(base, tmp_path / "tuned", seed=1), base, sibling(base, tmp_path / "target", seed=2)


def with_head(folder: Path, *, seed: int | None = None, **config: object) -> None:
    """Store a head: the embedding, or with a `seed` another matrix."""
    tensors = weights(folder)
    head = tensors[EMBEDDING].clone()
    write(folder, {**tensors, HEAD: head if seed is None else head + noise(head.shape, seed)}, **config)


def head_of(folder: Path) -> Tensor:
    tensors = weights(folder)
    return tensors.get(HEAD, tensors[EMBEDDING])


def both_ways(trio: tuple[Path, Path, Path], tmp_path: Path, **options: object) -> tuple[EditReport, dict[str, Tensor]]:
    """Transfer in one pass and in two; check that the files are the same, and return report and tensors."""
    tuned, base, target = map(str, trio)
    report = transfer(tuned, base, target, tmp_path / "direct", **options)  # type: ignore[arg-type]
    extract(tuned, base, tmp_path / "v")
    apply(str(tmp_path / "v"), target, tmp_path / "out", **options)  # type: ignore[arg-type]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
    return report, weights(tmp_path / "out")


def check(made: dict[str, Tensor], trio: tuple[Path, Path, Path], *, has_head: bool, tmp_path: Path) -> None:
    """Check that OUT's ends are those of θ_target + (θ_tuned − θ_base), and that transformers loads them."""
    tuned, base, target = trio
    embedding = [weights(folder)[EMBEDDING].double() for folder in (target, tuned, base)]
    heads = [head_of(folder).double() for folder in (target, tuned, base)]
    assert (HEAD in made) == has_head
    expected = {EMBEDDING: embedding[0] + embedding[1] - embedding[2], HEAD: heads[0] + heads[1] - heads[2]}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(loaded.lm_head.weight.double(), expected[HEAD], rtol=0, atol=1e-6)
    assert torch.allclose(loaded.model.embed_tokens.weight.double(), expected[EMBEDDING], rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is not has_head


def test_equal_heads_of_donors_are_left_out(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for folder in trio[:2]:
        with_head(folder)
    _, made = both_ways(trio, tmp_path)
    check(made, trio, has_head=False, tmp_path=tmp_path)


def test_an_equal_head_of_the_target_is_left_out(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with_head(trio[2])
    report, made = both_ways(trio, tmp_path)
    assert report.preflight[f"output head of {trio[2]}"] == f"{HEAD} equals {EMBEDDING}: left out, they stay tied"
    check(made, trio, has_head=False, tmp_path=tmp_path)


def test_donors_with_heads_of_their_own_part_the_targets(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for seed, folder in enumerate(trio[:2], start=5):
        with_head(folder, seed=seed, tie_word_embeddings=False)
    report, made = both_ways(trio, tmp_path)
    assert any(f"{trio[2]} is tied, and the vector changes {HEAD} otherwise" in line for line in report.warnings)
    check(made, trio, has_head=True, tmp_path=tmp_path)


def test_donors_that_only_say_they_are_tied(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for seed, folder in enumerate(trio[:2], start=5):
        with_head(folder, seed=seed)
    _, made = both_ways(trio, tmp_path)
    check(made, trio, has_head=True, tmp_path=tmp_path)


def test_a_frozen_head_of_an_untied_donor_stays_the_targets_old_embedding(
    trio: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    for folder in trio[:2]:
        write(folder, {**weights(folder), HEAD: noise(weights(folder)[EMBEDDING].shape, 3)}, tie_word_embeddings=False)
    _, made = both_ways(trio, tmp_path)
    check(made, trio, has_head=True, tmp_path=tmp_path)
    assert torch.equal(made[HEAD], weights(trio[2])[EMBEDDING])


def test_frozen_ends_of_untied_donors_leave_a_target_tied(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    ends = {name: noise(weights(trio[0])[EMBEDDING].shape, seed) for seed, name in enumerate((EMBEDDING, HEAD))}
    for folder in trio[:2]:
        write(folder, {**weights(folder), **ends}, tie_word_embeddings=False)
    _, made = both_ways(trio, tmp_path, allow_unrelated=True)
    check(made, trio, has_head=False, tmp_path=tmp_path)
    assert torch.equal(made[EMBEDDING], weights(trio[2])[EMBEDDING])


def test_a_target_that_only_says_it_is_tied_gets_a_config_that_is_true(
    trio: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    with_head(trio[2], seed=5)
    report, made = both_ways(trio, tmp_path)
    assert any(f"{trio[2]} stores {HEAD}, which differs" in line for line in report.warnings)
    check(made, trio, has_head=True, tmp_path=tmp_path)


def test_a_frozen_embedding_of_tied_donors_leaves_both_ends_of_an_untied_target(
    trio: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    write(trio[0], {**weights(trio[0]), EMBEDDING: weights(trio[1])[EMBEDDING]})
    with_head(trio[2], seed=5, tie_word_embeddings=False)
    _, made = both_ways(trio, tmp_path)
    assert all(torch.equal(made[name], weights(trio[2])[name]) for name in (EMBEDDING, HEAD))
    check(made, trio, has_head=True, tmp_path=tmp_path)


def test_tuned_and_base_may_differ_in_being_tied(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for index in range(2):
        folders = [sibling(folder, tmp_path / f"{index}{folder.name}", seed=9, relative=0) for folder in trio]
        with_head(folders[index], seed=5, tie_word_embeddings=False)
        _, made = both_ways((folders[0], folders[1], folders[2]), place := tmp_path / str(index))
        check(made, (folders[0], folders[1], folders[2]), has_head=True, tmp_path=place)


def test_a_sweep_refuses_what_it_cannot_set_in_a_loaded_model(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for seed, folder in enumerate(trio[:2], start=5):
        with_head(folder, seed=seed, tie_word_embeddings=False)
    extract(str(trio[0]), str(trio[1]), tmp_path / "v")
    for options, match in (({}, "would be another matrix than its embedding"), ({"drop": ["*norm*"]}, "--drop: would")):
        with pytest.raises(SurgeryError, match=match):
            sweep(str(tmp_path / "v"), str(trio[2]), scales=[1.0], tasks=["lab_sums"], **options)  # type: ignore[arg-type]


def test_a_head_that_is_excluded_leaves_the_target_tied(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for seed, folder in enumerate(trio[:2], start=5):
        with_head(folder, seed=seed, tie_word_embeddings=False)
    for number, options in enumerate(({"exclude": [HEAD]}, {"drop": [HEAD]})):
        transfer(*map(str, trio), tmp_path / str(number), **options)  # type: ignore[arg-type]
        assert HEAD not in weights(tmp_path / str(number))


def test_buffers_and_what_is_ignored_stay_the_targets(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8), "mtp.fc.weight": torch.rand(32, 64)}
    write(trio[2], {**weights(trio[2]), **more})
    report, made = both_ways(trio, tmp_path)
    assert all(torch.equal(made[name], tensor) for name, tensor in more.items())
    told = "\n".join(report.warnings)
    assert f"without an update, as the architecture computes them: 1 of {trio[2]}" in told
    assert f"without an update, as transformers ignores them where a model lacks them: 1 of {trio[2]}" in told


def test_updates_of_what_is_ignored_are_left_out_and_told(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for seed, folder in enumerate(trio[:2]):
        write(folder, {**weights(folder), "v_head.summary.weight": noise(torch.Size((1, 32)), seed)})
    report, made = both_ways(trio, tmp_path)
    assert "v_head.summary.weight" not in made
    assert any("without an update" in line and "v_head.summary.weight" in line for line in report.warnings)


def test_a_learnt_update_without_a_place_is_an_error_that_names_drop(
    trio: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    for seed, folder in enumerate(trio[:2]):
        write(folder, {**weights(folder), "model.gate.weight": noise(torch.Size((3,)), seed)})
    tuned, base, target = map(str, trio)
    extract(tuned, base, tmp_path / "v")
    with pytest.raises(SurgeryError) as caught:
        apply(str(tmp_path / "v"), target, tmp_path / "out")
    text = str(caught.value)
    assert f'"model.gate.weight": in {tmp_path / "v"} and not in {target}.' in text and "--drop" in text
    with pytest.raises(SurgeryError, match="--drop"):  # there is no place to keep it in
        apply(str(tmp_path / "v"), target, tmp_path / "out", keep=["model.gate.*"])
    report = apply(str(tmp_path / "v"), target, tmp_path / "out", drop=["model.gate.*"])
    assert any("left out, as --drop says: 1 tensor(s) (model.gate.weight)" in line for line in report.warnings)
    command = json.loads((tmp_path / "out/surgery.json").read_text())["command"]
    assert command["options"]["drop"] == ["model.gate.*"] and "--drop 'model.gate.*'" in command["line"]


def test_what_only_the_target_has_is_kept_or_dropped_by_name(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    tuned, base, target = trio
    write(target, {**weights(target), "model.gate.weight": torch.rand(3)})
    arguments = [str(folder) for folder in trio]
    with pytest.raises(SurgeryError, match=rf'"model.gate.weight": in {target} and not in {tuned}, {base}. --keep'):
        transfer(*arguments, tmp_path / "out")  # type: ignore[misc]
    transfer(*arguments, tmp_path / "kept", keep=["model.gate.*"])  # type: ignore[misc]
    assert torch.equal(weights(tmp_path / "kept")["model.gate.weight"], weights(target)["model.gate.weight"])
    transfer(*arguments, tmp_path / "dropped", drop=["model.gate.*"])  # type: ignore[misc]
    assert weights(tmp_path / "dropped").keys() == weights(base).keys()


def test_an_extraction_leaves_out_what_one_model_lacks(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    tuned, base, _ = trio
    write(tuned, {**weights(tuned), "model.gate.weight": torch.rand(3), "score.weight": torch.rand(2, 32)})
    for make in (extract, lambda *given, **options: extract_adapter(*given, rank=2, **options)):
        with pytest.raises(SurgeryError, match=rf'"model.gate.weight": in {tuned} and not in {base}'):
            make(str(tuned), str(base), tmp_path / "v")
    for option in ("keep", "drop"):
        extract(str(tuned), str(base), tmp_path / option, **{option: ["model.gate.*"]})  # type: ignore[arg-type]
        stored = load_file(tmp_path / option / "vector.safetensors")
        assert not {"model.gate.weight", "score.weight"} & stored.keys() and NORM in stored
    extract_adapter(str(tuned), str(base), tmp_path / "adapter", rank=2, drop=["model.gate.*"])


def test_a_glob_without_a_match_is_an_error(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for option in ("keep", "drop"):
        with pytest.raises(SurgeryError, match=rf"--{option} 'nothing\*': matches none of") as caught:
            transfer(*map(str, trio), tmp_path / "out", **{option: ["nothing*"]})  # type: ignore[misc]
        assert caught.value.exit_code == 2
