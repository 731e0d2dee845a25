"""Merges of models with tied embeddings: heads that equal the embedding go, others part OUT, in every order."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import build, sibling
from torch import Tensor
from transformers import AutoModelForCausalLM

from merges.report import MergeReport
from merges.run import merge

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def variant(base: Path, out: Path, kind: str, *, seed: int, embedding: str = EMBEDDING, head: str = HEAD) -> Path:
    """Write a tuned copy of the tied model `base`: with its `head` stored in one of several ways."""
    sibling(base, out, seed=seed)
    tensors = weights(out)
    if kind != "tied":
        tensors[head] = tensors[embedding].clone()
    if "own" in kind:
        tensors[head] = tensors[head] + torch.rand(tensors[head].shape, generator=torch.Generator().manual_seed(seed))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    path = out / "config.json"
    config = json.loads(path.read_text())
    if kind.startswith("untied"):
        config["tie_word_embeddings"] = False
    if kind.startswith("silent"):
        del config["tie_word_embeddings"]
    path.write_text(json.dumps(config))
    return out


def head_of(folder: Path, embedding: str = EMBEDDING, head: str = HEAD) -> Tensor:
    tensors = weights(folder)
    return tensors.get(head, tensors[embedding])


def run(models: list[Path], out: Path) -> MergeReport:
    path = out.parent / "c.yml"
    listed = ", ".join(f"{{model: {model}, parameters: {{weight: 1}}}}" for model in models)
    path.write_text(f"models: [{listed}]\nmerge_method: linear\n")
    return merge(path, out)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("tied") / "base", dtype=torch.float32, tied=True)


KINDS = ("tied", "equal", "own", "untied equal", "untied own", "silent equal", "silent own")


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations_with_replacement(KINDS, 2)))
def test_the_order_of_models_changes_neither_the_config_nor_a_tensor(
    one: str, other: str, base: Path, tmp_path: Path
) -> None:
    a = variant(base, tmp_path / "a", one, seed=1)
    b = variant(base, tmp_path / "b", other, seed=2)
    run([a, b], tmp_path / "ab")
    run([b, a], tmp_path / "ba")
    made, turned = weights(tmp_path / "ab"), weights(tmp_path / "ba")
    assert made.keys() == turned.keys()
    assert all(torch.allclose(made[name], turned[name], rtol=0, atol=1e-7) for name in made)
    says = [json.loads((tmp_path / out / "config.json").read_text()).get("tie_word_embeddings") for out in ("ab", "ba")]
    # No model has a head of its own: OUT has none either, unless every config says that heads are matrices apart.
    none = "own" not in one + other and not (one.startswith("untied") and other.startswith("untied"))
    assert says == [none, none] and (HEAD in made) == (not none)
    expected = (head_of(a).double() + head_of(b).double()) / 2
    assert torch.allclose(made[HEAD if HEAD in made else EMBEDDING].double(), expected, rtol=0, atol=1e-6)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ab")
    assert torch.allclose(loaded.lm_head.weight.double(), expected, rtol=0, atol=1e-6)


def test_each_case_is_told(base: Path, tmp_path: Path) -> None:
    tied, equal, own = (variant(base, tmp_path / kind, kind, seed=i) for i, kind in enumerate(("tied", "equal", "own")))
    facts = run([tied, equal], tmp_path / "1").preflight
    assert facts[f"output head of {equal}"] == f"{HEAD} equals {EMBEDDING}: left out, they stay tied"
    told = " ".join(run([tied, own], tmp_path / "2").warnings)
    assert f"{own} stores {HEAD}, which differs from {EMBEDDING}" in told and "not tied" in told
    told = " ".join(run([equal, own], tmp_path / "3").warnings)
    assert f"{equal} is tied, and others have an output head of their own" in told


def test_models_that_say_they_are_not_tied_are_not_compared(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (variant(base, tmp_path / str(i), "untied own", seed=i) for i in range(2))

    def fail(*_: object) -> bool:
        raise AssertionError("read")

    monkeypatch.setattr("surgery.engine.tied_embeddings.same_values", fail)
    run([a, b], tmp_path / "out")
    assert (tmp_path / "out/config.json").read_bytes() == (a / "config.json").read_bytes()


def test_gpt2s_head_is_known_beside_its_wte(tmp_path: Path) -> None:
    base = build("gpt2", tmp_path / "base", dtype=torch.float32)
    names = {"embedding": "transformer.wte.weight", "head": "lm_head.weight"}
    a = variant(base, tmp_path / "a", "silent equal", seed=1, **names)
    b = variant(base, tmp_path / "b", "tied", seed=2, **names)
    c = variant(base, tmp_path / "c", "own", seed=3, **names)
    run([a, b], tmp_path / "ab")
    assert weights(tmp_path / "ab").keys() == weights(b).keys()
    run([b, c], tmp_path / "bc")
    expected = (head_of(b, **names).double() + head_of(c, **names).double()) / 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "bc")
    assert torch.allclose(loaded.lm_head.weight.double(), expected, rtol=0, atol=1e-6)
    assert not loaded.config.tie_word_embeddings


def test_a_matrix_that_is_stored_as_the_head_only_is_the_embedding(base: Path, tmp_path: Path) -> None:
    a = variant(base, tmp_path / "a", "tied", seed=1)
    b = variant(base, tmp_path / "b", "tied", seed=2)
    expected = (weights(a)[EMBEDDING].double() + weights(b)[EMBEDDING].double()) / 2
    tensors = weights(b)
    tensors[HEAD] = tensors.pop(EMBEDDING)
    save_file(tensors, b / "model.safetensors", metadata={"format": "pt"})
    for number, order in enumerate(([a, b], [b, a])):
        run(order, tmp_path / str(number))
        made = weights(tmp_path / str(number))
        assert HEAD not in made and torch.allclose(made[EMBEDDING].double(), expected, rtol=0, atol=1e-6)


def test_flags_inside_a_text_config_count(base: Path, tmp_path: Path) -> None:
    a, b = (variant(base, tmp_path / name, kind, seed=1) for name, kind in (("a", "tied"), ("b", "untied own")))
    for folder, tied in ((a, True), (b, False)):
        config = json.loads((folder / "config.json").read_text())
        inner = {**config, "tie_word_embeddings": tied}
        outer = {"model_type": "llama", "architectures": config["architectures"], "tie_word_embeddings": tied}
        (folder / "config.json").write_text(json.dumps({**outer, "text_config": inner}))
    run([a, b], tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["text_config"]["tie_word_embeddings"] is False
    assert HEAD in weights(tmp_path / "out")


def test_copies_of_a_shared_embedding_are_one(tmp_path: Path) -> None:
    def t5(folder: Path, seed: int, *, copies: bool) -> Path:
        folder.mkdir()
        generator = torch.Generator().manual_seed(seed)
        shapes = {"shared.weight": (16, 4)}
        for part in ("encoder", "decoder"):
            shapes |= {f"{part}.block.{i}.layer.0.SelfAttention.{w}.weight": (4, 4) for i in range(2) for w in "qkvo"}
            shapes |= {f"{part}.block.{i}.layer.0.layer_norm.weight": (4,) for i in range(2)}
        tensors = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
        if copies:
            names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD)
            tensors |= {name: tensors["shared.weight"].clone() for name in names}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "num_layers": 2, "d_model": 4}
        more = {"vocab_size": 16, "tie_word_embeddings": True, "is_encoder_decoder": True}
        (folder / "config.json").write_text(json.dumps({**config, **more}))
        return folder

    a, b = t5(tmp_path / "a", 1, copies=True), t5(tmp_path / "b", 2, copies=False)
    for number, order in enumerate(([a, b], [b, a])):
        run(order, tmp_path / str(number))
        made = weights(tmp_path / str(number))
        assert made.keys() == weights(b).keys()
        expected = (weights(a)["shared.weight"].double() + weights(b)["shared.weight"].double()) / 2
        assert torch.allclose(made["shared.weight"].double(), expected, rtol=0, atol=1e-6)
