"""Promises of growth.training.stage_model: what a stage names trains, nothing else does, and hashes prove it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.architectures import VOCABULARY
from support.growth import make_stage
from support.models import make_live
from torch.nn import functional

from surgery.checkpoint.reader import digest
from surgery.errors import SurgeryError
from surgery.growth.training.stage_model import StageModel, prepare_stage_model
from surgery.io.hashing import hash_parts
from surgery.models.forward_pass import partial_forward, tupled_layers
from surgery.models.loaded_model import LoadedModel
from surgery.models.parameters import parameter_hashes

DRAW = torch.Generator().manual_seed(0)
TOKENS = torch.randint(4, VOCABULARY, (2, 12), generator=DRAW)
TARGETS = torch.randint(4, VOCABULARY, (2, 12), generator=DRAW)


@pytest.fixture
def live(tmp_path: Path) -> LoadedModel:
    return make_live("llama", tmp_path / "m", num_hidden_layers=3)


@pytest.mark.parametrize(
    ("train", "new", "parts", "depth"),
    [
        (("new", "head", "norm"), [2], {"model.layers.2.", "lm_head.", "model.norm."}, 2),
        (("new",), [1], {"model.layers.1."}, 1),
        (("head", "norm"), [], {"lm_head.", "model.norm."}, 3),
        (("embedding", "new"), [2], {"model.embed_tokens.", "model.layers.2."}, 0),
        (("all",), [2], {"model.", "lm_head."}, 0),
    ],
)
def test_what_is_named_trains_and_nothing_else(live, train, new, parts, depth) -> None:
    model = prepare_stage_model(live, make_stage(train), new, seed=0)
    names = [name for name, _ in live.model.named_parameters()]
    expected = [name for name in names if name.startswith(tuple(parts))]
    assert model.trained_names() == expected and model.depth == depth
    assert sorted(list(model.frozen()) + expected) == sorted(names)
    model(TOKENS, TARGETS).backward()
    with_gradient = [name for name, parameter in live.model.named_parameters() if parameter.grad is not None]
    assert with_gradient == expected
    assert model.n_trained == sum(live.model.get_parameter(name).numel() for name in expected)


def test_low_rank_updates_train_in_old_layers_beside_the_new_one(live: LoadedModel) -> None:
    model = prepare_stage_model(live, make_stage(("new", "lora")), [1], seed=0)
    trained = model.trained_names()
    assert {name.split(".")[2] for name in trained if ".lora." in name} == {"0", "2"}
    assert {name.split(".")[2] for name in trained if ".lora." not in name} == {"1"}
    assert model.depth == 0
    changed = model.finish()
    assert "model.layers.0.self_attn.q_proj.weight" in changed and "model.layers.1.mlp.up_proj.weight" in changed
    assert not any("lora" in name for name in changed)
    assert len(changed) == 7 + 7 + 9


def test_the_first_stage_has_no_old_layers_to_update(live: LoadedModel) -> None:
    model = prepare_stage_model(live, make_stage(("new", "head", "lora")), [0, 1, 2], seed=0)
    assert not any("lora" in name for name in model.trained_names())


def test_the_loss_is_the_mean_cross_entropy(live: LoadedModel) -> None:
    model = prepare_stage_model(live, make_stage(), [2], seed=0)
    logits = live.model(input_ids=TOKENS).logits.detach().double()
    expected = functional.cross_entropy(logits.reshape(-1, VOCABULARY), TARGETS.reshape(-1))
    loss = model(TOKENS, TARGETS).detach()
    assert loss.dtype == torch.float32 and abs(float(loss) - float(expected)) < 1e-6


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox", "mixtral", "gemma2", "falcon_h1"])
def test_entered_at_its_depth_the_model_has_the_same_loss_and_gradients(family: str, tmp_path: Path) -> None:
    live = make_live(family, tmp_path)
    train = ("new", "norm") if live.model.config.tie_word_embeddings else ("new", "head", "norm")
    model = prepare_stage_model(live, make_stage(train), [1], seed=0)
    hidden = partial_forward(live, TOKENS, 0, None, model.depth, tupled=tupled_layers(live))
    found = []
    for given in (None, hidden):
        model.zero_grad()
        loss = model(TOKENS, TARGETS, given)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.trained().values())])
    assert model.depth == 1
    for plain, entered in zip(*found, strict=True):
        torch.testing.assert_close(entered, plain, atol=1e-6, rtol=1e-5)


def test_only_matrices_decay(live: LoadedModel) -> None:
    matrices, others = prepare_stage_model(live, make_stage(), [2], seed=0).optimizer_groups(0.3)
    assert matrices["weight_decay"] == 0.3 and {p.dim() for p in matrices["params"]} == {2}
    assert others["weight_decay"] == 0 and {p.dim() for p in others["params"]} == {1}
    assert len(matrices["params"]) == 8 and len(others["params"]) == 3
    assert len(prepare_stage_model(live, make_stage(("norm",)), [], seed=0).optimizer_groups(0.3)) == 1


def test_hashes_are_those_of_files_and_find_what_changed(live: LoadedModel) -> None:
    model = prepare_stage_model(live, make_stage(), [2], seed=0)
    before = parameter_hashes(model.frozen())
    weight = live.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert before["model.layers.0.mlp.up_proj.weight"] == hash_parts([digest(weight.detach().view(-1))])
    live.model.get_parameter("lm_head.weight").data.add_(1)  # trains
    assert parameter_hashes(model.frozen()) == before
    weight.data[0, 0] += 1e-6
    after = parameter_hashes(model.frozen())
    assert [name for name in before if after[name] != before[name]] == ["model.layers.0.mlp.up_proj.weight"]


def test_a_head_that_is_tied_to_the_embedding_is_not_trained_unawares(tmp_path: Path) -> None:
    live = make_live("llama", tmp_path, tie_word_embeddings=True)
    with pytest.raises(SurgeryError, match="tied to its embedding: training the head would train the embedding"):
        prepare_stage_model(live, make_stage(), [1], seed=0)
    with pytest.raises(SurgeryError, match="training the embedding would train the head"):
        prepare_stage_model(live, make_stage(("embedding",)), [], seed=0)
    both = prepare_stage_model(live, make_stage(("embedding", "head")), [], seed=0)
    assert both.trained_names() == ["model.embed_tokens.weight"] and both.depth == 0
    assert prepare_stage_model(live, make_stage(("new", "norm")), [1], seed=0).depth == 1


def test_what_cannot_train_is_said(live: LoadedModel) -> None:
    with pytest.raises(SurgeryError, match="there is no layer 3 among 3"):
        prepare_stage_model(live, make_stage(), [3], seed=0)
    with pytest.raises(SurgeryError, match="train: nothing of this model trains with new"):
        prepare_stage_model(live, make_stage(("new",)), [], seed=0)
    live.model.to(torch.bfloat16)
    with pytest.raises(SurgeryError, match="is in bfloat16; what trains must be in float32"):
        prepare_stage_model(live, make_stage(("new", "lora")), [2], seed=0)
    assert not any("lora" in name for name, _ in live.model.named_parameters())


def test_parameters_without_gradient_are_found(live: LoadedModel) -> None:
    model = prepare_stage_model(live, make_stage(("all",)), [], seed=0)
    assert not model.has_unused_parameters(8)
    live.layers[0].idle = torch.nn.Linear(2, 2)
    idle: StageModel = prepare_stage_model(live, make_stage(("all",)), [], seed=0)
    assert idle.has_unused_parameters(8)
    assert all(parameter.grad is None for parameter in live.model.parameters())
