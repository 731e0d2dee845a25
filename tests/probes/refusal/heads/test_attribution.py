"""Each part's share of the probe's logit, exactly; the paper's score by its definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.models import CENTRED, FAMILIES, MORE, NOT_PLAIN, hook_count, make_live, make_sequences, maker, probe_for

from probes.data.examples import TokenSequence
from probes.model.activations import hidden_states_at
from probes.model.residual_stream import trace_residual_stream
from probes.refusal.heads.attribution import attribute_heads, head_inputs
from surgery.errors import SurgeryError
from surgery.models.loaded_model import hidden_out, hooks

PLAIN = [name for name in {**FAMILIES, **MORE} if name not in NOT_PLAIN]
NORM_BEHIND = {
    "gemma2": "post_attention_layernorm",
    "gemma3": "post_attention_layernorm",
    "gemma4": "post_attention_layernorm",
    "glm4": "post_self_attn_layernorm",
    "olmo2": "post_attention_layernorm",
}
WITH_BIAS = ("gpt2", "gpt_neox", "gpt_oss", "phi", "opt")  # families whose output projections have one
LENGTHS = (23, 5, 17, 11)


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    return maker(tmp_path_factory.mktemp("lives"))


def attributed(live, sequences=None, *, exact=True, **how):
    weight, bias = probe_for(live)
    stream = trace_residual_stream(live) if exact else None
    return attribute_heads(live, sequences or make_sequences(LENGTHS, answer=3), weight, bias, stream=stream, **how)


@torch.inference_mode()
def run_alone(live, sequence):
    """Inputs and outputs, at the last token before the answer, of all that a brute-force attribution looks at: float64,
    of one sequence without padding."""
    seen = {}

    def see(module, arguments, output):
        seen[module] = (arguments[0][0, -1].double().clone(), hidden_out(output)[0, -1].double().clone())

    wanted = [live.final_norm, *(p.module for p in live.projections.values())]
    wanted += [getattr(layer, word) for layer in live.layers for word in NORM_BEHIND.values() if hasattr(layer, word)]
    with hooks(*(module.register_forward_hook(see) for module in wanted)):
        live.body(input_ids=torch.tensor([sequence.before_answer]), use_cache=False)
    return seen


def frozen(norm, given, made, *, centred):
    """`norm` as a linear map, with the scale that it had when it made `made` of `given`."""

    def centre(x):
        return x - x.mean(-1, keepdim=True) if centred else x

    bias = getattr(norm, "bias", None)
    ratio = (made - (0 if bias is None else bias.double())) / centre(given)
    return lambda x: ratio * centre(x)


def stored_matrix(live, layer):
    """W_O (hidden, heads · head_dim) as it lies on disk, in float64."""
    heads = live.structure.output_projections[layer]
    (matrix,) = [stored[heads.name] for file in live.checkpoint.files if heads.name in (stored := load_file(file))]
    return (matrix.T if heads.transposed else matrix).double()


@pytest.mark.parametrize("name", PLAIN)
def test_the_parts_sum_to_the_probes_logit(name, lives):
    live, sequences = lives(name), make_sequences(LENGTHS, answer=3)
    weight, bias = probe_for(live)
    found = attributed(live, sequences)
    states = hidden_states_at(live, sequences, [[s.decision] for s in sequences])[:, 0, -1]
    torch.testing.assert_close(found.logit, states @ weight + bias, atol=1e-4, rtol=1e-5)
    assert float((found.total - found.logit).abs().max()) <= 1e-5 * float(found.logit.abs().max())


@pytest.mark.parametrize("name", PLAIN)
def test_every_heads_exact_score_is_the_one_of_brute_force(name, lives):
    live, sequences = lives(name), make_sequences(LENGTHS, answer=3)
    weight, _ = probe_for(live)
    found = attributed(live, sequences)
    factor = 0.22 if name == "granite" else 1.0
    for row, sequence in enumerate(sequences):
        seen = run_alone(live, sequence)
        final = frozen(live.final_norm, *seen[live.final_norm], centred=name in CENTRED)
        for layer, projection in live.projections.items():
            matrix, (z, _) = stored_matrix(live, layer), seen[projection.module]
            behind = getattr(live.layers[layer], NORM_BEHIND.get(name, ""), None)
            through = frozen(behind, *seen[behind], centred=False) if behind else lambda x: x
            d = projection.head_dim
            expected = torch.stack(
                [
                    final(factor * through(matrix[:, h * d : (h + 1) * d] @ z[h * d : (h + 1) * d])) @ weight.double()
                    for h in range(projection.n_heads)
                ]
            )
            torch.testing.assert_close(found.exact[layer][row].double(), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_the_papers_score_is_its_definition(name, lives):
    live, sequences = lives(name), make_sequences(LENGTHS, answer=3)
    weight, _ = probe_for(live)
    found = attributed(live, sequences, exact=False)
    unit = weight.double() / weight.double().norm()
    assert not found.exact
    for row, sequence in enumerate(sequences):
        seen = run_alone(live, sequence)
        for layer, projection in live.projections.items():
            matrix, (z, _) = stored_matrix(live, layer), seen[projection.module]
            d = projection.head_dim
            expected = torch.stack(
                [(matrix[:, h * d : (h + 1) * d] @ z[h * d : (h + 1) * d]) @ unit for h in range(projection.n_heads)]
            )
            torch.testing.assert_close(found.inputs[layer][row].double(), z, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found.paper[layer][row].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", WITH_BIAS)
def test_an_output_projections_bias_is_never_a_heads(name, tmp_path):
    live = make_live(name, tmp_path)
    before = attributed(live)
    last = max(live.projections)
    with torch.no_grad():
        live.projections[last].module.bias.add_(torch.linspace(-3, 3, live.width))
    after = attributed(live)
    # z of the last layer is as it was: only the final norm's scale has changed for its heads.
    torch.testing.assert_close(after.paper[last], before.paper[last], atol=1e-6, rtol=1e-6)
    ratio = (after.exact[last] / before.exact[last]).double()
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), atol=1e-4, rtol=1e-4)
    assert float((after.biases[:, last] - before.biases[:, last]).abs().min()) > 0.1
    assert float((after.total - after.logit).abs().max()) <= 1e-5 * float(after.logit.abs().max())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama", {"hidden_size": 33, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10}),
        ("gpt2", {"n_embd": 33, "n_head": 3}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"num_hidden_layers": 1}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("stablelm", {"use_parallel_residual": True}),
        ("falcon", {"new_decoder_architecture": True}),
        ("falcon", {"parallel_attn": False}),
    ],
    ids=str,
)
def test_odd_shapes_and_variants_sum_too(name, sizes, tmp_path):
    live = make_live(name, tmp_path, **sizes)
    found = attributed(live)
    assert float((found.total - found.logit).abs().max()) <= 1e-5 * float(found.logit.abs().max())


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2", "deepseek_v3", "granite"])
def test_bfloat16_sums_up_to_its_rounding(name, lives):
    found = attributed(lives(name, dtype=torch.bfloat16))
    assert float((found.total - found.logit).abs().max()) <= 2e-2 * float(found.logit.abs().max())


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "qwen3_next", "mixtral"])
def test_neither_batches_nor_order_change_scores(name, lives):
    live, sequences = lives(name), make_sequences(LENGTHS, answer=3)
    whole, single = attributed(live, sequences), attributed(live, sequences, max_tokens=1)
    backwards = attributed(live, sequences[::-1])
    for layer in live.projections:
        for form in ("exact", "paper", "inputs"):
            scores = getattr(whole, form)[layer]
            torch.testing.assert_close(getattr(single, form)[layer], scores, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(getattr(backwards, form)[layer].flip(0), scores, atol=1e-4, rtol=1e-4)


def test_the_answer_changes_nothing(lives):
    live, sequences = lives("llama"), make_sequences(LENGTHS, answer=3)
    bare = [TokenSequence(s.key, s.before_answer, (*s.ends[:3], s.ends[2])) for s in sequences]
    assert torch.equal(attributed(live, sequences).exact[1], attributed(live, bare).exact[1])


def test_no_hook_is_left_after_an_error(lives):
    live = lives("llama")
    stream, before = trace_residual_stream(live), hook_count(live)

    def fail(*_):
        raise KeyboardInterrupt

    weight, bias = probe_for(live)
    with hooks(live.final_norm.register_forward_hook(fail)), pytest.raises(KeyboardInterrupt):
        attribute_heads(live, make_sequences([5]), weight, bias, stream=stream)
    assert hook_count(live) == before


def test_no_sequence_is_an_error(lives):
    weight, bias = probe_for(lives("llama"))
    with pytest.raises(SurgeryError, match="llama: no example is left to score heads on"):
        attribute_heads(lives("llama"), [], weight, bias, stream=None)
    with pytest.raises(SurgeryError, match="llama: no example is left to read heads on"):
        head_inputs(lives("llama"), [], 1)


@pytest.mark.parametrize("max_tokens", [None, 1, 40])
@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", "qwen3_next"])
def test_head_inputs_are_what_goes_into_the_projections(name, max_tokens, lives):
    live, sequences = lives(name), make_sequences(LENGTHS, answer=3)
    found = head_inputs(live, sequences, 4, max_tokens=max_tokens)
    assert sorted(found) == sorted(live.projections)
    for row, sequence in enumerate(sequences):
        # A token's z does not depend on what comes after it: each is the last one of a shorter sequence.
        for back in range(4):
            stop = sequence.ends[2] - 3 + back
            cut = replace(sequence, ids=sequence.ids[:stop], ends=(1, 1, stop, stop))
            seen = run_alone(live, cut)
            for layer, projection in live.projections.items():
                torch.testing.assert_close(
                    found[layer][row, back].double(), seen[projection.module][0], atol=2e-5, rtol=1e-4
                )


@pytest.mark.parametrize("last", [0, 6])
def test_more_positions_than_tokens_are_refused(last, lives):
    with pytest.raises(SurgeryError, match=f"last: got {last}, expected 1 to 5, the tokens of the shortest example"):
        head_inputs(lives("qwen3"), make_sequences(LENGTHS), last)
