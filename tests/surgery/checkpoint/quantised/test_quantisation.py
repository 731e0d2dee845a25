"""Quantised weights are recognised by what they are, whatever says so; plain weights and a model's integers never."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import quantised as q
from support.architectures import build
from support.quantised import Quantise, mxfp4, quantised, reconfigure, rewrite
from torch import Tensor

from surgery.checkpoint.inspect import inspect_checkpoint
from surgery.checkpoint.quantised.quantisation import find_quantisation
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.selectors import Expert, Head
from surgery.edits.experts import scale_experts
from surgery.edits.heads import scale_heads
from surgery.engine.preflight import Preflight, check_quantised
from surgery.errors import SurgeryError, SurgeryWarning
from surgery.growth.layers.add import add_layers
from surgery.models.loading import load_weights
from surgery.vectors.application import transfer
from surgery.vectors.comparison import diff
from surgery.vectors.extraction import extract
from surgery.vectors.to_lora import extract_adapter

FP8 = "FP8 with scales"
SCHEMES: dict[str, tuple[Quantise, str]] = {
    "modelopt": (q.modelopt, FP8),
    "comfy": (q.comfy, FP8),
    "block": (partial(q.fp8, scale="weight_scale_inv", shape="block"), FP8),
    "channel": (partial(q.fp8, shape="channel"), FP8),
    "deepseek": (partial(q.fp8, scale="scale", shape="block"), FP8),
    "mistral": (partial(q.fp8, scale="qscale_weight", shape="one"), FP8),
    "tensorrt": (partial(q.fp8, scale="weights_scaling_factor"), FP8),
    "gptq": (q.gptq, "GPTQ"),
    "awq": (q.awq, "AWQ"),
    "nf4": (q.nf4, "bitsandbytes nf4"),
    "int8": (q.int8, "bitsandbytes int8"),
    "packed": (q.packed, "compressed-tensors"),
    "nvfp4": (q.nvfp4, "NVFP4"),
    "hqq": (q.hqq, "HQQ"),
    "aqlm": (q.aqlm, "AQLM"),
    "quanto": (q.quanto, "Quanto or torchao"),
    "torchao": (q.torchao, "Quanto or torchao"),
    "eetq": (q.eetq, "INT8 with scales"),
    "mlx": (q.mlx, "MLX"),
    "bare": (q.bare, "integer codes"),
}


def scheme_of(folder: Path) -> str | None:
    found = find_quantisation(open_checkpoint(folder))
    return found and found.scheme


@pytest.mark.parametrize("name", SCHEMES)
def test_tensors_alone_show_how_they_are_quantised(name: str, tmp_path: Path) -> None:
    quantise, scheme = SCHEMES[name]
    model = quantised(tmp_path / "model", quantise)

    found = find_quantisation(open_checkpoint(model))

    assert found is not None
    assert found.scheme == scheme
    assert not found.in_config
    assert found.readable == (scheme == FP8)
    assert "_proj" in found.evidence
    preflight = Preflight()
    check_quantised(preflight, [open_checkpoint(model)], has_option=True)
    with pytest.raises(SurgeryError) as refused:
        preflight.errors.raise_if_any("merge")
    assert f"is quantised ({scheme}), and its stored values are not its weights. Evidence: {found.evidence}." in str(
        refused.value
    )
    assert ("--dequantise" in str(refused.value)) == found.readable


def test_a_single_file_shows_it_too(tmp_path: Path) -> None:
    model = quantised(tmp_path / "model", q.comfy)
    assert scheme_of(model / "model.safetensors") == FP8


def test_mxfp4_is_recognised_without_a_config(tmp_path: Path) -> None:
    assert scheme_of(mxfp4(tmp_path / "model")) == "MXFP4"


def original_gpt_oss(tensors: dict[str, Tensor]) -> None:
    tensors["block.0.mlp.mlp1_weight.blocks"] = torch.ones(2, 8, 1, 16, dtype=torch.uint8)
    tensors["block.0.mlp.mlp1_weight.scales"] = torch.full((2, 8, 1), 127, dtype=torch.uint8)


def exponents(tensors: dict[str, Tensor]) -> None:
    tensors["model.unheard_of"] = torch.ones(4, 4).to(torch.float8_e8m0fnu)


def deepseek_v4(tensors: dict[str, Tensor]) -> None:
    tensors["layers.0.ffn.experts.0.w1.weight"] = torch.ones(8, 32, dtype=torch.int8)
    tensors["layers.0.ffn.experts.0.w1.scale"] = torch.ones(8, 2).to(torch.float8_e8m0fnu)


def fused(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.ones(2, 8, 8).to(torch.float8_e4m3fn)
    tensors["model.layers.0.mlp.experts.gate_up_proj_scale"] = torch.ones(2, 1, 8)


def sparse(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.x.compressed"] = torch.ones(8, 4).bfloat16()
    tensors["model.layers.0.x.bitmask"] = torch.ones(8, 1, dtype=torch.uint8)


def nvfp4_packed(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.x.weight_packed"] = torch.ones(8, 8, dtype=torch.uint8)
    tensors["model.layers.0.x.weight_scale"] = torch.ones(8, 1).to(torch.float8_e4m3fn)
    tensors["model.layers.0.x.weight_global_scale"] = torch.ones(1)


def mxfp4_packed(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.x.weight_packed"] = torch.ones(8, 16, dtype=torch.uint8)
    tensors["model.layers.0.x.weight_scale"] = torch.full((8, 1), 127, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "scheme"),
    [
        (nvfp4_packed, "NVFP4"),
        (mxfp4_packed, "compressed-tensors"),
        (original_gpt_oss, "MXFP4"),
        (exponents, "packed F8_E8M0"),
        (deepseek_v4, "FP4 with block scales"),
        (fused, FP8),
        (sparse, "compressed-tensors, sparse"),
    ],
)
def test_other_layouts_of_codes_are_recognised(change: Any, scheme: str, tmp_path: Path) -> None:
    assert scheme_of(rewrite(build("llama", tmp_path / "model"), change)) == scheme


def routing_table(tensors: dict[str, Tensor]) -> None:
    tensors["layers.0.ffn.gate.tid2eid"] = torch.ones(96, 2, dtype=torch.int32)
    tensors["layers.0.ffn.gate.weight"] = torch.ones(4, 8)


def masks(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e9)
    tensors["transformer.h.0.attn.scale_attn"] = torch.tensor(2.0)
    tensors["transformer.h.0.attn.weight"] = torch.ones(2, 2)


def positions(tensors: dict[str, Tensor]) -> None:
    tensors["vision.position_ids"] = torch.arange(8)[None]
    tensors["vision.logit_scale"] = torch.tensor(1.0)
    tensors["vision.attn.relative_position_index"] = torch.ones(4, 4, dtype=torch.int64)
    tensors["vision.attn.logit_scale"] = torch.tensor(1.0)
    tensors["bn.num_batches_tracked"] = torch.tensor(7)
    tensors["bn.weight"] = torch.ones(4)


def codebooks(tensors: dict[str, Tensor]) -> None:
    tensors["quantizer._levels"] = torch.tensor([8, 5, 5], dtype=torch.int32)
    tensors["quantizer.implicit_codebook"] = torch.ones(200, 3)
    tensors["quantizer.codebook.embed"] = torch.ones(8, 4)


def queries(tensors: dict[str, Tensor]) -> None:
    tensors["encoder.w_q"] = torch.ones(4, 4)
    tensors["encoder.codes"] = torch.ones(4, 4)
    tensors["encoder.scale"] = torch.ones(4)


def plain_float8(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor(1.0)
    tensors["model.embed_scale"] = torch.tensor(4.0)


@pytest.mark.parametrize("change", [routing_table, masks, positions, codebooks, queries, plain_float8])
def test_integers_and_floats_of_plain_models_are_no_quantisation(change: Any, tmp_path: Path) -> None:
    model = rewrite(build("llama", tmp_path / "model"), change)
    assert scheme_of(model) is None
    # A side file outlives what it described.
    (model / "quantize_config.json").write_text("{}")
    if change is not plain_float8:
        assert scheme_of(model) is None


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "gptq"}},
        {"compression_config": {"quant_method": "gptq"}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
        {"thinker_config": {"text_config": {"quantization_config": {"quant_method": "gptq"}}}},
    ],
)
def test_the_config_says_it_wherever_it_does(config: dict[str, Any], tmp_path: Path) -> None:
    found = find_quantisation(open_checkpoint(reconfigure(build("llama", tmp_path / "model"), **config)))
    assert found is not None
    assert (found.scheme, found.in_config, found.readable) == ("gptq", True, False)
    assert found.evidence.endswith("quantization_config in config.json") or "compression_config" in found.evidence


def test_mlx_says_it_under_a_key_of_its_own(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model")
    assert scheme_of(reconfigure(model, quantization={"group_size": 64, "bits": 4})) == "unknown"
    assert scheme_of(reconfigure(model, quantization=None)) is None


def test_a_side_file_counts_where_a_tensor_could_hold_codes(tmp_path: Path) -> None:
    model = rewrite(build("llama", tmp_path / "model"), plain_float8)
    algorithm = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (model / "hf_quant_config.json").write_text(json.dumps(algorithm))

    found = find_quantisation(open_checkpoint(model))

    assert found is not None
    assert found.scheme == "FP8"
    assert found.evidence.startswith("hf_quant_config.json, and ")


@pytest.fixture
def codes(tmp_path: Path) -> tuple[str, str]:
    """A quantised model whose config does not say so, and the model that it was made of."""
    model = quantised(tmp_path / "codes", q.modelopt)
    return str(model), str(build("llama", tmp_path / "plain"))


def test_every_command_that_computes_refuses_codes(codes: tuple[str, str], tmp_path: Path) -> None:
    model, plain = codes
    out = tmp_path / "out"
    jobs = [
        lambda: extract(model, plain, out),
        lambda: extract(plain, model, out),
        lambda: extract_adapter(model, plain, out, rank=2),
        lambda: transfer(plain, plain, model, out),
        lambda: scale_heads(model, out, scales={Head(0, 0): 0.0}),
        lambda: add_layers(model, out, layers=1, init="identity"),
    ]
    for job in jobs:
        with pytest.raises(SurgeryError, match=r"is quantised \(FP8 with scales\)"):
            job()
        assert not out.exists()


def test_experts_are_scaled_only_by_scales_that_are_understood(tmp_path: Path) -> None:
    model = build("qwen3_moe", tmp_path / "model")

    def quantise(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "experts" in name and name.endswith("weight")]:
            q.modelopt(tensors, name)

    rewrite(model, quantise)
    with pytest.raises(SurgeryError, match=r"is quantised \(FP8 with scales\): experts are scaled where"):
        scale_experts(str(model), tmp_path / "out", scales={Expert(0, 0): 64.0})


def test_codes_never_run_as_weights(codes: tuple[str, str]) -> None:
    with pytest.raises(SurgeryError, match=r"does not say that its weights are quantised \(FP8 with scales\)"):
        load_weights(codes[0], "model")


def test_a_diff_of_codes_says_what_it_compares(codes: tuple[str, str]) -> None:
    with pytest.warns(SurgeryWarning, match="codes are compared, not weights. --dequantise compares weights"):
        assert diff(codes[0], codes[0]).whole.changed == 0


def test_inspect_names_the_scheme(codes: tuple[str, str]) -> None:
    assert inspect_checkpoint(open_checkpoint(codes[0]))["quantisation"]["scheme"] == FP8
    assert inspect_checkpoint(open_checkpoint(codes[1]))["quantisation"] is None
