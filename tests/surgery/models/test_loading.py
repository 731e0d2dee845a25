"""What runs is what was inspected, whatever else a stranger's folder holds or names."""

from __future__ import annotations

import gc
import json
import pickle
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.audit import watch_files
from support.chat_tokenizer import make_tokenizer
from support.models import save
from transformers import AutoModelForCausalLM

from surgery.checkpoint.checkpoint import read_folder
from surgery.errors import SurgeryError
from surgery.models.loading import load_model, load_tokenizer, load_weights

IDS = torch.tensor([[9, 20, 31, 42]])
PROTECTION = ("trust_remote_code", "weights_only", "pickle", "HF_HUB_OFFLINE")


class Bomb:
    """What a pickle does when it is opened."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save("llama", tmp_path_factory.mktemp("plain") / "m")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plain: Path) -> Iterator[None]:
    """No connection is opened, and nothing read or written outside of the test's own folder."""
    (tmp_path / "staged").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "staged"))

    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    gc.collect()  # models of earlier tests, which remove what was staged for them when they go
    with watch_files() as files:
        yield
    files.check(reads=[tmp_path, plain], writes=[tmp_path])


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found = model(IDS)
    return (found[0] if isinstance(found, tuple) else found.logits).float()


def expect_plain(folder: Path, plain: Path) -> Any:
    loaded = load_model(folder, "it")
    torch.testing.assert_close(logits(loaded.model), logits(AutoModelForCausalLM.from_pretrained(plain)))
    assert loaded.tokenizer.name_or_path == loaded.model.config.name_or_path == str(folder)
    return loaded.model


def bomb(folder: Path, proof: Path, name: str = "pytorch_model.bin") -> None:
    (folder / name).write_bytes(pickle.dumps(Bomb(proof)))


def another_model(folder: Path, name: str = "model.safetensors") -> None:
    tensors = {key: torch.randn_like(tensor) for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / name, metadata={"format": "pt"})


@pytest.mark.parametrize("weights", ["model.safetensors", "weights.safetensors", "model-00001-of-00001.safetensors"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "tf_model.h5", "model.gguf", "consolidated.00.pth"])
def test_weights_in_other_formats_are_never_opened(model, plain, tmp_path, weights, name):
    (model / "model.safetensors").rename(model / weights)
    bomb(model, tmp_path / "exploded", name)
    (model / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "pytorch_model.bin"}}')
    expect_plain(model, plain)
    assert not (tmp_path / "exploded").exists()


def test_shards_without_an_index_and_under_names_of_their_own_are_what_runs(model, plain):
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    for number in range(3):
        save_file({name: tensors[name] for name in names[number::3]}, model / f"part {number}.safetensors")
    (model / "model.safetensors").unlink()
    expect_plain(model, plain)


def test_an_index_of_an_unusual_name_is_followed_and_another_one_is_not(model, plain):
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "w.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "w.safetensors")}
    (model / "own.safetensors.index.json").write_text(json.dumps(index))
    save_file({"x": torch.zeros(1)}, model / "consolidated.safetensors")
    expect_plain(model, plain)


def test_a_shard_with_a_stale_copy_of_a_tensor_is_not_run(model):
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:4]}, model / "a.safetensors")
    stale = {name: torch.zeros_like(tensors[name]) for name in names[3:4]}
    save_file({name: tensors[name] for name in names[4:]} | stale, model / "b.safetensors")
    (model / "model.safetensors").unlink()
    weight_map = {name: "a.safetensors" if number < 4 else "b.safetensors" for number, name in enumerate(names)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert read_folder(model).tensors[names[3]].file.name == "a.safetensors"
    with pytest.raises(SurgeryError, match=rf'"{names[3]}" is in b.safetensors too, and the index says'):
        load_weights(model, "it")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("base", [None, "evil/base", "/etc"])
def test_an_adapter_that_lies_in_a_model_s_folder_is_not_applied(model, plain, tmp_path, base):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(tmp_path / "adapter")
    for path in (tmp_path / "adapter").iterdir():
        shutil.copy(path, model)
    edit(model / "adapter_config.json", base_model_name_or_path=base)
    expect_plain(model, plain)


@pytest.mark.parametrize(
    "values",
    [
        {"transformers_weights": "other.safetensors"},
        {"transformers_weights": "../other.safetensors"},
        {"auto_map": {"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.OwnConfig"}},
        {"attn_implementation": "evil/kernels"},
        {"_attn_implementation": "evil/kernels:run", "_attn_implementation_internal": "evil/kernels"},
        {"experts_implementation": "evil/kernels", "_experts_implementation": "evil/kernels"},
        {"return_dict": False, "output_attentions": True, "output_hidden_states": True, "torchscript": True},
        {"_name_or_path": "evil/model", "name_or_path": "/etc", "base_model_name_or_path": "evil/model"},
        {"fusion_config": {"evil": 1}, "distributed_config": {"tp": 2}, "device_map": {"": "disk"}},
    ],
)
def test_a_config_chooses_neither_files_nor_code_nor_kernels(model, plain, tmp_path, values):
    (model / "own.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    another_model(model, "../other.safetensors")
    if "other" in values.get("transformers_weights", ""):
        shutil.copy(tmp_path / "other.safetensors", model / "other.safetensors")
    edit(model / "config.json", **values)
    found = expect_plain(model, plain)
    assert not (tmp_path / "exploded").exists() and not hasattr(found.config, "transformers_weights")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"num_hidden_layers": 10**4}, "num_hidden_layers is 10,000, more than its weights can hold"),
        ({"num_hidden_layers": 3}, "lacks 9 weights of the model that its config describes"),
        ({"intermediate_size": 10**6}, "its config describes .* parameters, and it holds"),
        ({"intermediate_size": 97}, "in another shape: model.layers.0.mlp"),
        ({"vocab_size": 10**7}, "its config describes .* parameters"),
        ({"model_type": "evil", "auto_map": {"AutoConfig": "own.C"}}, "it: needs code of its own, which is not run"),
        ({"model_type": "evil"}, "it: transformers knows no model of type 'evil'"),
        ({"model_type": ["llama"]}, '"model_type": got a list of 1, expected text'),
        ({"model_type": "clip"}, "it: is no language model: transformers has none of type 'clip'"),
        ({"hidden_size": "many"}, "got 'many', expected a whole number"),
        ({"hidden_size": 0}, "it: "),
        ({"num_attention_heads": 0}, "it: "),
        ({"dtype": "load"}, "it: cannot be loaded"),
        ({"hidden_act": "evil"}, "it: cannot be loaded"),
        ({"rope_scaling": {"rope_type": "evil"}}, "it: cannot be loaded"),
        ({"quantization_config": {"quant_method": "torchao"}}, "quantised as 'torchao', and only awq"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "x": "re:(a+)+$"}}, "'compressed-tensors'"),
        ({"quantization_config": {"bits": 4}}, "its weights are quantised as 'None'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "it: cannot be loaded"),
    ],
)
def test_a_config_that_its_weights_do_not_fit_is_one_line(model, tmp_path, values, reason):
    edit(model / "config.json", **values)
    with pytest.raises(SurgeryError, match=reason) as caught:
        load_weights(model, "it")
    assert not any(word in str(caught.value) for word in PROTECTION) and len(str(caught.value)) < 600
    assert "staged" not in str(caught.value)
    assert not list((tmp_path / "staged").iterdir())


