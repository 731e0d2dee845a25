"""Weights that are seen dequantised are those that transformers computes, in any slice; nothing says what they were."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import quantised as q
from support.architectures import build
from support.quantised import mxfp4, quantised, reconfigure, rewrite
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.layouts.layout_view import seen_as
from surgery.checkpoint.quantised.quantisation import find_quantisation
from surgery.checkpoint.reader import SourceFiles, TensorReader
from surgery.checkpoint.resolve import open_checkpoint
from surgery.errors import SurgeryError

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def read(checkpoint: Checkpoint, name: str, begin: int = 0, end: int | None = None) -> Tensor:
    tensor = checkpoint.tensors[name]
    with SourceFiles(checkpoint.files) as files:
        stop = tensor.n_elements if end is None else end
        values = TensorReader(files).tensor(tensor, begin, stop, "test").clone()
    return values.view(tensor.shape) if end is None else values


def single(tmp_path: Path, **tensors: Tensor) -> Checkpoint:
    """The tensors, with dots for double underscores in their names, in one file, dequantised."""
    path = tmp_path / "one.safetensors"
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)
    return open_checkpoint(path, dequantise=True)


def codes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)


def scales(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def by_blocks(values: Tensor, scale: Tensor, height: int, width: int) -> Tensor:
    """Element by element, in float64."""
    out = torch.empty(values.shape, dtype=torch.float64)
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            out[i, j] = values[i, j].double() * scale[i // height, j // width].double()
    return out


def bf16(values: Tensor) -> Tensor:
    """Rounded as an fp32 product is: of 4 and 24 bits it has 28, and they are rounded twice."""
    return values.float().bfloat16()


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv", "scale_weight", "qscale_weight", "scale"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_all(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    weight, scale = codes(6, 10), scales(*shape)
    model = single(tmp_path, **{"a__weight": weight, f"a__{name}": scale, "a__bias": torch.ones(6)})

    assert list(model.tensors) == ["a.bias", "a.weight"]
    assert (model.tensors["a.weight"].dtype, model.tensors["a.weight"].shape) == ("BF16", (6, 10))
    assert torch.equal(read(model, "a.weight"), bf16(weight.double() * scale.double().reshape(())))


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_a_scale_per_output(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight, scale = codes(6, 10), scales(*shape)
    model = single(tmp_path, a__weight=weight, a__weight_scale=scale)
    assert torch.equal(read(model, "a.weight"), bf16(weight.double() * scale.double().view(6, 1)))


@pytest.mark.parametrize("size", [(128, 128), (256, 384), (130, 200), (160, 300), (1, 129), (129, 1)])
def test_blocks_at_the_edge_are_smaller(size: tuple[int, int], tmp_path: Path) -> None:
    weight, scale = codes(*size), scales(-(-size[0] // 128), -(-size[1] // 128))
    model = single(tmp_path, a__weight=weight, a__weight_scale_inv=scale)
    assert torch.equal(read(model, "a.weight"), bf16(by_blocks(weight, scale, 128, 128)))


def test_the_config_says_how_large_blocks_are(tmp_path: Path) -> None:
    quantise = partial(q.fp8, scale="weight_scale_inv", shape="block", block=24)
    settings_ = {"quant_method": "fp8", "weight_block_size": [24, 24]}
    folder = quantised(tmp_path / "model", quantise, quantization_config=settings_)
    stored = load_file(folder / "model.safetensors")
    model = open_checkpoint(folder, dequantise=True)
    names = [name for name in model.tensors if name.endswith("_proj.weight")]
    assert len(names) > 10
    for name in names:
        expected = by_blocks(stored[name], stored[f"{name}_scale_inv"], 24, 24)
        assert torch.equal(read(model, name), bf16(expected))


def test_fused_experts_have_their_own_scales(tmp_path: Path) -> None:
    weight = codes(3, 8, 12)
    for shape in ((3,), (3, 1, 1), (3, 8, 1), (3, 1, 12), (3, 4, 3)):
        scale = scales(*shape)
        model = single(tmp_path, experts__gate_up_proj=weight, experts__gate_up_proj_scale=scale)
        full = scale.double().reshape(*shape, *(1 for _ in range(3 - len(shape))))
        for axis, size in enumerate(weight.shape):
            full = full.repeat_interleave(size // full.shape[axis], axis)
        assert torch.equal(read(model, "experts.gate_up_proj"), bf16(weight.double() * full))


def test_mxfp8_and_fp4_have_exponents_for_scales(tmp_path: Path) -> None:
    exponents = torch.randint(120, 130, (4, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    factors = torch.exp2(exponents.double() - 127).repeat_interleave(32, 1)
    weight = codes(4, 64)
    for scale in (exponents, exponents.view(torch.float8_e8m0fnu)):
        model = single(tmp_path, a__weight=weight, a__weight_scale_inv=scale)
        assert torch.equal(read(model, "a.weight"), bf16(weight.double() * factors))
    packed = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    model = single(tmp_path, a__weight=packed.view(torch.int8), a__scale=exponents.view(torch.float8_e8m0fnu))
    assert torch.equal(read(model, "a.weight"), bf16(unpacked(packed) * factors))


def unpacked(data: Tensor) -> Tensor:
    """The FP4 values of bytes, the lower half first, in float64."""
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)
    return torch.stack([values[(data & 15).long()], values[(data >> 4).long()]], -1).flatten(-2)


def test_gpt_oss_in_its_original_format_is_not_transposed(tmp_path: Path) -> None:
    blocks, exponents = mx_parts()
    name = "block.0.mlp.mlp1_weight"
    path = tmp_path / "one.safetensors"
    save_file({f"{name}.blocks": blocks, f"{name}.scales": exponents}, path)
    model = open_checkpoint(path, dequantise=True)
    expected = convert_moe_packed_tensors(blocks, exponents).transpose(1, 2)
    assert torch.equal(read(model, name), expected)


def mx_parts(experts: int = 3, rows: int = 10, groups: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(0, 255, (experts, rows, groups), generator=generator, dtype=torch.uint8)


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, exponents = mx_parts()
    expected = convert_moe_packed_tensors(blocks, exponents)
    reference = unpacked(blocks).view(3, 10, 3, 32) * torch.exp2(exponents.double() - 127)[..., None]
    assert torch.equal(expected, bf16(reference.flatten(2)).transpose(1, 2))
    for name in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"):
        path = tmp_path / "one.safetensors"
        save_file({f"{name}_blocks": blocks, f"{name}_scales": exponents}, path)
        for limit in (1 << 22, 100):  # bytes of a panel: rows are then read one or two at a time
            monkeypatch.setattr("surgery.checkpoint.quantised.block_scaled._PANEL_BYTES", limit)
            model = open_checkpoint(path, dequantise=True)
            assert model.tensors[name].shape == (3, 96, 10)
            assert torch.equal(read(model, name), expected)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    blocks, exponents = mx_parts()
    return single(
        tmp_path_factory.mktemp("everything"),
        blocks__weight=codes(130, 150),
        blocks__weight_scale_inv=scales(2, 2),
        wide__weight=codes(2, 3000),
        wide__weight_scale=scales(1, 24),
        column__weight=codes(17, 1),
        column__weight_scale=scales(17, 1),
        fp4__weight=torch.randint(0, 255, (5, 32), dtype=torch.uint8).view(torch.int8),
        fp4__scale=torch.full((5, 2), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        fused=codes(3, 4, 6),
        fused_scale=scales(3, 1, 2),
        vector__weight=codes(7),
        vector__weight_scale=scales(7),
        experts_blocks=blocks,
        experts_scales=exponents,
    )


@settings(max_examples=60)
@given(data=st.data())
def test_any_slice_is_the_slice_of_the_whole(everything: Checkpoint, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(everything.tensors)))
    count = everything.tensors[name].n_elements
    begin = data.draw(st.integers(0, count))
    end = data.draw(st.integers(begin, count))
    part = read(everything, name, begin, end)
    assert part.dtype == torch.bfloat16
    assert torch.equal(part, read(everything, name).flatten()[begin:end])


def loaded(folder: Path, quantisation: Any = None) -> dict[str, Tensor]:
    config = {} if quantisation is None else {"quantization_config": quantisation}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **config)
    return dict(model.state_dict())


def written(model: Checkpoint, folder: Path, source: Path) -> Path:
    """The model as it is seen, in a folder of its own."""
    folder.mkdir()
    save_file({name: read(model, name).contiguous() for name in model.tensors}, folder / "model.safetensors")
    for name, file in model.side_files.items():
        (folder / name).write_bytes(file if isinstance(file, bytes) else file.read_bytes())
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_fp8_models_are_what_transformers_dequantises(family: str, tmp_path: Path) -> None:
    block = partial(q.fp8, scale="weight_scale_inv", shape="block", block=8)
    stated = {"quant_method": "fp8", "weight_block_size": [8, 8], "modules_to_not_convert": ["lm_head", "gate"]}
    folder = quantised(tmp_path / "model", block, family=family, quantization_config=stated)

    theirs = loaded(folder, transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(8, 8)))
    model = open_checkpoint(folder, dequantise=True)
    ours = loaded(written(model, tmp_path / "out", folder))

    assert not [name for name in model.tensors if "scale" in name]
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert torch.equal(ours[name], values), name


def test_gpt_oss_is_what_transformers_dequantises(tmp_path: Path) -> None:
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    stated = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    folder = mxfp4(tmp_path / "model", quantization_config=stated)

    theirs = loaded(folder, transformers.Mxfp4Config(dequantize=True))
    model = open_checkpoint(folder, dequantise=True)
    ours = loaded(written(model, tmp_path / "out", folder))

    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert torch.equal(ours[name], values), name


def test_nothing_says_what_the_weights_were(tmp_path: Path) -> None:
    stated = {"quantization_config": {"quant_method": "modelopt"}, "torch_dtype": "float16"}
    folder = quantised(tmp_path / "model", q.modelopt, **stated)
    reconfigure(folder, text_config={"quantization_config": {"quant_method": "modelopt"}, "dtype": "float16"})
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')

    model = open_checkpoint(folder, dequantise=True)

    assert model.dequantised == "modelopt, FP8 with scales"
    assert find_quantisation(model) is None
    assert not [name for name in model.tensors if "scale" in name]
    assert {tensor.dtype for tensor in model.tensors.values()} == {"BF16"}
    assert "hf_quant_config.json" not in model.side_files
    content = model.side_files["config.json"]
    assert isinstance(content, bytes)
    config = json.loads(content)
    assert config == model.config
    assert "quant" not in str(config)
    assert (config["torch_dtype"], config["text_config"]) == ("bfloat16", {"dtype": "bfloat16"})


def test_weights_without_a_scale_in_a_file_with_comfyuis_mark_have_none(tmp_path: Path) -> None:
    marker = torch.zeros(2, dtype=torch.float8_e4m3fn)
    first, second = codes(4, 4), codes(4, 4, seed=5)
    model = single(
        tmp_path, a__weight=first, a__scale_weight=scales(), b__weight=second, b__bias=codes(4), m__scaled_fp8=marker
    )
    assert list(model.tensors) == ["a.weight", "b.bias", "b.weight"]
    assert torch.equal(read(model, "b.weight"), second.bfloat16())
    assert torch.equal(read(model, "b.bias"), codes(4).bfloat16())


def test_scales_of_the_cache_and_of_activations_are_left_out(tmp_path: Path) -> None:
    model = single(
        tmp_path,
        attn__k_proj__weight=codes(4, 4),
        attn__k_proj__weight_scale=scales(),
        attn__k_proj__input_scale=scales(),
        attn__k_proj__output_scale=scales(),
        attn__k_scale=scales(),
        attn__v_scale=scales(),
        norm__output_scale=scales(4),
        embed_scale=scales(),
    )
    assert list(model.tensors) == ["attn.k_proj.weight", "embed_scale", "norm.output_scale"]


def test_plain_models_are_seen_as_they_are(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "model")
    assert open_checkpoint(folder, dequantise=True) == open_checkpoint(folder)


def test_a_config_beside_plain_floats_is_dropped(tmp_path: Path) -> None:
    folder = reconfigure(build("llama", tmp_path / "model"), quantization_config={"quant_method": "fp8"})
    model = open_checkpoint(folder, dequantise=True)
    assert "quantization_config" not in model.config
    assert model.tensors == open_checkpoint(folder).tensors


@pytest.mark.parametrize(
    ("quantise", "stated"),
    [
        (q.gptq, {}),
        (q.nvfp4, {}),
        (q.nf4, {}),
        (q.modelopt, {"quantization_config": {"quant_method": "compressed-tensors", "transform_config": {"x": 1}}}),
        (
            q.modelopt,
            {"quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": {"format": "s"}}},
        ),
    ],
)
def test_other_schemes_stay_quantised(quantise: q.Quantise, stated: dict[str, Any], tmp_path: Path) -> None:
    folder = quantised(tmp_path / "model", quantise, **stated)
    model = open_checkpoint(folder, dequantise=True)
    found = find_quantisation(model)
    assert model.dequantised is None
    assert found is not None
    assert not found.readable


def refusal(tmp_path: Path, **tensors: Tensor) -> str:
    with pytest.raises(SurgeryError) as refused:
        single(tmp_path, **tensors)
    return str(refused.value)


def test_scales_that_do_not_fit_are_named(tmp_path: Path) -> None:
    weight = codes(6, 10)
    assert '"a.weight_scale", F32 [4], does not fit "a.weight", F8_E4M3 [6, 10]' in refusal(
        tmp_path, a__weight=weight, a__weight_scale=scales(4)
    )
    assert "does not fit" in refusal(tmp_path, a__weight=weight, a__weight_scale=scales(4, 4))
    assert "does not fit" in refusal(tmp_path, a__weight=weight, a__weight_scale=torch.ones(6, 1, dtype=torch.int32))
    assert '"a.weight" needs one scale, and has none' in refusal(
        tmp_path, a__weight=weight, a__input_scale=scales(), b__weight=codes(4, 4), b__scale=scales()
    )
    assert 'needs one scale, and has "a.weight_scale", "a.pre_quant_scale"' in refusal(
        tmp_path, a__weight=weight, a__weight_scale=scales(), a__pre_quant_scale=scales(10)
    )
    blocks, exponents = mx_parts()
    assert "does not fit" in refusal(tmp_path, x_blocks=blocks, x_scales=exponents[:, :5].contiguous())
    assert "both quantised and not" in refusal(tmp_path, x_blocks=blocks, x_scales=exponents, x=torch.ones(2))


def test_one_weight_among_scaled_ones_lacks_its_scale(tmp_path: Path) -> None:
    text = refusal(tmp_path, a__weight=codes(4, 4), a__weight_scale=scales(), b__weight=codes(4, 4))
    assert '"b.weight" is FP8, and its scale is not there' in text


def test_an_adapter_is_added_to_the_weights(tmp_path: Path) -> None:
    folder = quantised(tmp_path / "model", q.modelopt)
    name = "model.layers.0.self_attn.q_proj"
    weight = open_checkpoint(folder, dequantise=True)
    shape = weight.tensors[f"{name}.weight"].shape
    (tmp_path / "adapter").mkdir()
    a, b = scales(2, shape[1]), scales(shape[0], 2)
    factors = {f"base_model.model.{name}.lora_{x}.weight": f for x, f in (("A", a), ("B", b))}
    save_file(factors, tmp_path / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))

    model = open_checkpoint(f"{folder}+{tmp_path / 'adapter'}", dequantise=True)

    expected = read(weight, f"{name}.weight").double() + b.double() @ a.double()
    assert torch.allclose(read(model, f"{name}.weight").double(), expected, rtol=1e-5, atol=1e-6)


def test_dequantised_experts_are_seen_fused(tmp_path: Path) -> None:
    """One by one in the file, as transformers holds them in the other model."""
    block = partial(q.fp8, scale="weight_scale_inv", shape="block", block=8)
    stated = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    folder = quantised(tmp_path / "model", block, family="qwen3_moe", quantization_config=stated)
    theirs = loaded(folder, transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(8, 8)))
    fused = tmp_path / "fused"
    fused.mkdir()
    save_file(theirs, fused / "model.safetensors")
    (fused / "config.json").write_bytes((folder / "config.json").read_bytes())
    reconfigure(fused, quantization_config=None)

    seen = seen_as(open_checkpoint(folder, dequantise=True), open_checkpoint(fused)).checkpoint

    names = [name for name in theirs if name.endswith("experts.gate_up_proj")]
    assert names
    for name in names:
        assert torch.equal(read(seen, name).bfloat16(), theirs[name])
        count = seen.tensors[name].n_elements
        assert torch.equal(read(seen, name, 7, count - 5).bfloat16(), theirs[name].flatten()[7 : count - 5])


def test_shards_say_where_the_weights_lie(tmp_path: Path) -> None:
    model = rewrite(mxfp4(tmp_path / "model"), lambda tensors: None)
    seen = open_checkpoint(model, dequantise=True)
    name = "model.layers.0.mlp.experts.down_proj"
    assert seen.tensors[name].name_in_file == f"{name}_blocks"
    assert f"{name}_scales" not in seen.tensors
