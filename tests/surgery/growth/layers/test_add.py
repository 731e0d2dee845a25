"""Layers added on files: identities change nothing, copies are copies, random ones come again; all else stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.architectures import ARCHITECTURES, add_tokenizer, build
from support.merges import config_of, files_of, logits_of, tensors_of
from torch import Tensor

import surgery.engine.storage.journal
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.structure import model_structure
from surgery.engine.manifest import read_manifest
from surgery.engine.options import ExecutionOptions
from surgery.engine.verification import verify
from surgery.errors import SurgeryError
from surgery.growth.layers.add import add_layers, write_config
from surgery.growth.layers.plan_layers import source_layers
from surgery.growth.plan import LayerPosition
from surgery.io.hashing import KEY

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 1,
}
PLACES: list[LayerPosition] = ["top", "middle", 0]
DENSE_FIRST = ("deepseek_v3", "glm4_moe")  # a dense layer, then one with experts: a row of both can stand nowhere else


def fp32(family: str, folder: Path, **options: Any) -> Path:
    return build(family, folder, dtype=torch.float32, **options)


def saved(kind: str, folder: Path, **values: Any) -> Path:
    """A model of another family than those of the factory, all of whose weights are off their first values."""
    config = getattr(transformers, kind)(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def change_config(folder: Path, **values: Any) -> Path:
    """Sets values of config.json; None takes them out."""
    config = {key: value for key, value in (config_of(folder) | values).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def by_layer(folder: Path) -> tuple[dict[int, dict[str, Tensor]], dict[str, Tensor]]:
    """Layer → name inside it → tensor; and what lies outside the layers."""
    shape, tensors = model_structure(open_checkpoint(folder)), tensors_of(folder)
    start = f"{shape.stack}." if shape.stack else ""
    layers = {
        block.index: {name.removeprefix(f"{start}{block.index}."): tensors[name] for name in block.names}
        for block in shape.blocks
    }
    return layers, {name: x for name, x in tensors.items() if shape.layer_of(name) is None}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


def order_of(position: int, layers: int, held: int) -> list[int]:
    return [*range(position), *source_layers(position, layers, held), *range(position, held)]


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_identity_layers_leave_the_logits_as_they_are(family: str, at: LayerPosition, tmp_path: Path) -> None:
    base = fp32(family, tmp_path / "base")
    count = 1 if family in DENSE_FIRST else 2
    report = add_layers(str(base), tmp_path / "out", at=at, layers=count)
    assert (logits_of(tmp_path / "out") - logits_of(base)).abs().max() <= 1e-6
    assert not report.warnings
    assert "proved by running a layer" in report.preflight["identity"]
    old, outside = by_layer(base)
    new, beside = by_layer(tmp_path / "out")
    kept = [number for number in new if number not in report.new]
    assert [report.layers_before, report.layers_after] == [len(old), len(new)] == [len(old), len(old) + count]
    assert all(same(new[number], old[index]) for index, number in enumerate(kept)) and same(outside, beside)
    for number, origin in zip(report.new, report.origins, strict=True):
        assert origin is not None
        zeros = {name for name, x in new[number].items() if not x.any()}
        assert zeros and all(torch.equal(x, old[origin][n]) for n, x in new[number].items() if n not in zeros)
    assert verify(str(tmp_path / "out")).ok


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "deepseek_v3", "gpt_oss"])
def test_copies_are_what_stacking_by_hand_gives(family: str, at: LayerPosition, tmp_path: Path) -> None:
    base = fp32(family, tmp_path / "base", max_shard_size="20KB")
    report = add_layers(str(base), tmp_path / "out", at=at, init="copy")
    old, outside = by_layer(base)
    new, beside = by_layer(tmp_path / "out")
    order = order_of(report.new[0], 1, len(old))
    assert [same(new[number], old[index]) for number, index in enumerate(order)] == [True] * len(order)
    assert same(outside, beside)
    assert report.edited == 0
    assert torch.isfinite(logits_of(tmp_path / "out")).all()


@pytest.mark.parametrize(
    ("position", "layers", "held", "expected"),
    [
        (4, 1, 4, [3]),
        (4, 3, 4, [1, 2, 3]),
        (2, 1, 4, [1]),
        (0, 2, 4, [0, 1]),
        (2, 3, 4, [0, 1, 0]),
        (0, 3, 2, [0, 1, 0]),
        (1, 2, 1, [0, 0]),
        (0, 2, 0, []),
    ],
)
def test_new_layers_are_like_those_below(position: int, layers: int, held: int, expected: list[int]) -> None:
    assert source_layers(position, layers, held) == expected


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "deepseek_v3", "gpt_oss"])
def test_random_layers_are_of_the_family_and_the_same_for_a_seed(family: str, tmp_path: Path) -> None:
    base = fp32(family, tmp_path / "base")
    count = 1 if family in DENSE_FIRST else 2
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        report = add_layers(str(base), tmp_path / name, init="random", layers=count, seed=seed)
    one, other = (by_layer(tmp_path / name)[0] for name in ("one", "other"))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "again")
    assert not any(same(one[number], other[number]) for number in report.new)
    assert count == 1 or not same(one[report.new[0]], one[report.new[1]])
    assert torch.isfinite(logits_of(tmp_path / "one")).all()
    old, outside = by_layer(base)
    assert all(same(one[number], old[number]) for number in old) and same(by_layer(tmp_path / "one")[1], outside)
    assert not (tmp_path / "one.fresh").exists()


def test_random_layers_begin_as_transformers_begins_them_at_that_depth(tmp_path: Path) -> None:
    base = fp32("gpt2", tmp_path / "base")
    report = add_layers(str(base), tmp_path / "out", init="random", layers=6)
    new, _ = by_layer(tmp_path / "out")
    made = [new[number] for number in report.new]
    scaled = torch.stack([layer["mlp.c_proj.weight"] for layer in made]).std()
    plain = torch.stack([layer["mlp.c_fc.weight"] for layer in made]).std()
    assert plain == pytest.approx(0.02, rel=0.02)
    assert scaled == pytest.approx(0.02 / (2 * 8) ** 0.5, rel=0.02), "GPT-2 scales by the depth, here 8"
    assert all((layer["ln_1.weight"] == 1).all() and (layer["ln_1.bias"] == 0).all() for layer in made)


def test_random_layers_one_by_one_are_those_at_once(tmp_path: Path) -> None:
    base = fp32("llama", tmp_path / "base")
    add_layers(str(base), tmp_path / "two", init="random", layers=2)
    add_layers(str(base), tmp_path / "first", init="random")
    add_layers(str(tmp_path / "first"), tmp_path / "second", init="random")
    assert same(tensors_of(tmp_path / "two"), tensors_of(tmp_path / "second"))


@pytest.mark.parametrize("init", ["copy", "identity"])
def test_a_single_layer_deepened_twice_is_that_deepened_by_two(init: Any, tmp_path: Path) -> None:
    base = saved("LlamaConfig", tmp_path / "base", **SMALL | {"num_hidden_layers": 1})
    add_layers(str(base), tmp_path / "two", init=init, layers=2)
    add_layers(str(base), tmp_path / "first", init=init)
    add_layers(str(tmp_path / "first"), tmp_path / "second", init=init)
    assert same(tensors_of(tmp_path / "two"), tensors_of(tmp_path / "second"))
    assert config_of(tmp_path / "two") == config_of(tmp_path / "second")


def test_untouched_tensors_keep_their_hash_and_the_manifest_says_so(tmp_path: Path) -> None:
    base = add_tokenizer(fp32("llama", tmp_path / "base"))
    add_layers(str(base), tmp_path / "one", init="copy", at=1)
    add_layers(str(tmp_path / "one"), tmp_path / "out", at=0)
    before, after = read_manifest(tmp_path / "one"), read_manifest(tmp_path / "out")
    for number in range(3):
        for name in ("self_attn.q_proj.weight", "mlp.down_proj.weight"):
            old = before["tensors"][f"model.layers.{number}.{name}"]
            new = after["tensors"][f"model.layers.{number + 1}.{name}"]
            assert new[KEY] == old[KEY] and not new["edited"]
    assert after["report"]["new"] == [0] and after["report"]["layers_after"] == 4
    typed = f"surgery grow add {tmp_path / 'one'} -o OUT --layers 1 --at 0 --init identity --seed 0"
    assert after["command"]["line"] == typed
    assert "layer 0 is new" in (tmp_path / "out/README.md").read_text()
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_what_the_layers_are_moves_with_them(tmp_path: Path) -> None:
    gemma = fp32("gemma2", tmp_path / "gemma")
    add_layers(str(gemma), tmp_path / "a", at=1, layers=2)
    assert config_of(tmp_path / "a")["layer_types"] == [
        "sliding_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
    ]
    deepseek = fp32("deepseek_v3", tmp_path / "deepseek")
    add_layers(str(deepseek), tmp_path / "b", at=1)
    assert config_of(tmp_path / "b")["first_k_dense_replace"] == 2


def test_kinds_that_the_config_leaves_to_the_family_are_spelled_out(tmp_path: Path) -> None:
    """Original Gemma 2 configs have no layer_types: every other layer slides, by its number."""
    base = change_config(fp32("gemma2", tmp_path / "base"), layer_types=None, sliding_window=2)
    tokens = list(range(5, 25))
    add_layers(str(base), tmp_path / "out", at=1)
    assert config_of(tmp_path / "out")["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]
    assert torch.equal(logits_of(tmp_path / "out", tokens), logits_of(base, tokens))


def test_a_hybrid_gets_layers_of_the_kind_below(tmp_path: Path) -> None:
    base = saved(
        "Lfm2Config", tmp_path / "base", **SMALL, num_key_value_heads=2, layer_types=["conv", "full_attention"]
    )
    for at, kind in ((1, "conv"), (2, "full_attention")):
        out = tmp_path / f"at-{at}"
        add_layers(str(base), out, at=at)
        assert config_of(out)["layer_types"][at] == kind
        assert torch.equal(logits_of(out), logits_of(base))
        add_layers(str(base), tmp_path / f"random-{at}", at=at, init="random")
        assert torch.isfinite(logits_of(tmp_path / f"random-{at}")).all()


def test_stored_dtypes_are_kept_or_changed_as_asked(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    add_layers(str(base), tmp_path / "kept", init="random")
    assert {x.dtype for x in tensors_of(tmp_path / "kept").values()} == {torch.bfloat16}
    add_layers(str(base), tmp_path / "wide", dtype="float32")
    assert {x.dtype for x in tensors_of(tmp_path / "wide").values()} == {torch.float32}
    assert config_of(tmp_path / "wide")["dtype"] == "float32"


def with_layer_ahead(folder: Path) -> Path:
    """Gives a DeepSeek of two layers a third that predicts a further token, as it is stored on the Hub."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    ahead = {name.replace("layers.1.", "layers.2."): x + 1 for name, x in tensors.items() if "layers.1." in name}
    ahead["model.layers.2.eh_proj.weight"] = torch.randn(32, 64)
    save_file(tensors | ahead, path, metadata={"format": "pt"})
    return folder


