"""Fitting donors to a target: vocabularies by policy, tied heads, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import VOCABULARY, add_tokenizer, build, sibling

from surgery.errors import SurgeryError
from surgery.vectors.application import apply, transfer
from surgery.vectors.extraction import extract

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
TOKENS = [f"t{i}" for i in range(VOCABULARY)]


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def trio(tmp_path: Path) -> tuple[Path, Path, Path]:
    """tuned and base with one vocabulary; a target whose tokens are shuffled, and which has four rows more."""
    base = build("llama", tmp_path / "base")
    tuned = sibling(base, tmp_path / "tuned", seed=1)
    target = sibling(base, tmp_path / "target", seed=2)
    order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0)).tolist()
    grown = weights(target)
    for name in EMBEDDINGS:
        grown[name] = torch.cat([grown[name][order], torch.ones(4, grown[name].shape[1], dtype=torch.bfloat16)])
    rewrite(target, grown, vocab_size=VOCABULARY + 4)
    for folder in (base, tuned):
        add_tokenizer(folder, TOKENS)
    # Two of the target's four new rows have tokens that the donors lack; two are padding.
    add_tokenizer(target, [*(TOKENS[i] for i in order), "new1", "new2"])
    return tuned, base, target


def test_strict_refuses_and_names_the_policies(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    tuned, base, target = map(str, trio)
    with pytest.raises(SurgeryError) as caught:
        transfer(tuned, base, target, tmp_path / "out")
    text = str(caught.value)
    assert "the vocabularies of" in text and "--vocab by-token" in text and "--vocab skip-embeddings" in text
    assert not list(tmp_path.glob("out*"))


def ids(folder: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)


def test_by_token_adds_each_tokens_own_row(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    tuned, base, target = trio
    direct = transfer(str(tuned), str(base), str(target), tmp_path / "direct", vocab="by-token")
    extract(str(tuned), str(base), tmp_path / "v")
    apply(str(tmp_path / "v"), str(target), tmp_path / "out", vocab="by-token")
    assert weights(tmp_path / "out").keys() == weights(target).keys()
    made, t, a, b = (weights(f) for f in (tmp_path / "out", target, tuned, base))
    ours, theirs = ids(target), ids(base)
    for name in EMBEDDINGS:
        expected = t[name].clone()
        for token, row in ours.items():
            if token in theirs and row < len(t[name]) and theirs[token] < len(b[name]):
                source = theirs[token]
                update = a[name][source].float() - b[name][source].float()
                expected[row] = (t[name][row].float() + update).bfloat16()
        assert torch.equal(made[name], expected)
        assert torch.equal(made[name][-2:], t[name][-2:])
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "direct/model.safetensors").read_bytes()
    assert "rows aligned by token; the rest get no update" in direct.preflight["vocabulary"]
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (target / "tokenizer.json").read_bytes()


def test_by_token_does_not_depend_on_where_segments_fall(
    trio: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, base, target = map(str, trio)
    transfer(tuned, base, target, tmp_path / "one", vocab="by-token")
    for module in ("surgery.checkpoint.reader", "surgery.engine.work.computation", "surgery.engine.plan"):
        monkeypatch.setattr(f"{module}.SEGMENT", 77)
    transfer(tuned, base, target, tmp_path / "many", vocab="by-token")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "many/model.safetensors").read_bytes()


def test_skip_embeddings_leaves_them_to_the_byte(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    tuned, base, target = trio
    report = transfer(str(tuned), str(base), str(target), tmp_path / "out", vocab="skip-embeddings")
    made, t = weights(tmp_path / "out"), weights(target)
    for name in t:
        assert torch.equal(made[name], t[name]) == (name in EMBEDDINGS)
    assert report.edited == len(t) - len(EMBEDDINGS)


def test_by_token_without_tokenizers_is_refused(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    tuned = sibling(base, tmp_path / "tuned", seed=1)
    with pytest.raises(SurgeryError, match="by-token needs the tokenizers of all models"):
        transfer(str(tuned), str(base), str(base), tmp_path / "out", vocab="by-token")


def test_tokens_that_only_the_tuned_model_has_get_no_update(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    tuned, base, _ = trio
    grown = weights(tuned)
    for name in EMBEDDINGS:
        grown[name] = torch.cat([grown[name], torch.ones(1, grown[name].shape[1], dtype=torch.bfloat16)])
    rewrite(tuned, grown, vocab_size=VOCABULARY + 1)
    add_tokenizer(tuned, [*TOKENS, "<think>"])
    with pytest.raises(SurgeryError, match="the vocabularies of"):
        extract(str(tuned), str(base), tmp_path / "v")
    extract(str(tuned), str(base), tmp_path / "v", vocab="by-token")
    v = load_file(tmp_path / "v/vector.safetensors")
    assert v[EMBEDDINGS[0]].shape[0] == VOCABULARY + 1
    assert not v[EMBEDDINGS[0]][-1].any() and v[EMBEDDINGS[0]][:40].any()


def test_a_tied_donors_head_is_its_embedding(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", tied=True)
    tuned = sibling(base, tmp_path / "tuned", seed=1)
    target = build("llama", tmp_path / "target", tied=False)
    # The same ancestor, but with a head of its own.
    rewrite(target, {**weights(base), "lm_head.weight": weights(base)["model.embed_tokens.weight"].clone()})
    transfer(str(tuned), str(base), str(target), tmp_path / "direct")
    extract(str(tuned), str(base), tmp_path / "v")
    apply(str(tmp_path / "v"), str(target), tmp_path / "out")
    for out in ("direct", "out"):
        made = weights(tmp_path / out)
        assert torch.equal(made["lm_head.weight"], weights(tuned)["model.embed_tokens.weight"])


def test_different_layer_counts_are_named(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    tuned = sibling(base, tmp_path / "tuned", seed=1)
    target = sibling(base, tmp_path / "target", seed=2)
    short = {name: t for name, t in weights(target).items() if ".layers.1." not in name}
    rewrite(target, short, num_hidden_layers=1)
    with pytest.raises(SurgeryError, match="num_hidden_layers 1 / 2"):
        transfer(str(tuned), str(base), str(target), tmp_path / "out")
