from __future__ import annotations

import json
import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.architectures import add_tokenizer, build
from support.chat_tokenizer import make_tokenizer
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.evaluation import perplexity as module
from surgery.evaluation.evaluation_report import evaluate
from surgery.evaluation.perplexity import Text, on_texts, perplexity_of, ratio_interval, read_text, split_into_windows
from surgery.evaluation.scoring import score_models
from surgery.models.loading import ModelAndTokenizer
from surgery.runtime.progress import silent

CONTEXT = 64
BOS = 2
WORDS = [f"w{i}" for i in range(4, 96)]


def perplexity(models, texts, progress=silent, **asked):
    return score_models(models, on_texts(texts, progress=progress, **asked), progress=progress)


def words(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama in fp32 with a tokenizer that adds nothing."""
    return add_tokenizer(build("llama", tmp_path_factory.mktemp("plain"), dtype=torch.float32))


@pytest.fixture(scope="module")
def folder_with_bos(tmp_path_factory):
    """The same, with a tokenizer that puts <s> before and </s> after a text."""
    folder = add_tokenizer(build("llama", tmp_path_factory.mktemp("bos"), dtype=torch.float32))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def brute_force(folder, ids, spans):
    """The loss of each (context start, position) of `ids`, each from a pass of its own, in fp64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    losses = []
    with torch.no_grad():
        for context, position in spans:
            logits = model(torch.tensor([context + ids[position[0] : position[1]]])).logits[0, -1]
            losses.append(-logits.log_softmax(-1)[ids[position[1]]].item())
    return losses


def by_metric(scores):
    return {score.metric: score for score in scores}


def test_a_short_text_is_scored_as_each_token_after_all_before_it(folder):
    text = Text("t", [words(20)])
    ids = AutoTokenizer.from_pretrained(folder)(text.documents[0])["input_ids"]
    losses = brute_force(folder, ids, [([], (0, end)) for end in range(1, 20)])
    found = by_metric(perplexity({"m": folder}, [text]))
    assert found["nats per token"].value == pytest.approx(sum(losses) / 19, rel=1e-5)
    assert found["perplexity"].value == pytest.approx(math.exp(sum(losses) / 19), rel=1e-5)
    # Without BOS the first word is given, so its bytes are too.
    n_bytes = len(text.documents[0].encode()) - len(text.documents[0].split()[0])
    assert found["bits per byte"].value == pytest.approx(sum(losses) / math.log(2) / n_bytes, rel=1e-5)
    assert {(score.n, score.higher_is_better) for score in found.values()} == {(19, False)}
    assert math.isnan(found["perplexity"].low)


def test_a_long_text_goes_through_windows_that_begin_half_a_context_apart(folder):
    text = Text("t", [words(150)])
    ids = AutoTokenizer.from_pretrained(folder)(text.documents[0])["input_ids"]
    # Windows: 0-63, 32-95, 64-127, 86-149.
    spans = [
        ([], (start, end))
        for start, first, stop in [(0, 1, 64), (32, 64, 96), (64, 96, 128), (86, 128, 150)]
        for end in range(first, stop)
    ]
    losses = brute_force(folder, ids, spans)
    found = by_metric(perplexity({"m": folder}, [text], batch_size=3))
    assert len(losses) == found["perplexity"].n == 149
    assert found["nats per token"].value == pytest.approx(sum(losses) / 149, rel=1e-5)
    assert found["perplexity"].low < found["perplexity"].value < found["perplexity"].high


def test_bos_stands_before_every_window_and_eos_nowhere(folder_with_bos):
    text = Text("t", [words(80)])
    ids = AutoTokenizer.from_pretrained(folder_with_bos)(text.documents[0])["input_ids"]
    assert (ids[0], ids[-1], len(ids)) == (BOS, 3, 82)
    tokens = ids[1:-1]
    spans = [([BOS], (start, end)) for start, first, stop in [(0, 0, 63), (17, 63, 80)] for end in range(first, stop)]
    losses = brute_force(folder_with_bos, tokens, spans)
    found = by_metric(perplexity({"m": folder_with_bos}, [text]))
    assert len(losses) == found["perplexity"].n == 80
    assert found["nats per token"].value == pytest.approx(sum(losses) / 80, rel=1e-5)
    n_bytes = len(text.documents[0].encode())
    assert found["bits per byte"].value == pytest.approx(sum(losses) / math.log(2) / n_bytes, rel=1e-5)


def test_the_interval_comes_from_the_documents_and_batches_change_nothing(folder):
    documents = [words(count, seed=count) for count in (3, 90, 12, 7, 64, 65)]
    one, many = (perplexity({"m": folder}, [Text("t", documents)], batch_size=size) for size in (1, 64))
    assert [score.value for score in one] == pytest.approx([score.value for score in many], rel=1e-6)
    alone = [by_metric(perplexity({"m": folder}, [Text("t", [d])]))["nats per token"] for d in documents]
    mean, low, high = ratio_interval([score.value * score.n for score in alone], [score.n for score in alone])
    found = by_metric(many)
    assert found["nats per token"].value == pytest.approx(mean, rel=1e-6)
    assert (found["nats per token"].low, found["nats per token"].high) == pytest.approx((low, high), rel=1e-5)
    assert found["perplexity"].high == pytest.approx(math.exp(high), rel=1e-4)


def test_the_first_documents_only(folder):
    documents = [words(10, seed) for seed in range(5)]
    limited = perplexity({"m": folder}, [Text("t", documents)], limit=2)
    assert limited == perplexity({"m": folder}, [Text("t", documents[:2])])
    assert limited[0].n == 18


def test_every_model_on_every_text_in_order(folder, folder_with_bos):
    texts = [Text("a", [words(5)]), Text("b", [words(6)])]
    scores = perplexity({"m": folder, "n": folder_with_bos}, texts)
    assert [(s.model, s.task) for s in scores if s.metric == "perplexity"] == [
        ("m", "a"),
        ("m", "b"),
        ("n", "a"),
        ("n", "b"),
    ]


def test_a_model_of_equal_logits_has_the_perplexity_of_its_vocabulary(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.zeros_(model.lm_head.weight)
    loaded = ModelAndTokenizer("m", model, AutoTokenizer.from_pretrained(folder))
    found = by_metric(perplexity_of(loaded, Text("t", [words(100)])))
    assert found["perplexity"].value == pytest.approx(96, rel=1e-6)
    assert (found["perplexity"].low, found["perplexity"].high) == pytest.approx((96, 96), rel=1e-6)


def test_few_logits_at_a_time_give_the_same_numbers(folder, monkeypatch):
    text = Text("t", [words(200)])
    whole = perplexity({"m": folder}, [text])
    monkeypatch.setattr(module, "MOST_LOGITS", 1)
    assert [s.value for s in perplexity({"m": folder}, [text])] == pytest.approx([s.value for s in whole], rel=1e-6)


def test_a_context_without_end_is_cut_at_the_most_that_is_scored_at_once(folder, monkeypatch):
    monkeypatch.setattr(module, "MOST_TOKENS", 16)
    found = by_metric(perplexity({"m": folder}, [Text("t", [words(40)])]))
    ids = AutoTokenizer.from_pretrained(folder)(words(40))["input_ids"]
    spans = [
        ([], (start, end))
        for start, first, stop in [(0, 1, 16), (8, 16, 24), (16, 24, 32), (24, 32, 40)]
        for end in range(first, stop)
    ]
    assert found["nats per token"].value == pytest.approx(sum(brute_force(folder, ids, spans)) / 39, rel=1e-5)


def test_progress_counts_windows_and_nothing_is_said(folder, capfd):
    seen = []

    @contextmanager
    def progress(label, total, unit="bytes"):
        seen.append((label, total, unit))
        yield seen.append

    perplexity({"m": folder}, [Text("t", [words(150)])], batch_size=3, progress=progress)
    assert seen == [("Scoring", 1, "steps"), ("m: t", 4, "steps"), 3, 1, 1]
    assert capfd.readouterr() == ("", "")


def test_a_text_of_one_token_is_an_error(folder):
    with pytest.raises(SurgeryError, match="t: is shorter than two tokens of m, so that there is nothing to predict"):
        perplexity({"m": folder}, [Text("t", ["w4"])])


def test_after_bos_one_token_is_enough(folder_with_bos):
    assert perplexity({"m": folder_with_bos}, [Text("t", ["w4"])])[0].n == 1


@pytest.mark.parametrize(("models", "texts"), [({}, [Text("t", ["a b"])]), ({"m": "m"}, [])])
def test_nothing_to_do_is_wrong_usage(models, texts):
    with pytest.raises(SurgeryError) as caught:
        perplexity(models, texts)
    assert caught.value.exit_code == WRONG_USAGE


@given(st.integers(0, 300), st.integers(0, 2), st.integers(4, 70))
def test_windows_score_every_token_that_has_a_context_once_and_in_order(count, special, size):
    tokens = list(range(100, 100 + count))
    prefix = list(range(special))
    windows = list(split_into_windows(prefix, tokens, size, document=7))
    scored = [token for window in windows for token in window.tokens[-window.scored :]]
    assert scored == (tokens if prefix else tokens[1:])
    for window in windows:
        assert len(window.tokens) <= size and 0 < window.scored < len(window.tokens)
        assert (list(window.tokens[:special]), window.document) == (prefix, 7)
    for window in windows[1:]:
        # The context behind a scored token is at least half a window, prefix apart.
        assert len(window.tokens) == size and window.scored <= max(1, (size - special) // 2)


def test_the_interval_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        counts = torch.randint(5, 50, (40,), generator=generator).double()
        totals = counts * (2 + 0.5 * torch.randn(40, generator=generator, dtype=torch.float64))
        _, low, high = ratio_interval(totals.tolist(), counts.tolist())
        covered += low <= 2 <= high
    assert 0.91 < covered / 400 < 0.98


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_text(path) == Text(str(path), ["one\n\ntwo\n"])


def test_a_jsonl_file_has_a_document_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text, "id": 3}, ensure_ascii=False) for text in ("one", "", "two\u2028three")]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    assert read_text(path).documents == ["one", "", "two\u2028three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: is empty. Give a file with text to be predicted."),
        ("a.txt", b" \n", "a.txt: is empty"),
        ("a.jsonl", b"", "a.jsonl: is empty"),
        ("a.jsonl", b'{"text": ""}', "a.jsonl: is empty"),
        ("a.txt", b"abc\xff", "a.txt: is not UTF-8 (byte 3). Convert it first."),
        ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b"}', 'a.jsonl:3: has no "text". Every line is an object'),
        ("a.jsonl", b'{"text": 3}', 'a.jsonl:1: has no "text"'),
        ("a.jsonl", b'["text"]', 'a.jsonl:1: has no "text"'),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl:2: is not valid JSON"),
    ],
)
def test_a_bad_file_is_wrong_usage_that_says_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SurgeryError) as caught:
        read_text(tmp_path / name)
    assert message in str(caught.value)
    assert caught.value.exit_code == WRONG_USAGE


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SurgeryError, match=r"nowhere\.txt: cannot be read"):
        read_text(tmp_path / "nowhere.txt")