def test_layers_that_predict_further_ahead_stay_behind_the_last(tmp_path: Path) -> None:
    base = with_layer_ahead(fp32("deepseek_v3", tmp_path / "base"))
    report = add_layers(str(base), tmp_path / "out")
    old, new = tensors_of(base), tensors_of(tmp_path / "out")
    ahead = {name: x for name, x in old.items() if "layers.2." in name}
    assert ahead and all(torch.equal(new[name.replace("layers.2.", "layers.3.")], x) for name, x in ahead.items())
    assert report.new == (2,) and not new["model.layers.2.self_attn.o_proj.weight"].any()
    assert "1 layer(s) that predict further" in report.preflight["beyond"]


@pytest.mark.parametrize("init", ["identity", "random"])
def test_interrupted_it_goes_on_to_the_same_bytes(init: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = fp32("llama", tmp_path / "base")
    add_layers(str(base), tmp_path / "whole", init=init, layers=2)
    add = surgery.engine.storage.journal.Journal.append
    left = 25

    def killed(journal: Any, record: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        add(journal, record)

    with monkeypatch.context() as patch:
        patch.setattr(surgery.engine.storage.journal.Journal, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            add_layers(str(base), tmp_path / "out", init=init, layers=2, options=ExecutionOptions(threads=1))
    assert not (tmp_path / "out").exists()
    if init == "random":
        leave_random_weights(tmp_path / "out.fresh")  # as kill −9 would
    report = add_layers(str(base), tmp_path / "out", init=init, layers=2)
    assert report.resumed_bytes > 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not list(tmp_path.glob("out.*"))


def leave_random_weights(folder: Path) -> None:
    folder.mkdir()
    (folder / ".random-weights").touch()
    (folder / "half").write_text("a file that was not finished")


def test_a_folder_in_the_way_is_left_alone(tmp_path: Path) -> None:
    base = fp32("llama", tmp_path / "base")
    (tmp_path / "out.fresh").mkdir()
    (tmp_path / "out.fresh/mine").touch()
    with pytest.raises(SurgeryError, match=r"out\.fresh: is in the way"):
        add_layers(str(base), tmp_path / "out", init="random")
    assert (tmp_path / "out.fresh/mine").exists()


@pytest.mark.parametrize("init", ["identity", "copy", "random"])
def test_a_dry_run_tells_all_and_writes_nothing(init: Any, tmp_path: Path) -> None:
    base = fp32("llama", tmp_path / "base")
    dry = add_layers(str(base), tmp_path / "out", init=init, at=1, dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert dry.dry_run and dry.new == (1,) and dry.preflight["layers"] == f"2 → 3; new: 1, {init}"
    real = add_layers(str(base), tmp_path / "out", init=init, at=1)
    assert (dry.tensors, dry.edited, dry.parameters) == (real.tensors, real.edited, real.parameters)
    assert dry.parameters == (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32,)
    assert real.table().to_markdown().count("\n") > 2


def refused(base: Path, match: str, **options: Any) -> None:
    out = base.with_name("refused")
    with pytest.raises(SurgeryError, match=match):
        add_layers(str(base), out, **options)
    assert not out.exists() and not list(out.parent.glob("refused.*"))


def test_requests_that_cannot_be_are_named(tmp_path: Path) -> None:
    base = fp32("llama", tmp_path / "base")
    refused(base, "--at: got 3, expected top, middle, or 0 to 2", at=3)
    refused(base, "--at: got -1, expected", at=-1)
    refused(base, "--layers: got 0, expected 1 or more", layers=0)
    refused(base, "--init: got 'noise', expected one of identity, random, copy", init="noise")
    with pytest.raises(SurgeryError, match="would take the place of the model"):
        add_layers(str(base), base.parent)
    with pytest.raises(SurgeryError, match="lies inside the model"):
        add_layers(str(base), base / "out")


@pytest.mark.parametrize(
    ("kind", "values", "match"),
    [
        (
            "OPTConfig",
            {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
            "layer 1 of .* is no identity when what it writes is zero .fc2.bias, fc2.weight, self_attn.out_proj",
        ),
        (
            "RwkvConfig",
            {"attention_hidden_size": 32},
            "nothing was recognised by which layer 1 of .* writes .* Not understood: attention.output.weight",
        ),
        (
            "JetMoeConfig",
            {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4},
            "is no identity .* Not understood: mlp.bias",
        ),
    ],
)
def test_what_is_no_identity_is_refused(kind: str, values: dict[str, Any], match: str, tmp_path: Path) -> None:
    base = saved(kind, tmp_path / "base", **SMALL | values)
    refused(base, match)
    add_layers(str(base), tmp_path / "copied", init="copy")
    assert torch.isfinite(logits_of(tmp_path / "copied")).all()


@pytest.mark.parametrize("init", ["identity", "copy", "random"])
def test_layers_that_would_become_of_another_kind_are_refused(init: Any, tmp_path: Path) -> None:
    """Ernie's config counts from which layer on there are experts, which nothing here rewrites: building it tells."""
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1}
    base = saved("Ernie4_5_MoeConfig", tmp_path / "base", **SMALL, num_key_value_heads=2, **experts)
    refused(base, "layer 0 would stand at 1, and there be of another kind .mlp", init=init, at=0)


def test_periods_and_numbers_that_no_config_can_say_are_refused(tmp_path: Path) -> None:
    base = change_config(fp32("llama", tmp_path / "base"), full_attention_interval=2)
    refused(base, "layer 1 would stand at 2, where full_attention_interval 2 makes it one of another kind", init="copy")
    gpt2 = change_config(fp32("gpt2", tmp_path / "gpt2"), scale_attn_by_inverse_layer_idx=True)
    refused(gpt2, "scale_attn_by_inverse_layer_idx True makes layers depend on where they stand")


def test_a_family_that_transformers_does_not_know_can_only_be_copied(tmp_path: Path) -> None:
    base = change_config(fp32("llama", tmp_path / "base"), model_type="homemade")
    refused(base, "cannot be proved an identity: transformers knows no family 'homemade'")
    refused(base, "transformers knows no family 'homemade'", init="random")
    report = add_layers(str(base), tmp_path / "out", init="copy")
    assert "that every layer stays of its kind was not tried" in report.warnings[0]
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 3


def test_parts_of_models_and_configs_that_disagree_are_refused(tmp_path: Path) -> None:
    base = fp32("qwen2", tmp_path / "base")
    other = change_config(shutil.copytree(base, tmp_path / "other"), num_hidden_layers=5)
    refused(Path(other), "its config says 5 layers, its names hold 3")
    path = base / "model.safetensors"
    kept = {name: x for name, x in load_file(path).items() if ".layers.0." not in name}
    save_file(kept, path, metadata={"format": "pt"})
    refused(base, "holds 2 layers from 1 to 2: a part of a model")


def test_quantised_models_are_only_copied(tmp_path: Path) -> None:
    base = change_config(fp32("llama", tmp_path / "base"), quantization_config={"quant_method": "gptq"})
    refused(base, "is quantised .gptq., and its stored values are not its weights")
    refused(base, "is quantised .gptq.", init="copy", dtype="bfloat16")
    report = add_layers(str(base), tmp_path / "out", init="copy")
    assert report.new == (2,)
    method = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.1.mlp"]}
    change_config(base, quantization_config=method)
    refused(base, r"quantization_config of .* names layers by number .'layers.1'", init="copy")


def test_a_layer_that_transformers_would_name_otherwise_is_no_template(tmp_path: Path) -> None:
    base = fp32("llama", tmp_path / "base")
    path = base / "model.safetensors"
    renamed = {name.replace("q_proj", "query"): x for name, x in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})
    refused(base, "transformers names this layer's tensors otherwise .self_attn.q_proj.weight.")
    refused(base, "layer 1 of .* is not what transformers makes: self_attn.q_proj.weight is missing", init="random")


def test_a_config_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(SurgeryError, match=r"config\.json: is a folder, expected a file"):
        write_config(tmp_path, {})
