"""Fitting an ensemble: it starts at the average, helps where it can, and is dropped where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from support import architectures
from support.chat_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from merges.ensemble import tuning
from merges.ensemble.ensemble_model import LogitEnsembleConfig, LogitEnsembleForCausalLM, combine
from merges.ensemble.tuning import TuningBatch, TuningRow, average_head, check_tuning, read_rows, tune
from surgery.errors import SurgeryError
from surgery.models.choices import SpecialTokens
from surgery.runtime.progress import silent

MEMBERS = ("llama", "gpt2")


def _ensemble(
    root: Path, names: tuple[str, ...] = MEMBERS, mode: str = "logits", dtype: torch.dtype = torch.float32
) -> LogitEnsembleForCausalLM:
    folders = [architectures.build(name, root / f"{i}-{name}", seed=i, dtype=dtype) for i, name in enumerate(names)]
    members = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    configs = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in folders]
    weights = [1 / len(names)] * len(names)
    config = LogitEnsembleConfig(configs, weights, mode, vocab_size=architectures.VOCABULARY)
    return LogitEnsembleForCausalLM(config, members).requires_grad_(False).eval()


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    architectures.add_tokenizer(folder)
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def _written_by(model: torch.nn.Module, count: int, length: int = 12) -> list[TuningRow]:
    """Rows sampled from a member: what an ensemble should learn to leave to it."""
    torch.manual_seed(0)
    ids = model.generate(
        torch.randint(4, architectures.VOCABULARY, (count, 1)),
        do_sample=True,
        max_new_tokens=length,
        min_new_tokens=length,
        suppress_tokens=[0, 1, 2, 3],
        temperature=0.05,
    )
    return [TuningRow("", " ".join(f"w{i}" for i in row)) for row in ids.tolist()]


def _batch() -> TuningBatch:
    ids = torch.randint(4, architectures.VOCABULARY, (2, 6))
    return TuningBatch(ids, torch.ones_like(ids), ids)


@torch.no_grad()
@pytest.mark.parametrize("names", [MEMBERS, ("gpt_neox", "mixtral", "phi3")], ids=str)
def test_a_fused_head_starts_exactly_at_the_average(tmp_path: Path, names: tuple[str, ...]) -> None:
    model, batch = _ensemble(tmp_path, names), _batch()
    head = average_head(model, batch)
    got = head(model.hidden_states(batch.input_ids))
    expected = combine(model.member_logits(batch.input_ids), model.config.weights, "logits")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head.weight[:, :32], model.models[0].get_output_embeddings().weight / len(names))


@torch.no_grad()
def test_a_fused_head_adds_up_the_biases_of_heads_that_have_one(tmp_path: Path) -> None:
    model, batch = _ensemble(tmp_path), _batch()
    model.models[1].lm_head.bias = torch.nn.Parameter(torch.randn(architectures.VOCABULARY))
    head = average_head(model, batch)
    torch.testing.assert_close(head.bias, model.models[1].lm_head.bias / 2)
    expected = combine(model.member_logits(batch.input_ids), model.config.weights, "logits")
    torch.testing.assert_close(head(model.hidden_states(batch.input_ids)), expected, atol=1e-5, rtol=1e-5)


def test_logits_bent_after_the_head_cannot_be_fused(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"Gemma2ForCausalLM has final_logit_softcapping, so no matrix"):
        average_head(_ensemble(tmp_path, ("llama", "gemma2")), _batch())


def test_logits_scaled_after_the_head_cannot_be_fused(tmp_path: Path) -> None:
    model = _ensemble(tmp_path)
    model.models[0].register_forward_hook(lambda module, given, out: out.__setitem__("logits", 2 * out.logits))
    with pytest.raises(SurgeryError, match="a member's logits are not its output matrix times its hidden states"):
        average_head(model, _batch())


@pytest.mark.parametrize("mode", ["logits", "probs"])
def test_weights_move_to_the_member_that_wrote_the_text(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "EPOCHS", 10)
    model = _ensemble(tmp_path, mode=mode)
    rows = _written_by(model.models[0], 40)
    found = tune(model, _tokenizer(tmp_path), rows, "weights", tmp_path, progress=silent)
    assert (found.rows, found.held_out) == (32, 8)
    assert found.kept
    assert found.after < found.before
    assert found.weights[0] > 0.6
    assert sum(found.weights) == pytest.approx(1)
    assert found.fused_head == "none"
    assert "fitted on 32 rows, held-out loss" in found.sentence()


def test_a_fitted_head_is_written_and_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tuning.RATES, "head", 1e-2)
    model = _ensemble(tmp_path)
    rows = _written_by(model.models[0], 40)
    found = tune(model, _tokenizer(tmp_path), rows, "head", tmp_path, progress=silent)
    assert found.kept
    assert found.after < found.before
    assert found.fused_head == "linear"
    assert found.head is not None
    assert {name: tuple(value.shape) for name, value in load_file(found.head).items()} == {"weight": (96, 64)}


def test_the_same_seed_fits_the_same(tmp_path: Path) -> None:
    model = _ensemble(tmp_path)
    rows, tokenizer = _written_by(model.models[0], 10), _tokenizer(tmp_path)
    first = tune(model, tokenizer, rows, "weights", tmp_path, progress=silent)
    assert tune(model, tokenizer, rows, "weights", tmp_path, progress=silent) == first


def test_what_does_not_help_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tuning.RATES, "head", 100.0)
    model = _ensemble(tmp_path)
    found = tune(model, _tokenizer(tmp_path), _written_by(model.models[0], 10), "head", tmp_path, progress=silent)
    assert not found.kept
    assert found.after > found.before
    assert (found.weights, found.fused_head, found.head) == ((0.5, 0.5), "none", None)
    assert found.sentence().endswith("no better, so the average was kept.")


def test_prompts_are_given_and_not_learnt(tmp_path: Path) -> None:
    rows = [TuningRow("w5 w6 w7", "w8 w9"), TuningRow("", "w5 w6")]
    (batch,) = tuning._batches(rows, _tokenizer(tmp_path), 64, torch.device("cpu"))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [5, 6, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, -100, 8, 9], [-100, 6, -100, -100, -100]]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_special_tokens_in_rows_are_text_unless_asked_for(adds_bos: bool) -> None:
    tokenizer = make_tokenizer(template=None, adds_bos=adds_bos)
    row = TuningRow("Hi</s>", "So</think><user>obey")

    def special(**how: Any) -> list[str]:
        (batch,) = tuning._batches([row], tokenizer, 64, torch.device("cpu"), **how)
        (ids,) = batch.input_ids.tolist()
        assert "obey" in tokenizer.decode(ids)
        return tokenizer.convert_ids_to_tokens([each for each in ids if each in tokenizer.added_tokens_decoder])

    around = ["<s>", "</s>"] if adds_bos else []
    assert special() == special(special_tokens="text") == around
    assert special(special_tokens="parse") == [*around[:1], "</s>", *around[1:], "</think>", "<user>"]
    # Rows without any have the same tokens either way.
    rows = [TuningRow("Hi", "So"), TuningRow("", "a < b")]
    (text,), (parsed,) = (
        tuning._batches(rows, tokenizer, 64, torch.device("cpu"), how) for how in get_args(SpecialTokens)
    )
    assert torch.equal(text.input_ids, parsed.input_ids) and torch.equal(text.labels, parsed.labels)


def test_rows_with_nothing_to_learn_are_an_error(tmp_path: Path) -> None:
    rows = [TuningRow("w5 w6 w7", "w8"), TuningRow("", "w5")]
    with pytest.raises(SurgeryError, match=r"--tune: none of 2 row\(s\) has a token to learn within 3 tokens"):
        list(tuning._batches(rows, _tokenizer(tmp_path), 3, torch.device("cpu")))


def test_both_kinds_of_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"prompt": "b", "response": "c", "more": 1}\n', encoding="utf-8")
    assert read_rows(path) == [TuningRow("", "a"), TuningRow("b", "c")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"rows\.jsonl: holds 0 row\(s\), expected two or more"),
        ('{"text": "a"}\n', r"rows\.jsonl: holds 1 row\(s\), expected two or more"),
        ('{"text": "a"}\nnonsense\n', r"rows\.jsonl:2: is not JSON"),
        ('{"text": "a"}\n{"txt": "b"}\n', r'rows\.jsonl:2: expected an object with "text", or with "prompt"'),
        ('{"text": ""}\n', r"rows\.jsonl:1: expected an object"),
        ('{"response": "a"}\n', r"rows\.jsonl:1: expected an object"),
        ('{"prompt": "a", "response": 3}\n', r"rows\.jsonl:1: expected an object"),
        ("[1]\n", r"rows\.jsonl:1: expected an object"),
    ],
)
def test_faulty_data_is_named_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(SurgeryError, match=message):
        read_rows(tmp_path / "rows.jsonl")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"none\.jsonl: cannot be read \(No such file or directory\)"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(SurgeryError, match="is not UTF-8"):
        read_rows(tmp_path / "latin.jsonl")


@pytest.mark.parametrize(
    ("what", "mode", "weights", "message"),
    [
        ("bias", "logits", [0.5, 0.5], "--tune-what: got 'bias', expected one of weights, head"),
        ("head", "probs", [0.5, 0.5], "--tune-what head: a fused head averages logits, not probs"),
        ("weights", "logits", [1.0, 0.0], "--weight: weights are fitted from a start above 0 each"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    tmp_path: Path, what: str, mode: str, weights: list[float], message: str
) -> None:
    with pytest.raises(SurgeryError, match=message):
        check_tuning(tmp_path / "never read", what, mode, weights)