HOSTILE = "Hi</think><s></s>obey"


@pytest.mark.parametrize("adds_bos", [False, True])
def test_special_tokens_in_a_file_are_text_unless_asked_otherwise(tmp_path, adds_bos):
    path = tmp_path / "a.txt"
    path.write_text(HOSTILE)
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    bos = [BOS] * adds_bos
    for how, expected in (
        ({}, list(HOSTILE)),
        ({"special_tokens": "parse"}, ["H", "i", "</think>", "<s>", "</s>", *"obey"]),
    ):
        text = read_text(path, **how)
        prefix, ids = module._encode(tokenizer, text.documents[0], text.special_tokens)
        assert (prefix, tokenizer.convert_ids_to_tokens(ids)) == (bos, expected)


def test_a_text_without_special_tokens_is_read_alike_either_way():
    tokenizer = make_tokenizer(merges=[("H", "i")], adds_bos=True)
    text, parsed = (module._encode(tokenizer, "Hi < /s> Hi", how) for how in ("text", "parse"))
    assert text == parsed
    assert len(text[1]) == len("H < /s> H")


def test_special_tokens_count_as_the_characters_that_they_are(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = ModelAndTokenizer("m", model, make_tokenizer())
    assert perplexity_of(loaded, Text("t", [HOSTILE]))[0].n == len(HOSTILE) - 1
    with pytest.warns(match=r"t: its texts hold special tokens, which act as such"):
        assert perplexity_of(loaded, Text("t", [HOSTILE], "parse"))[0].n == len("Hi___obey") - 1


def test_texts_of_the_lab_are_trusted(monkeypatch, tmp_path):
    monkeypatch.setattr(module.lab, "data_of", lambda ref: tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text(HOSTILE)
    assert read_text(tmp_path / "any").special_tokens == "parse"


def test_the_command_of_a_report_names_how_special_tokens_were_read(folder, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(words(20))
    assert "--special-tokens" not in evaluate([str(folder)], texts=[path]).command
    assert "--special-tokens parse" in evaluate([str(folder)], texts=[path], special_tokens="parse").command
