"""Promises of surgery.models.loaded_model: a model's parts are found by structure, and what is not found is said."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import add_tokenizer, build
from support.models import FAMILIES, MORE, hook_count, make_live, maker, open_folder, save
from torch import nn

from surgery.checkpoint.resolve import open_checkpoint
from surgery.errors import SurgeryError
from surgery.models.loaded_model import attach_structure, hooks, load_with_structure


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    return maker(tmp_path_factory.mktemp("lives"))


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_every_projection_is_the_stored_one_and_takes_in_the_heads_side_by_side(name, lives):
    live = lives(name)
    stored = {}
    for file in live.checkpoint.files:
        stored |= load_file(file)
    assert live.projections
    assert sorted([*live.projections, *live.skipped]) == list(range(len(live.layers)))
    for layer, projection in live.projections.items():
        heads = live.structure.output_projections[layer]
        matrix = stored[heads.name].T if heads.transposed else stored[heads.name]
        assert torch.equal(projection.matrix, matrix)
        assert projection.matrix.shape == (live.width, projection.n_heads * projection.head_dim)
        assert projection.block(projection.n_heads - 1).stop == matrix.shape[1]
        bias = stored.get(heads.name.removesuffix("weight") + "bias")
        assert (projection.bias is None) == (bias is None)
        assert bias is None or torch.equal(projection.bias, bias)


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_the_final_norm_makes_what_the_output_head_takes_in(name, lives):
    live = lives(name)
    seen = []
    handles = [
        live.final_norm.register_forward_hook(lambda m, i, output: seen.append(output)),
        live.model.get_output_embeddings().register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0])),
    ]
    with hooks(*handles), torch.inference_mode():
        live.model(input_ids=torch.tensor([[5, 6, 7]]))
    assert torch.equal(seen[0], seen[1])


def test_counts_heads_depths_and_width(lives):
    live = lives("qwen3")
    assert (live.n_heads, live.n_depths, live.width, live.skipped) == (8, 3, 32, ())
    assert live.projections[0].head_dim == 16  # not width / heads
    assert lives("deepseek_v3").projections[1].head_dim == 12
    assert lives("gpt2").projections[0].transposed


@pytest.mark.parametrize(("name", "skipped"), [("qwen3_next", (0, 1, 2)), ("lfm2", (0, 2))])
def test_layers_without_heads_are_skipped(name, skipped, lives):
    assert lives(name).skipped == skipped


def test_opens_a_folder_with_its_tokenizer(tmp_path):
    add_tokenizer(build("llama", tmp_path / "m", dtype=torch.bfloat16))
    live = load_with_structure(tmp_path / "m", dtype="float32", name="mine")
    assert (live.name, live.model.dtype, live.device.type) == ("mine", torch.float32, "cpu")
    assert live.tokenizer("w5 w6")["input_ids"] == [5, 6]


def test_no_layers_is_an_error(tmp_path):
    folder = save("llama", tmp_path / "m")
    live = open_folder(folder)
    save_file({"embed.weight": torch.zeros(4, 4)}, folder / "model.safetensors")
    with pytest.raises(SurgeryError, match=r"m: no stack of layers was found in its names"):
        attach_structure(live.loaded, open_checkpoint(folder))


def test_another_models_layers_are_an_error(tmp_path):
    live = make_live("qwen2", tmp_path / "three")
    other = make_live("qwen3", tmp_path / "two")
    live.model.model.layers = live.model.model.layers[:1]
    with pytest.raises(SurgeryError, match=r"2 layers lie at 'model.layers' on disk; in memory they could be at –"):
        attach_structure(live.loaded, other.checkpoint)


def test_a_projection_elsewhere_is_an_error(tmp_path):
    live = make_live("qwen3", tmp_path / "m")
    attention = live.layers[0].self_attn
    attention.moved = attention.o_proj
    del attention.o_proj
    with pytest.raises(SurgeryError, match=r"layers.0.self_attn.o_proj.weight is not where transformers should hold"):
        attach_structure(live.loaded, live.checkpoint)


def test_quantised_weights_are_an_error_that_says_what_to_do(tmp_path):
    live = make_live("qwen3", tmp_path / "m")
    projection = live.projections[1].module
    projection.weight = nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(SurgeryError, match=r"layers.1.self_attn.o_proj.weight is not held as a plain matrix") as error:
        attach_structure(live.loaded, live.checkpoint)
    assert error.value.hint == "Use the unquantised model."


def test_no_final_norm_is_an_error(tmp_path):
    with pytest.raises(SurgeryError, match="no final norm was found beside its layers"):
        make_live("opt", tmp_path / "m", do_layer_norm_before=False)


def test_hooks_are_gone_after_an_exception(lives):
    live = lives("llama")
    before = hook_count(live)
    with pytest.raises(KeyboardInterrupt), hooks(live.final_norm.register_forward_hook(lambda *_: None)):
        assert hook_count(live) == before + 1
        raise KeyboardInterrupt
    assert hook_count(live) == before
