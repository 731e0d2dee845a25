"""Names in adapters' files: as PEFT saves them, as raw state dicts have them, and under wrappers of all kinds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapters import edit_config, peft_merged, read_all, save_adapter
from support.architectures import build
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from surgery.checkpoint.adapters.adapter_weights import read_adapter_weights
from surgery.checkpoint.resolve import open_checkpoint
from surgery.errors import SurgeryError

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:Setting `save_emb"
)
PREFIX = "base_model.model."
KINDS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "trainable_tokens_delta")
OPTIONS: dict[str, Any] = {
    "target_modules": ["q_proj", "embed_tokens"],
    "modules_to_save": ["lm_head"],
    "use_dora": True,
    "r": 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("base") / "model", dtype=torch.float32, tied=False)


def renamed(adapter: Path, change: Callable[[str], str]) -> Path:
    weights = adapter / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(weights).items()}, weights)
    return adapter


def with_adapter_name(name: str) -> str:
    """As `model.state_dict()` of a PEFT model has it."""
    for kind in KINDS:
        name = name.replace(f".{kind}", f".{kind}.default")
    if name.endswith("lora_magnitude_vector.default"):
        name += ".weight"
    return name.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")


VARIANTS: dict[str, Callable[[str], str]] = {
    "as PEFT saves it": lambda name: name,
    "a raw state dict": with_adapter_name,
    "no prefix": lambda name: name.removeprefix(PREFIX),
    "no prefix, raw": lambda name: with_adapter_name(name.removeprefix(PREFIX)),
    "prefix twice": lambda name: PREFIX + name,
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled inside": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "distributed": lambda name: f"module.{name}",
    "distributed, no prefix": lambda name: f"module.{name.removeprefix(PREFIX)}",
    "checkpointed": lambda name: name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "FSDP": lambda name: name.replace(".layers.", "._fsdp_wrapped_module.layers."),
    "a model in a VLM": lambda name: name.replace("model.layers.", "model.language_model.layers."),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_say_the_same_whoever_saved_them(variant: str, base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", **OPTIONS)
    expected = peft_merged(base, adapter)
    found = read_all(renamed(adapter, VARIANTS[variant]))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens"]])
def test_backbones_and_models_with_a_head_share_adapters(targets: list[str], base: Path, tmp_path: Path) -> None:
    backbone = tmp_path / "backbone"
    AutoModel.from_pretrained(base).save_pretrained(backbone)
    whole = save_adapter(base, tmp_path / "whole", target_modules=targets, r=2)
    model = get_peft_model(AutoModel.from_pretrained(backbone), LoraConfig(target_modules=targets, r=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 if parameter.requires_grad else 0)
    model.save_pretrained(tmp_path / "bare")
    on_whole, on_bare = read_all(f"{base}+{whole}"), read_all(f"{backbone}+{whole}")
    assert all(torch.equal(on_whole[f"model.{name}"], tensor) for name, tensor in on_bare.items())
    on_whole, on_bare = read_all(f"{base}+{tmp_path / 'bare'}"), read_all(f"{backbone}+{tmp_path / 'bare'}")
    assert all(torch.equal(on_whole[f"model.{name}"], tensor) for name, tensor in on_bare.items())
    merged = model.merge_and_unload().state_dict()
    for name, tensor in on_bare.items():
        torch.testing.assert_close(tensor, merged[name], rtol=2e-6, atol=2e-6)


def test_file_of_several_adapters_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], r=2)
    weights = adapter / "adapter_model.safetensors"
    stored = load_file(weights)
    both = {name.replace(".lora_A.", f".lora_A.{one}."): x.clone() for name, x in stored.items() for one in ("a", "b")}
    save_file(both, weights)
    with pytest.raises(SurgeryError, match=r"holds 2 adapters: a, b\. Save each of them in a folder of its own"):
        read_adapter_weights(weights)


def test_bias_that_the_base_has_no_place_for_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], r=2, lora_bias=True)
    with pytest.raises(SurgeryError) as caught:
        open_checkpoint(adapter)
    assert str(caught.value) == (
        f'{adapter}: has a bias for "model.layers.0.self_attn.q_proj", which has none in the base {base}: no '
        "checkpoint of this model has a place for it"
    )


@pytest.mark.parametrize("initial", ["pissa", "pissa_niter_4", "olora"])
def test_initial_adapter_gives_the_base_that_was_trained_on(initial: str, base: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=4, lora_alpha=3, init_lora_weights=initial
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    shutil.copytree(tmp_path / "initial", tmp_path / "adapter/pissa_init")
    # PEFT's own way out, which saves a plain LoRA adapter of twice the rank.
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    expected = dict(model.merge_and_unload().state_dict())
    for folder in ("adapter", "plain"):
        for name, tensor in read_all(tmp_path / folder).items():
            torch.testing.assert_close(tensor, expected[name], rtol=4e-6, atol=4e-6, msg=name)


def test_initial_adapter_of_another_shape_is_refused(base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj"], "r": 2}
    adapter = save_adapter(base, tmp_path / "adapter", **options)
    edit_config(adapter, init_lora_weights="corda")
    save_adapter(base, adapter / "init", target_modules=["k_proj"], r=2)
    with pytest.raises(SurgeryError, match="has no factors for"):
        open_checkpoint(adapter)
    shutil.rmtree(adapter / "init")
    shutil.copytree(adapter, tmp_path / "copy")
    (tmp_path / "copy").rename(adapter / "init")
    plain = read_all(base)
    for name, tensor in read_all(adapter).items():  # trained by nothing
        torch.testing.assert_close(tensor, plain[name], rtol=4e-6, atol=4e-6)


def test_head_of_a_classifier_is_refused_for_what_it_is(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], r=2)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(SurgeryError) as caught:
        open_checkpoint(tmp_path / "adapter")
    assert f'brings "score", a head for classifying texts, which the base {base} has no place for' in str(caught.value)
    assert "right base" not in str(caught.value)


def test_config_and_weights_of_two_trainings_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], r=2)
    with pytest.raises(SurgeryError, match=r"has no lora_magnitude_vector for .*, and is a DoRA adapter by its config"):
        open_checkpoint(edit_config(adapter, use_dora=True))
    shutil.rmtree(adapter)
    edit_config(save_adapter(base, adapter, target_modules=["q_proj"], r=2, use_dora=True), use_dora=False)
    with pytest.raises(SurgeryError, match=r"has a lora_magnitude_vector for .*, and is no DoRA adapter by its config"):
        open_checkpoint(adapter)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 4), (0, 32)])
def test_tensors_of_any_shape_are_refused_in_words(shape: tuple[int, ...], base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", **{**OPTIONS, "trainable_token_indices": None})
    weights = adapter / "adapter_model.safetensors"
    stored = load_file(weights)
    for name in stored:
        if "layers.1" not in name:
            save_file({**stored, name: torch.zeros(shape)}, weights)
            with pytest.raises(SurgeryError):
                open_checkpoint(adapter)
