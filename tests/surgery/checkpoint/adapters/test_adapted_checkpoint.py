"""LoRA adapters as PEFT saves them: read through our reader they are what merge_and_unload gives."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.architectures import build
from support.audit import watch_files
from torch import Tensor
from transformers import AutoModelForCausalLM

from surgery.checkpoint.adapters.adapted_checkpoint import base_of
from surgery.checkpoint.adapters.low_rank import LowRank
from surgery.checkpoint.reader import SourceFiles, TensorInput, TensorReader
from surgery.checkpoint.resolve import open_checkpoint
from surgery.errors import SurgeryError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:`is_gradient_checkpointing`:FutureWarning")

# Entries of W + ΔW are below 2; products of rank ≤ 8 in fp32, added in another order, differ by some ulps.
TOLERANCE = 2e-6
ATTENTION = ["q_proj", "v_proj", "o_proj"]

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "llama": build("llama", folder / "llama", dtype=torch.float32, tied=False),
        "sharded": build("llama", folder / "sharded", dtype=torch.float32, tied=False, max_shard_size="20KB"),
        "tied": build("llama", folder / "tied", dtype=torch.float32, tied=True),
        "gpt2": build("gpt2", folder / "gpt2", dtype=torch.float32),
        "untied gpt2": build("gpt2", folder / "untied", dtype=torch.float32, tied=False),
    }


@pytest.fixture
def make(bases: dict[str, Path], tmp_path: Path) -> Make:
    """Saves a random adapter of any kind on one of the bases."""

    def save(base: str, config: Any = None, **options: Any) -> Path:
        model = AutoModelForCausalLM.from_pretrained(bases[base])
        wrapped = get_peft_model(model, config or LoraConfig(task_type="CAUSAL_LM", **options))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        wrapped.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return save


def merged(base: Path, adapter: Path) -> dict[str, Tensor]:
    """PEFT's own result, in fp32."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return dict(model.merge_and_unload().state_dict())


def read(ref: str | Path) -> dict[str, Tensor]:
    opened = open_checkpoint(ref)
    with SourceFiles(opened.files) as files:
        reader = TensorReader(files)
        return {name: reader.whole(TensorInput(tensor), 0).clone() for name, tensor in opened.tensors.items()}


def edit(adapter: Path, **values: object) -> Path:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | values))
    return adapter