def test_a_generation_config_says_which_tokens_end_and_not_what_is_run(model, tmp_path):
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    edit(
        model / "generation_config.json",
        eos_token_id=[3, 5],
        num_beams=10**6,
        max_length=10**9,
        custom_generate="evil/code",
        assistant_model="evil/model",
    )
    config = load_weights(model, "it").generation_config
    assert config.eos_token_id == [3, 5] and config.num_beams in (None, 1) and config.max_length != 10**9
    assert not hasattr(config, "custom_generate") and not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    "values",
    [
        {"tokenizer_file": "../secret.json", "vocab_file": "../secret.json", "merges_file": "/etc/passwd"},
        {"name_or_path": "evil/model", "special_tokens_map_file": "/etc/passwd", "cache_dir": "/etc"},
        {"init_inputs": ["../secret.json", "/etc/passwd"]},
        {"tokenizer_object": "x", "gguf_file": "model.gguf", "subfolder": "..", "local_files_only": False},
    ],
)
def test_a_tokenizer_s_settings_name_no_files(model, tmp_path, name, values):
    secret = json.loads((model / "tokenizer.json").read_text())
    secret["model"]["vocab"] = {token: number for number, token in enumerate(reversed(secret["model"]["vocab"]))}
    (tmp_path / "secret.json").write_text(json.dumps(secret))
    edit(model / name, **values)
    tokenizer = load_tokenizer(model, "it")
    assert tokenizer("hm")["input_ids"] == make_tokenizer()("hm")["input_ids"]
    assert tokenizer.name_or_path == str(model)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda folder: edit(folder / "tokenizer_config.json", tokenizer_class="AutoModelForCausalLM"),
        lambda folder: edit(folder / "tokenizer_config.json", tokenizer_class="pipeline"),
        lambda folder: edit(folder / "tokenizer_config.json", tokenizer_class=["PreTrainedTokenizerFast"]),
        lambda folder: edit(folder / "tokenizer_config.json", added_tokens_decoder={"x": 1}),
        lambda folder: edit(folder / "tokenizer.json", model={"type": "BPE", "vocab": {"a": 2**63}, "merges": []}),
        lambda folder: (folder / "tokenizer.json").write_text("[]"),
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
        lambda folder: edit(
            folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own"
        ),
    ],
)
def test_a_damaged_tokenizer_is_one_line(model, tmp_path, break_it: Callable[[Path], object]):
    (model / "own.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    break_it(model)
    with pytest.raises(SurgeryError) as caught:
        load_tokenizer(model, "it")
    assert not any(word in str(caught.value) for word in PROTECTION) and len(str(caught.value)) < 600
    assert not (tmp_path / "exploded").exists() and not list((tmp_path / "staged").iterdir())


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_links_out_of_the_folder_are_not_followed(model, tmp_path, name):
    (model / name).replace(tmp_path / name)
    (model / name).symlink_to(tmp_path / name)
    with pytest.raises(SurgeryError, match="is a link that leads out of its folder"):
        load_model(model, "it")


def test_what_is_staged_lives_as_long_as_the_model(model, tmp_path):
    loaded = load_model(model, "it")
    assert len(list((tmp_path / "staged").iterdir())) == 2
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    del loaded
    gc.collect()
    assert not list((tmp_path / "staged").iterdir())
    assert (model / "model.safetensors").is_file()
