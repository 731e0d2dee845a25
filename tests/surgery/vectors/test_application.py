"""Task vectors: out of one pair of models, into another, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.architectures import ARCHITECTURES, add_tokenizer, build, sibling
from torch import Tensor

from surgery.engine.options import ExecutionOptions
from surgery.engine.verification import verify
from surgery.errors import SurgeryError
from surgery.vectors.application import apply, transfer
from surgery.vectors.extraction import extract
from surgery.vectors.kernels import add_difference, add_vector, difference
from surgery.vectors.task_vector import open_vector

PROMISED = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "phi3",
    "gpt2",
    "gpt_neox",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "olmoe",
)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """A tiny Llama and a tuned sibling of it: (tuned, base)."""
    base = build("llama", tmp_path / "base")
    return str(sibling(base, tmp_path / "tuned", seed=1)), str(base)


def weights(folder: Path | str) -> dict[str, Tensor]:
    return {name: t for file in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("family", sorted({*PROMISED, *ARCHITECTURES}))
def test_base_plus_vector_is_the_tuned_model_bit_for_bit(family: str, tmp_path: Path) -> None:
    base = build(family, tmp_path / "base", max_shard_size="20KB")
    tuned = sibling(base, tmp_path / "tuned", seed=1)
    report = extract(str(tuned), str(base), tmp_path / "v")
    assert report.inexact == 0
    apply(str(tmp_path / "v"), str(base), tmp_path / "out")
    transfer(str(tuned), str(base), str(base), tmp_path / "direct")
    files = [file.name for file in sorted(tuned.glob("*.safetensors"))]
    assert len(files) > 1
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tuned / name).read_bytes()
        assert (tmp_path / "direct" / name).read_bytes() == (tuned / name).read_bytes()
    assert verify(str(tmp_path / "out")).ok


def test_every_promised_family_is_built() -> None:
    assert set(PROMISED) <= set(ARCHITECTURES)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6)
TRIPLES = st.integers(1, 40).flatmap(lambda n: st.tuples(*(st.lists(FLOATS, min_size=n, max_size=n) for _ in range(3))))


@given(values=TRIPLES, scale=st.floats(-4, 4, width=32))
@settings(deadline=None)
def test_kernels_agree_with_float64(values: tuple[list[float], ...], scale: float) -> None:
    target, tuned, base = (torch.tensor(column, dtype=torch.float32) for column in values)
    exact = target.double() + scale * (tuned.double() - base.double())
    # Three roundings, each half an ulp of what it rounds.
    bound = 2.0**-23 * (exact.abs() + 2 * (scale * (tuned.double() - base.double())).abs()) + 1e-37
    direct = add_difference([target, tuned, base], scale=scale)
    assert ((direct.double() - exact).abs() <= bound).all()
    assert torch.equal(add_vector([target, difference([tuned, base])], scale=scale), direct)


@given(values=TRIPLES)
@settings(deadline=None)
def test_scale_one_restores_bfloat16_bit_for_bit_where_extraction_says_so(values: tuple[list[float], ...]) -> None:
    _, tuned, base = (torch.tensor(column).bfloat16() for column in values)
    v = difference([tuned.float(), base.float()])
    exact = base.float() + v == tuned.float()
    restored = add_vector([base.float(), v], scale=1.0).bfloat16()
    assert torch.equal(restored[exact], tuned[exact])


@pytest.mark.parametrize("scale", [-1.0, 0.25, 0.5, 1.0, 2.0])
def test_delivered_fraction_is_what_counting_by_hand_gives(scale: float, pair: tuple[str, str], tmp_path: Path) -> None:
    tuned, base = pair
    target = str(sibling(Path(base), tmp_path / "target", seed=2, relative=0.3))
    report = transfer(tuned, base, target, tmp_path / "out", scale=scale)
    updates = delivered = 0
    made, old = weights(tmp_path / "out"), weights(target)
    for name, (a, b) in ((name, (weights(tuned)[name], weights(base)[name])) for name in old):
        v = a.double() - b.double()
        updates += int((v != 0).sum())
        delivered += int(((v != 0) & (made[name] != old[name])).sum())
    assert report.whole is not None
    assert (report.whole.updates, report.whole.delivered) == (updates, delivered)
    assert report.delivered_fraction == delivered / updates


def test_small_scales_lose_updates_in_bfloat16_and_none_in_float32(pair: tuple[str, str], tmp_path: Path) -> None:
    tuned, base = pair
    low = transfer(tuned, base, base, tmp_path / "low", scale=0.25)
    high = transfer(tuned, base, base, tmp_path / "high", scale=0.25, dtype="float32")
    assert low.delivered_fraction < 0.9 < high.delivered_fraction == 1.0
    assert {t.dtype for t in weights(tmp_path / "high").values()} == {torch.float32}
    config = json.loads((tmp_path / "high/config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"


def test_norms_are_those_of_the_update(pair: tuple[str, str], tmp_path: Path) -> None:
    tuned, base = pair
    report = transfer(tuned, base, base, tmp_path / "out", scale=-0.5)
    update = torch.cat([(weights(tuned)[n].double() - weights(base)[n].double()).flatten() for n in weights(base)])
    theta = torch.cat([t.double().flatten() for t in weights(base).values()])
    assert report.whole is not None
    assert report.whole.update_norm == pytest.approx(0.5 * update.norm().item(), rel=1e-5)
    assert report.whole.relative == pytest.approx(0.5 * (update.norm() / theta.norm()).item(), rel=1e-5)
    assert [group.name for group in report.groups] == ["embed", "layer 0", "layer 1", "final norm", "lm_head"]


def test_masks_and_scales_touch_exactly_their_tensors(pair: tuple[str, str], tmp_path: Path) -> None:
    tuned, base = pair
    apply_to = {"include": ["*.mlp.*", "*.self_attn.*"], "exclude": ["*.q_proj.*"], "scale_for": {"*.layers.1.*": -1.0}}
    transfer(tuned, base, base, tmp_path / "out", scale=0.5, **apply_to)
    made, a, b = weights(tmp_path / "out"), weights(tuned), weights(base)
    for name in b:
        alpha = 0.0 if "norm" in name or "embed" in name or "lm_head" in name or "q_proj" in name else 0.5
        alpha = -1.0 if alpha and ".layers.1." in name else alpha
        expected = (b[name].float() + alpha * (a[name].float() - b[name].float())).bfloat16()
        assert torch.equal(made[name], expected), name


def test_a_mask_that_matches_nothing_is_an_error(pair: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"--include '\*\.nothing': matches none of 21 tensors"):
        transfer(*pair, pair[1], tmp_path / "out", include=["*.nothing"])
    with pytest.raises(SurgeryError, match="every scale is 0"):
        transfer(*pair, pair[1], tmp_path / "out", scale=0.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(scale: float, pair: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"--scale: got .*, expected a finite number") as caught:
        transfer(*pair, pair[1], tmp_path / "out", scale=scale)
    assert caught.value.exit_code == 2
    with pytest.raises(SurgeryError, match=r"--scale-for \*mlp\*: got"):
        transfer(*pair, pair[1], tmp_path / "out", scale_for={"*mlp*": scale})


def test_tensors_that_do_not_differ_are_listed_and_not_stored(pair: tuple[str, str], tmp_path: Path) -> None:
    tuned, base = pair
    tensors = load_file(Path(tuned) / "model.safetensors")
    for name in ("lm_head.weight", "model.norm.weight"):
        tensors[name] = load_file(Path(base) / "model.safetensors")[name]
    save_file(tensors, Path(tuned) / "model.safetensors", metadata={"format": "pt"})
    report = extract(tuned, base, tmp_path / "v")
    vector = open_vector(tmp_path / "v")
    assert (report.tensors, report.zero) == (19, 2)
    assert vector.zero == {"lm_head.weight", "model.norm.weight"}
    assert not vector.zero & set(vector.checkpoint.tensors)
    apply(str(tmp_path / "v"), base, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (Path(tuned) / "model.safetensors").read_bytes()


def test_equal_models_have_no_vector(pair: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"no tensor differs .*: the vector would be empty"):
        extract(pair[1], pair[1], tmp_path / "v")
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float64", torch.float64)]
)
def test_vectors_are_stored_in_the_dtype_asked_for(
    dtype: str, stored: torch.dtype, pair: tuple[str, str], tmp_path: Path
) -> None:
    extract(*pair, tmp_path / "v", dtype=dtype)
    tuned, base = weights(pair[0]), weights(pair[1])
    for name, v in weights(tmp_path / "v").items():
        assert v.dtype == stored
        assert torch.equal(v, (tuned[name].double() - base[name].double()).to(stored))


def test_an_unknown_dtype_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="--dtype: got 'int4', expected one of float64, float32, bfloat16, float16"):
        extract(*pair, tmp_path / "v", dtype="int4")


def test_elements_that_float32_cannot_restore_are_counted(pair: tuple[str, str], tmp_path: Path) -> None:
    tuned, base = pair
    tensors = load_file(Path(tuned) / "model.safetensors")
    tensors["lm_head.weight"][0, :3] = 1e-12  # so far below the base's value that fp32 cannot hold both
    save_file(tensors, Path(tuned) / "model.safetensors", metadata={"format": "pt"})
    assert extract(tuned, base, tmp_path / "v32").inexact == 3
    assert extract(tuned, base, tmp_path / "v64", dtype="float64").inexact == 0
    apply(str(tmp_path / "v64"), base, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (Path(tuned) / "model.safetensors").read_bytes()


def test_integer_buffers_are_copied_from_the_target(pair: tuple[str, str], tmp_path: Path) -> None:
    for number, folder in enumerate((*pair,)):
        file = Path(folder) / "model.safetensors"
        save_file({**load_file(file), "counter": torch.tensor([number, 7])}, file, metadata={"format": "pt"})
    transfer(*pair, pair[1], tmp_path / "out")
    assert weights(tmp_path / "out")["counter"].tolist() == [1, 7]


def test_the_target_keeps_config_tokenizer_and_licence(pair: tuple[str, str], tmp_path: Path) -> None:
    tuned, base = pair
    target = sibling(Path(base), tmp_path / "target", seed=2)
    for folder in (tuned, base, target):
        add_tokenizer(Path(folder))
    (target / "LICENSE").write_text("terms")
    (target / "chat_template.jinja").write_text("{{ messages }}")
    (Path(tuned) / "chat_template.jinja").write_text("donor's")
    transfer(tuned, base, str(target), tmp_path / "out")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (target / name).read_bytes()


def test_the_model_card_and_manifest_tell_what_was_done(pair: tuple[str, str], tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    report = transfer(*pair, pair[1], tmp_path / "out", scale=0.5)
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.tags == ["model-surgery", "task-vector", "merge"]
    assert f"{report.delivered_fraction:.2%} of the non-zero updates" in card.text
    assert f"surgery vector transfer {pair[0]} {pair[1]} {pair[1]} -o OUT --vocab strict --scale 0.5" in card.text
    manifest = json.loads((tmp_path / "out/surgery.json").read_text())
    assert manifest["report"]["delivered_fraction"] == report.delivered_fraction
    assert set(manifest["inputs"]) == {"target", "tuned", "base"}
    assert manifest["inputs"]["base"]["xxh3"] == manifest["inputs"]["target"]["xxh3"]
    assert manifest["inputs"]["tuned"]["xxh3"] != manifest["inputs"]["base"]["xxh3"]


def test_the_result_loads_in_transformers(pair: tuple[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    transfer(*pair, pair[1], tmp_path / "out")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tuned = AutoModelForCausalLM.from_pretrained(pair[0], dtype="auto")
    tokens = torch.arange(10)[None]
    assert torch.equal(made(tokens).logits, tuned(tokens).logits)


def test_dry_run_checks_and_writes_nothing(pair: tuple[str, str], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    report = transfer(*pair, pair[1], tmp_path / "out", dry_run=True)
    assert "same ancestor" in report.preflight and "disk" in report.preflight and report.dry_run
    assert extract(*pair, tmp_path / "v", dry_run=True).tensors == 21
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_and_extra_tensors_are_listed(pair: tuple[str, str], tmp_path: Path) -> None:
    tuned, base = pair
    tensors = load_file(Path(tuned) / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.extra.weight"] = torch.ones(3)
    save_file(tensors, Path(tuned) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SurgeryError) as caught:
        transfer(tuned, base, base, tmp_path / "out")
    text = str(caught.value)
    assert f'"model.norm.weight": in {base} and not in {tuned}.' in text and "--keep GLOB" in text
    assert f'"model.extra.weight": in {tuned} and not in {base}.' in text and "--drop GLOB" in text
    transfer(tuned, base, base, tmp_path / "out", exclude=["model.norm.weight", "model.extra.*"])
    transfer(tuned, base, base, tmp_path / "same", keep=["model.norm.weight"], drop=["model.extra.*"])
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "same/model.safetensors").read_bytes()


def test_long_lists_of_differences_are_cut(pair: tuple[str, str], tmp_path: Path) -> None:
    tuned, base = pair
    tensors = {f"x{i:02d}": torch.ones(2) for i in range(25)}
    save_file(
        {**load_file(Path(tuned) / "model.safetensors"), **tensors},
        Path(tuned) / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(SurgeryError, match=r'25 tensors: "x00", "x01", "x02" and 22 more: in .* and not in'):
        transfer(tuned, base, base, tmp_path / "out")


def test_different_shapes_and_families_are_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    other = build("gpt2", tmp_path / "other")
    with pytest.raises(SurgeryError, match=r"architectures differ: .* is gpt2, .* is llama"):
        transfer(*pair, str(other), tmp_path / "out")
    tensors = load_file(Path(pair[0]) / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(33)
    save_file(tensors, Path(pair[0]) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SurgeryError, match=r'"model.norm.weight" is \[32\], but \[33\] in'):
        transfer(*pair, pair[1], tmp_path / "out")


def test_unrelated_models_are_refused_unless_asked_for(pair: tuple[str, str], tmp_path: Path) -> None:
    stranger = str(build("llama", tmp_path / "stranger", seed=99))
    with pytest.raises(SurgeryError, match="do not look like children of one pre-trained model"):
        transfer(*pair, stranger, tmp_path / "out")
    extract(*pair, tmp_path / "v")
    with pytest.raises(SurgeryError, match="do not look like children of one pre-trained model"):
        apply(str(tmp_path / "v"), stranger, tmp_path / "out")
    transfer(*pair, stranger, tmp_path / "out", allow_unrelated=True)


def test_quantised_models_are_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    config = Path(pair[1]) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(SurgeryError, match=r"is quantised \(fp8\)"):
        transfer(*pair, pair[1], tmp_path / "out")


def test_out_inside_an_input_is_refused(pair: tuple[str, str]) -> None:
    for out in (Path(pair[1]), Path(pair[1]) / "out"):
        with pytest.raises(SurgeryError, match="lies inside the target") as caught:
            transfer(*pair, pair[1], out)
        assert caught.value.exit_code == 2


def test_too_little_disk_is_noticed_before_anything_is_written(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type(usage)(usage.total, usage.used, 1000))
    with pytest.raises(SurgeryError, match=r"not enough disk at .*: .* needed, 1 kB free|not enough disk"):
        transfer(*pair, pair[1], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_manifest_does_not_depend_on_threads_or_on_how_often_it_was_made(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    for name, threads in (("a", 1), ("b", 4)):
        transfer(*pair, pair[1], tmp_path / name, options=ExecutionOptions(threads=threads))
    for file in ("surgery.json", "README.md", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_model_is_no_vector(pair: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"is not a vector: it has no surgery.json"):
        apply(pair[0], pair[1], tmp_path / "out")
    transfer(*pair, pair[1], tmp_path / "model")
    with pytest.raises(SurgeryError, match="holds a model, expected a vector"):
        apply(str(tmp_path / "model"), pair[1], tmp_path / "out")


def test_single_files_are_models_too(pair: tuple[str, str], tmp_path: Path) -> None:
    tuned, base = (str(Path(folder) / "model.safetensors") for folder in pair)
    transfer(tuned, base, base, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == Path(tuned).read_bytes()


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.float16, "float32"), (torch.bfloat16, "float32"), (torch.float32, "float64")]
)
def test_round_trip_in_every_float_dtype(dtype: torch.dtype, stored: str, tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype=dtype)
    tuned = sibling(base, tmp_path / "tuned", seed=1)
    assert extract(str(tuned), str(base), tmp_path / "v", dtype=stored).inexact == 0
    apply(str(tmp_path / "v"), str(base), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()


def test_what_float32_cannot_restore_of_float32_models_is_counted(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype=torch.float32)
    tuned = sibling(base, tmp_path / "tuned", seed=1)
    report = extract(str(tuned), str(base), tmp_path / "v")
    apply(str(tmp_path / "v"), str(base), tmp_path / "out")
    made, wanted = weights(tmp_path / "out"), weights(tuned)
    assert report.inexact == sum(int((made[name] != wanted[name]).sum()) for name in wanted)
    assert 0 < report.inexact < 0.01 * report.elements