def failure(ref: str | Path) -> str:
    with pytest.raises(SurgeryError) as caught:
        open_checkpoint(ref)
    assert "\n" not in str(caught.value)
    return str(caught.value)


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("llama", {"target_modules": ATTENTION, "r": 4, "lora_alpha": 6}),
    "every linear layer, on shards": ("sharded", {"target_modules": "all-linear", "r": 3}),
    "rank-stabilised": ("llama", {"target_modules": ATTENTION, "r": 4, "use_rslora": True}),
    "ranks and alphas by pattern": (
        "llama",
        {
            "target_modules": ATTENTION,
            "r": 4,
            "lora_alpha": 5,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 7},
            "alpha_pattern": {"self_attn.q_proj": 3, "layers.1.self_attn.(v|q)_proj": 11},
        },
    ),
    "rank-stabilised by pattern": (
        "llama",
        {
            "target_modules": ATTENTION,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"q_proj": 3},
        },
    ),
    "embedding and output head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "r": 4}),
    "modules to save": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
    ),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "r": 4}),
    "Conv1D without the flag": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 4}),
    # Of Conv1D and linear layers in one adapter the flag tells only what the last was; c_proj is square in attention.
    "Conv1D and a linear head": ("untied gpt2", {"target_modules": ["c_attn", "c_proj", "lm_head"], "r": 4}),
    "Conv1D and an embedding": ("untied gpt2", {"target_modules": ["c_proj", "wte"], "r": 4}),
    "orthogonal start": ("llama", {"target_modules": ATTENTION, "r": 4, "init_lora_weights": "orthogonal"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_reads_as_peft_merges_it(kind: str, make: Make, bases: dict[str, Path]) -> None:
    base, options = KINDS[kind]
    adapter = make(base, **options)
    expected, plain, found = merged(bases[base], adapter), read(bases[base]), read(adapter)
    assert found.keys() == plain.keys()
    moved = [name for name in found if not torch.equal(found[name], plain[name])]
    assert moved
    for name, tensor in found.items():
        assert tensor.abs().max() < 20
        torch.testing.assert_close(tensor, expected[name], rtol=TOLERANCE, atol=TOLERANCE, msg=name)
    opened = open_checkpoint(adapter)
    assert (opened.ref, opened.adapter, opened.folder) == (str(adapter), adapter, bases[base])
    if kind == "attention":
        assert moved == [
            f"model.layers.{i}.self_attn.{name}.weight"
            for i in (0, 1)
            for name in sorted(("q_proj", "v_proj", "o_proj"))
        ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_of_any_float_dtype_are_multiplied_in_full_precision(
    dtype: torch.dtype, make: Make, bases: dict[str, Path]
) -> None:
    adapter = make("llama", target_modules=ATTENTION, r=4, lora_alpha=6)
    factors = {name: t.to(dtype) for name, t in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(factors, adapter / "adapter_model.safetensors")
    plain, found = read(bases["llama"]), read(adapter)
    for i in (0, 1):
        for module in ATTENTION:
            name = f"model.layers.{i}.self_attn.{module}"
            a, b = (factors[f"base_model.model.{name}.lora_{n}.weight"].double() for n in "AB")
            exact = plain[f"{name}.weight"].double() + 1.5 * b @ a
            bound = 1e-14 if dtype == torch.float64 else TOLERANCE
            torch.testing.assert_close(found[f"{name}.weight"].double(), exact, rtol=bound, atol=bound)


@pytest.mark.parametrize("base", ["llama", "untied gpt2"])
def test_any_slice_of_an_updated_tensor_is_the_slice_of_the_whole(base: str, make: Make) -> None:
    targets = ["q_proj", "embed_tokens"] if base == "llama" else ["c_attn", "wte"]
    opened = open_checkpoint(make(base, target_modules=targets, r=3))
    updated = [tensor for tensor in opened.tensors.values() if tensor.derivation]
    assert len(updated) == 3
    assert any(isinstance(tensor.derivation, LowRank) and tensor.derivation.transposed for tensor in updated)
    with SourceFiles(opened.files) as files:
        reader = TensorReader(files)
        wholes = {tensor.name: reader.whole(TensorInput(tensor), 0).reshape(-1).clone() for tensor in updated}

        @given(which=st.integers(0, 2), ends=st.tuples(st.floats(0, 1), st.floats(0, 1)))
        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        def check(which: int, ends: tuple[float, float]) -> None:
            tensor = updated[which]
            begin, end = sorted(int(share * tensor.n_elements) for share in ends)
            found = reader.values(TensorInput(tensor), begin, end, 0)
            # A product of fewer rows may be summed in another order.
            torch.testing.assert_close(found, wholes[tensor.name][begin:end], rtol=TOLERANCE, atol=TOLERANCE)

        check()


def test_what_is_no_closed_form_is_refused_with_all_reasons_at_once(make: Make) -> None:
    adapter = make("llama", target_modules=["q_proj"], r=2, layer_replication=[(0, 2), (1, 2)])
    message = (
        "{}/adapter_config.json: cannot be rebuilt as W + ΔW: {}. "
        "Merge it with PEFT (merge_and_unload) and give the merged folder."
    )
    assert failure(adapter) == message.format(adapter, "replicated layers (layer_replication)")
    edit(adapter, use_qalora=True, peft_type="LOHA", layer_replication=None)
    assert failure(adapter) == message.format(adapter, "QA-LoRA (use_qalora); peft_type LOHA")


def test_activated_lora_is_refused_for_what_it_is(make: Make) -> None:
    adapter = edit(make("llama", target_modules=["q_proj"], r=2), alora_invocation_tokens=[1, 2])
    assert failure(adapter).endswith(
        "which changes the model after certain tokens only: no weights do that. Run it with PEFT."
    )


@pytest.mark.parametrize(
    ("initial", "what"),
    [
        ("pissa_niter_4", "a random decomposition"),
        ("corda", "data that it was initialised on"),
        ("loftq", "a quantised copy of it"),
        ("lora_ga", "gradients that it was initialised from"),
    ],
)
def test_base_that_was_changed_by_what_is_not_saved_is_refused(initial: str, what: str, make: Make) -> None:
    adapter = edit(make("llama", target_modules=["q_proj"], r=2), init_lora_weights=initial)
    message = failure(adapter)
    assert f"was trained on a changed base (init_lora_weights: {initial}), which follows from {what}, not" in message
    assert "Put the initial adapter beside it, as adapter/init." in message


def test_wrong_base_is_refused_by_name_or_shape(make: Make, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = make("llama", target_modules=["q_proj"], r=2)
    assert failure(f"{bases['gpt2']}+{adapter}") == (
        f'{adapter}: changes "model.layers.0.self_attn.q_proj.weight", which the base {bases["gpt2"]} does not have '
        "(it has transformer.h.0.attn.c_attn.bias, transformer.h.0.attn.c_attn.weight, "
        "transformer.h.0.attn.c_proj.bias and 25 more). Name the right base: BASE+ADAPTER."
    )
    other = build("mistral", tmp_path / "mistral")
    assert failure(f"{other}+{adapter}") == (
        f'{adapter}: gives "model.layers.0.self_attn.q_proj.weight" the shape [32, 32], the base has [64, 32]. '
        "Name the right base: BASE+ADAPTER."
    )


def test_integers_in_the_base_or_the_adapter_are_refused(make: Make, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = make("llama", target_modules=["q_proj"], r=2)
    shutil.copytree(bases["llama"], tmp_path / "quantised")
    tensors = load_file(bases["llama"] / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 32, dtype=torch.int8)
    save_file(tensors, tmp_path / "quantised/model.safetensors")
    assert '_proj.weight" is I8 in the base: it is quantised' in failure(f"{tmp_path / 'quantised'}+{adapter}")
    factors = {n: t.to(torch.int8) for n, t in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(factors, adapter / "adapter_model.safetensors")
    assert 'lora_A.weight" is I8, expected floats' in failure(adapter)


def test_damaged_factors_are_refused(make: Make) -> None:
    adapter = make("llama", target_modules=["q_proj"], r=2)
    weights = adapter / "adapter_model.safetensors"
    whole = load_file(weights)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    damages: list[tuple[dict[str, Tensor], str]] = [
        ({n: t for n, t in whole.items() if n != name.format("B")}, 'q_proj" has only one of lora_A and lora_B'),
        (whole | {name.format("B"): torch.zeros(32, 3)}, '_proj.lora_B.weight" [32, 3] do not multiply'),
        (whole | {name.format("A"): torch.zeros(32)}, "do not multiply"),
        (whole | {name.format(n): torch.zeros(s) for n, s in (("A", (0, 32)), ("B", (32, 0)))}, "do not multiply"),
        (whole | {"base_model.model.stranger": torch.zeros(3)}, 'changes "stranger", which the base'),
        ({}, f"{weights}: holds no tensor"),
    ]
    for damaged, message in damages:
        save_file(damaged, weights)
        assert message in failure(adapter)
    weights.unlink()
    assert failure(adapter) == f"{adapter}: has no adapter_model.safetensors. Save the adapter as safetensors."


@pytest.mark.parametrize(
    "values",
    [
        {"lora_alpha": None},
        {"alpha_pattern": {"q_proj": "NaN"}},
    ],
)
def test_alpha_that_is_no_number_is_refused(values: dict[str, object], make: Make) -> None:
    adapter = edit(make("llama", target_modules=["q_proj"], r=2), **values)
    message = failure(adapter)
    assert (
        message.startswith(f"{adapter}/adapter_config.json: lora_alpha and alpha_pattern give ") and len(message) < 400
    )


@pytest.mark.parametrize("alpha", ["x", True, math.nan, math.inf, [], {}])
def test_alpha_of_another_type_is_refused(alpha: object, make: Make) -> None:
    adapter = edit(make("llama", target_modules=["q_proj"], r=2), lora_alpha=alpha)
    assert failure(adapter).startswith(f'{adapter}/adapter_config.json: "lora_alpha": got ')
    assert failure(adapter).endswith("expected a finite number. Fetch the file again.")


def test_base_is_found_beside_the_adapter_and_by_its_path(make: Make, bases: dict[str, Path]) -> None:
    adapter = make("llama", target_modules=["q_proj"], r=2)
    assert base_of(adapter) == str(bases["llama"])
    expected = read(adapter)
    shutil.copytree(bases["llama"], adapter / "base")
    found = read(edit(adapter, base_model_name_or_path="base"))
    assert base_of(adapter) == str(adapter / "base")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_base_on_the_hub_keeps_its_revision(make: Make) -> None:
    adapter = make("llama", target_modules=["q_proj"], r=2)
    assert base_of(edit(adapter, base_model_name_or_path="org/base")) == "org/base"
    assert base_of(edit(adapter, revision="v1.0")) == "org/base@v1.0"
    assert base_of(edit(adapter, base_model_name_or_path="lab:grpo")) == "lab:grpo"


@pytest.mark.parametrize("base", [None, "", 3])
def test_adapter_without_a_base_asks_for_one(base: object, make: Make, bases: dict[str, Path]) -> None:
    adapter = edit(make("llama", target_modules=["q_proj"], r=2), base_model_name_or_path=base)
    assert failure(adapter) == (
        f'{adapter}/adapter_config.json: has no "base_model_name_or_path". Name the base yourself: BASE+ADAPTER.'
    )
    assert read(f"{bases['llama']}+{adapter}").keys() == read(bases["llama"]).keys()


def test_base_that_moved_away_is_named(make: Make) -> None:
    adapter = edit(make("llama", target_modules=["q_proj"], r=2), base_model_name_or_path="/gone/base")
    assert failure(adapter) == (
        f'{adapter}/adapter_config.json: names the base "/gone/base", which is not there. '
        "Name the base yourself: BASE+ADAPTER."
    )


def test_a_file_is_no_base_whatever_an_adapter_says(make: Make) -> None:
    adapter = edit(make("llama", target_modules=["q_proj"], r=2), base_model_name_or_path="/etc/passwd")
    with watch_files() as watched:
        assert 'names the base "/etc/passwd", which is no folder.' in failure(adapter)
    assert Path("/etc/passwd") not in watched.read


@pytest.mark.parametrize("values", [{"lora_alpha": 10**400}, {"alpha_pattern": {"q_proj": 10**400}}])
def test_numbers_that_are_no_floats_are_refused(values: dict[str, object], make: Make) -> None:
    adapter = edit(make("llama", target_modules=["q_proj"], r=2), **values)
    assert failure(adapter).startswith(f"{adapter}/adapter_config.json: holds a whole number that is larger than")


@pytest.mark.parametrize(
    ("patterns", "what"),
    [
        ([1], "alpha_pattern is no table, but [1]"),
        ({"(": 1}, "the pattern '(' does not close a group"),
        ({r"(.)\1": 1}, r"the pattern '(.)\\1' uses '\\1', which is not supported"),
        ({"x" * 100_000: 1}, "the pattern 'xxx"),
    ],
)
def test_patterns_that_cannot_be_matched_are_refused(patterns: object, what: str, make: Make) -> None:
    adapter = edit(make("llama", target_modules=["q_proj"], r=2), alpha_pattern=patterns)
    message = failure(adapter)
    assert message.startswith(f"{adapter}/adapter_config.json: {what}")
    assert len(message) < 400


def test_patterns_that_make_re_hang_are_read_at_once(make: Make) -> None:
    hostile = ("(a+)+b", "(.*)*!", "^(([a-z_.0-9])+.)+[A-Z]([a-z])+$", "([a-z_.0-9]+)+!")
    adapter = edit(make("llama", target_modules=["q_proj"], r=2), alpha_pattern=dict.fromkeys(hostile, 1))
    begin = time.perf_counter()
    open_checkpoint(str(adapter))
    assert time.perf_counter() - begin < 2
