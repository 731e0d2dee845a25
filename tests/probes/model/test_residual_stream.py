"""Promises of model.residual_stream: every layer is taken apart into what it adds, or said not to be understood."""

from __future__ import annotations

import pytest
import torch
from support.models import CENTRED, FAMILIES, MORE, NOT_PLAIN, hook_count, make_live, maker

from probes.model.residual_stream import trace_residual_stream
from surgery.errors import SurgeryError
from surgery.models.loaded_model import hidden_in, hidden_out, hooks

PLAIN = [name for name in {**FAMILIES, **MORE} if name not in NOT_PLAIN]
NORMS_BEHIND = ("gemma2", "gemma3", "gemma4", "glm4", "olmo2")  # families with norms behind their blocks


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    return maker(tmp_path_factory.mktemp("lives"))


def broken(lives_or_live, index, change):
    """A hook that makes of layer `index`'s output what `change` says."""

    def after(module, arguments, output):
        made = change(hidden_out(output))
        return (made, *output[1:]) if isinstance(output, tuple) else made

    return lives_or_live.layers[index].register_forward_hook(after)


@torch.inference_mode()
def watched(live, modules, ids=(7, 19, 4, 60, 33, 90)):
    """Outputs of `modules`, and inputs and outputs of the layers, in float64: copies, as some are changed in place."""
    outputs, ends = {}, []
    handles = [
        module.register_forward_hook(lambda m, _, output: outputs.__setitem__(m, hidden_out(output).double().clone()))
        for module in modules
    ]
    for layer in live.layers:
        handles.append(
            layer.register_forward_hook(
                lambda m, given, known, output: ends.append((hidden_in(given, known).double(), hidden_out(output))),
                with_kwargs=True,
            )
        )
    with hooks(*handles):
        live.body(input_ids=torch.tensor([ids]), use_cache=False)
    return outputs, ends


@pytest.mark.parametrize("name", PLAIN)
def test_a_layers_output_is_its_input_plus_its_pieces(name, lives):
    live = lives(name)
    stream = trace_residual_stream(live)
    outputs, ends = watched(live, [piece.end for pieces in stream.writes for piece in pieces])
    for pieces, factor, (before, after) in zip(stream.writes, stream.factors, ends, strict=True):
        total = before + factor * sum(outputs[piece.end].view_as(before) for piece in pieces)
        torch.testing.assert_close(total, after.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_the_heads_piece_is_found_in_every_layer_with_heads(name, lives):
    live = lives(name)
    stream = trace_residual_stream(live)
    assert sorted(stream.attention) == sorted(live.projections)
    for layer, piece in stream.attention.items():
        assert live.projections[layer].module in set(piece.block.modules())
        assert len(piece.folds) == len(piece.modules) - 1 == (name in NORMS_BEHIND)
    assert stream.final.centred == (name in CENTRED)


def test_a_factor_on_the_branches_is_found(lives):
    assert trace_residual_stream(lives("granite")).factors == pytest.approx((0.22, 0.22), rel=1e-6)
    assert trace_residual_stream(lives("granite", dtype=torch.bfloat16)).factors == pytest.approx(
        (0.22, 0.22), rel=1e-2
    )
    assert trace_residual_stream(lives("qwen3")).factors == (1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in PLAIN if name != "granite"])
def test_half_precision_is_understood_too(name, dtype, lives):
    assert set(trace_residual_stream(lives(name, dtype=dtype)).factors) == {1.0}


def test_one_huge_dimension_of_the_stream_does_not_blur_the_factor(tmp_path):
    live = make_live("qwen3", tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        live.model.get_input_embeddings().weight[:, 3] = 3000.0
    assert trace_residual_stream(live).factors == (1.0, 1.0)


def test_a_layer_that_was_zeroed_adds_nothing(tmp_path):
    live = make_live("llama", tmp_path)
    with torch.no_grad():
        live.layers[1].self_attn.o_proj.weight.zero_()
        live.layers[1].mlp.down_proj.weight.zero_()
    assert trace_residual_stream(live).factors == (1.0, 1.0)


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_families_with_another_stream_are_refused_with_a_way_out(name, lives):
    with pytest.raises(SurgeryError, match=f"{name}: the residual stream is not a plain sum at layer 0") as error:
        trace_residual_stream(lives(name))
    assert "--attribution paper" in error.value.hint


@pytest.mark.parametrize(
    "change",
    [lambda hidden: 1.02 * hidden, lambda hidden: hidden + 0.05 * hidden.roll(1, dims=1), torch.tanh],
    ids=["scaled", "mixed over tokens", "squashed"],
)
def test_a_broken_layer_is_named(change, lives):
    live = lives("qwen2")
    before = hook_count(live)
    with hooks(broken(live, 1, change)), pytest.raises(SurgeryError, match="not a plain sum at layer 1, so that"):
        trace_residual_stream(live)
    assert hook_count(live) == before


def test_attention_that_changes_what_its_projection_made_is_named(lives):
    live = lives("qwen2")

    def half(module, arguments, output):
        return (output[0] / 2, *output[1:])

    with (
        hooks(live.layers[2].self_attn.register_forward_hook(half)),
        pytest.raises(SurgeryError, match="not a plain sum at the attention of layer 2"),
    ):
        trace_residual_stream(live)


def test_a_final_norm_of_another_kind_is_named(lives):
    live = lives("llama")

    def squashed(module, arguments, output):
        return output.tanh()

    with (
        hooks(live.final_norm.register_forward_hook(squashed)),
        pytest.raises(SurgeryError, match="not a plain sum at the final norm"),
    ):
        trace_residual_stream(live)
