"""Task vectors as LoRA adapters: PEFT loads them, the rank decides how much they hold, and the report says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from support.architectures import build, sibling
from torch import Tensor
from transformers import AutoModelForCausalLM

from surgery.checkpoint.reader import SourceFiles, TensorInput, TensorReader
from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.options import ExecutionOptions
from surgery.engine.work.workers import one_thread_per_operation
from surgery.errors import SurgeryError
from surgery.vectors.to_lora import AdapterReport, extract_adapter, low_rank

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

Pair = tuple[Path, Path]
FULL = 1000  # more than the smaller side of any matrix here
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe", "gpt_oss")


def pair_of(architecture: str, folder: Path) -> Pair:
    base = build(architecture, folder / "base", dtype=torch.float32)
    return sibling(base, folder / "tuned", seed=1, relative=0.05), base


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair_of("llama", tmp_path_factory.mktemp("llama"))


def make(pair: Pair, out: Path, rank: int, *, threads: int | None = None) -> AdapterReport:
    return extract_adapter(str(pair[0]), str(pair[1]), out, rank=rank, options=ExecutionOptions(threads=threads))


def delta(pair: Pair) -> dict[str, Tensor]:
    tuned, base = (load_file(folder / "model.safetensors") for folder in pair)
    return {name: tuned[name].double() - base[name].double() for name in tuned}


def read(ref: str | Path) -> dict[str, Tensor]:
    opened = open_checkpoint(ref)
    with SourceFiles(opened.files) as files:
        reader = TensorReader(files)
        return {name: reader.whole(TensorInput(tensor), 0).clone() for name, tensor in opened.tensors.items()}


def logits(base: Path, adapter: Path | None = None) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None]).logits.double()


def matrices_of(adapter: Path) -> list[str]:
    """The tensors that the adapter changes, by what stands in its file."""
    names = load_file(adapter / "adapter_model.safetensors")
    return sorted(name.removeprefix("base_model.model.").replace("lora_A.", "") for name in names if "lora_A" in name)


def brute_residual(v: Tensor, rank: int) -> float:
    """Σ of the squares that the best approximation of rank r leaves, by a full SVD in float64 (Eckart–Young)."""
    return float((np.linalg.svd(v.numpy(), compute_uv=False)[rank:] ** 2).sum())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma2", "phi3", "gpt_neox", *MIXTURES])
def test_peft_loads_every_factor_without_complaint(architecture: str, tmp_path: Path) -> None:
    """Warnings are errors here: PEFT warns where it misses or drops keys."""
    pair = pair_of(architecture, tmp_path)
    report = make(pair, tmp_path / "v", 3)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[1]), tmp_path / "v")
    live = {name.replace(".default.", "."): tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    stored = load_file(tmp_path / "v/adapter_model.safetensors")
    assert live.keys() == stored.keys() and len(stored) == 2 * report.matrices > 0
    assert all(torch.equal(live[name], stored[name]) for name in stored)
    assert {layer.scaling["default"] for layer in model.modules() if isinstance(layer, LoraLayer)} == {1.0}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_logits_approach_the_tuned_models_as_the_rank_grows(architecture: str, tmp_path: Path) -> None:
    tuned, base = pair_of(architecture, tmp_path)
    # What no adapter holds is made equal, so that only the rank stands between the two.
    report = make((tuned, base), tmp_path / "probe", 1)
    tensors, plain = load_file(tuned / "model.safetensors"), load_file(base / "model.safetensors")
    save_file(tensors | {name: plain[name] for name in report.rest}, tuned / "model.safetensors", {"format": "pt"})
    wanted = logits(tuned)
    distances = [(logits(base) - wanted).norm()]
    for rank in (4, 16, FULL):
        report = make((tuned, base), tmp_path / f"v{rank}", rank)
        assert report.rest == [] and report.residual == report.of_matrices
        distances.append((logits(base, tmp_path / f"v{rank}") - wanted).norm())
    assert distances[0] > distances[1] > distances[2] > distances[3]
    assert distances[3] < 1e-4 * distances[0]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_adapter_folder_opened_as_a_model_is_base_plus_ba(architecture: str, tmp_path: Path) -> None:
    tuned, base = pair = pair_of(architecture, tmp_path)
    report = make(pair, tmp_path / "v", FULL)
    found, wanted, plain = read(tmp_path / "v"), read(tuned), read(base)
    held = matrices_of(tmp_path / "v")
    assert len(held) == report.matrices
    for name in wanted:
        if name in held:  # restored, but for the rounding of an SVD and a product in fp32
            size = wanted[name].abs().max()
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-5 * float(size))
        else:
            assert torch.equal(found[name], plain[name])
    assert report.of_matrices < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_reported_residual_is_the_brute_force_one(architecture: str, rank: int, tmp_path: Path) -> None:
    pair = pair_of(architecture, tmp_path)
    report = make(pair, tmp_path / "v", rank)
    v, held = delta(pair), matrices_of(tmp_path / "v")
    whole = {name: float((tensor**2).sum()) for name, tensor in v.items()}
    lost = sum(brute_residual(v[name], rank) for name in held)
    of_matrices = (lost / sum(whole[name] for name in held)) ** 0.5
    beyond = sum(square for name, square in whole.items() if name not in held)
    residual = ((lost + beyond) / sum(whole.values())) ** 0.5
    assert report.of_matrices == pytest.approx(of_matrices, rel=0.01)
    assert report.residual == pytest.approx(residual, rel=0.01)
    assert sorted(report.rest) == sorted(set(v) - set(held))
    # And it is what base + adapter really lacks.
    found, wanted = read(tmp_path / "v"), read(pair[0])
    lacking = sum(float(((wanted[name].double() - found[name].double()) ** 2).sum()) for name in held)
    assert report.of_matrices == pytest.approx((lacking / sum(whole[name] for name in held)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_and_routers_are_left_to_the_rest(architecture: str, tmp_path: Path) -> None:
    report = make(pair_of(architecture, tmp_path), tmp_path / "v", 2)
    routed = [name for name in report.rest if ".experts." in name]
    assert routed and not any(".experts." in name for name in matrices_of(tmp_path / "v"))
    assert report.residual > report.of_matrices > 0


def spectrum(kind: str, shape: tuple[int, int]) -> Tensor:
    """A random matrix whose singular values fall slowly, quickly, in a step, or not at all."""
    generator = torch.Generator().manual_seed(7)
    k = min(shape)
    i = torch.arange(1, k + 1, dtype=torch.float64)
    values = {"flat": i**0, "slow": i**-0.3, "power": 1 / i, "quick": 0.8**i, "step": torch.where(i < 9, 1.0, 1e-3)}
    u, v = (torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q for n in shape)
    return u * values[kind] @ v.T


@pytest.mark.parametrize("kind", ["flat", "slow", "power", "quick", "step"])
@pytest.mark.parametrize("transposed", [False, True])
def test_error_is_within_a_thousandth_of_the_best_possible(kind: str, transposed: bool) -> None:
    v = spectrum(kind, (300, 200))
    best = torch.linalg.svdvals(v).square().flip(0).cumsum(0).flip(0).sqrt()
    for rank in (1, 8, 64, 190):
        with one_thread_per_operation():  # as in a job; several would only wait for each other
            a, b = low_rank([v.float(), torch.zeros(300, 200)], rank=rank, seed=0, transposed=transposed)
        assert a.shape == (rank, 300 if transposed else 200) and b.shape == (200 if transposed else 300, rank)
        product = (b.double() @ a.double()).T if transposed else b.double() @ a.double()
        # Beside the best possible only the rounding of the factors to fp32.
        assert (v - product).norm() <= 1.001 * best[rank] + 2e-6 * v.norm()


def test_both_factors_carry_half_of_each_singular_value() -> None:
    v = spectrum("quick", (40, 30))
    a, b = (x.double() for x in low_rank([v.float(), torch.zeros(40, 30)], rank=5, seed=0, transposed=False))
    expected = torch.diag(torch.linalg.svdvals(v)[:5])
    torch.testing.assert_close(a @ a.T, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(b.T @ b, expected, atol=1e-6, rtol=1e-5)


def test_matrix_of_lower_rank_than_asked_for_is_finite() -> None:
    v = torch.outer(torch.arange(20.0), torch.arange(12.0))
    a, b = low_rank([v, torch.zeros(20, 12)], rank=9, seed=0, transposed=False)
    assert torch.isfinite(a).all() and torch.isfinite(b).all()
    torch.testing.assert_close(b @ a, v, atol=1e-4, rtol=1e-5)


def test_bytes_do_not_depend_on_threads(llama: Pair, tmp_path: Path) -> None:
    reports = [make(llama, tmp_path / str(threads), 6, threads=threads) for threads in (1, 3)]
    one, three = ((tmp_path / str(n) / "adapter_model.safetensors").read_bytes() for n in (1, 3))
    assert one == three
    assert (reports[0].residual, reports[0].of_matrices) == (reports[1].residual, reports[1].of_matrices)


def test_config_says_what_peft_needs(llama: Pair, tmp_path: Path) -> None:
    make(llama, tmp_path / "v", 20)
    config = json.loads((tmp_path / "v/adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["fan_in_fan_out"]) == ("LORA", "CAUSAL_LM", False)
    assert (config["r"], config["lora_alpha"]) == (20, 20)
    assert config["base_model_name_or_path"] == str(llama[1])
    # k and v are 16 × 32: they cannot have rank 20.
    narrow = {f"model.layers.{i}.self_attn.{name}_proj": 16 for i in (0, 1) for name in "kv"}
    assert config["rank_pattern"] == config["alpha_pattern"] == narrow


def test_dry_run_writes_nothing(llama: Pair, tmp_path: Path) -> None:
    report = extract_adapter(str(llama[0]), str(llama[1]), tmp_path / "v", rank=2, dry_run=True)
    assert report.dry_run and report.matrices == 14 and list(tmp_path.iterdir()) == []


def test_globs_choose_the_matrices(llama: Pair, tmp_path: Path) -> None:
    report = extract_adapter(
        str(llama[0]), str(llama[1]), tmp_path / "v", rank=2, include=["*.layers.*"], exclude=["*.mlp.*", "*norm*"]
    )
    assert report.rest == []
    assert matrices_of(tmp_path / "v") == sorted(
        f"model.layers.{i}.self_attn.{name}_proj.weight" for i in (0, 1) for name in "qkvo"
    )


def test_nothing_to_hold_is_an_error(llama: Pair, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"no matrix differs, so there is nothing for an adapter to hold"):
        extract_adapter(str(llama[0]), str(llama[1]), tmp_path / "v", rank=2, include=["*norm*"])
    with pytest.raises(SurgeryError, match=r"^--rank: got 0, expected 1 or more$") as caught:
        make(llama, tmp_path / "v", 0)
    assert caught.value.exit_code == 2
