"""Promises of merges.tokenizer.files; the references are the `tokenizers` library and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from merges.config.schema import TokenizerRule, TokenRule, ZeroToken
from merges.tokenizer.files import added_tokens, extend_tokenizer, read_tokenizer_files
from merges.tokenizer.plan import TokenModel, TokenPlan, plan_tokens
from surgery.checkpoint.tokenizer_files import is_tokenizer_file
from surgery.checkpoint.vocabulary import read_vocabulary
from surgery.errors import SurgeryError

SPECIAL = ["<unk>", "<s>", "</s>"]
PLAIN = "hello help hell low lower lowest new newer newest wide wider widest the then other " * 3
OTHERS = "hello yellow fellow mellow window willow swallow hollow shallow widow news the there " * 3
ROWS = 1000


def byte_level(text: str, special: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=310, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens(list(special))  # behind the model's own tokens, as Qwen and Llama 3 have them
    return tokenizer


def bpe(text: str, special: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=60, special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def word_piece(text: str, special: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=70, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def unigram(text: str, special: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def word_level(text: str, special: Sequence[str]) -> Tokenizer:
    words = dict.fromkeys([*SPECIAL, *text.split()])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


Make = Callable[[str, Sequence[str]], Tokenizer]
KINDS: list[Make] = [byte_level, bpe, word_piece, unigram, word_level]


def save(tokenizer: Tokenizer, folder: Path, **settings: Any) -> TokenModel:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    return TokenModel(folder.name, folder, ROWS)


def write(plan: TokenPlan, folder: Path) -> Path:
    for name, data in plan.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def union(models: Sequence[TokenModel]) -> TokenPlan:
    return plan_tokens(models, TokenizerRule(source="union"), base=models[0].ref)


@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize("base", KINDS)
def test_a_union_loads_everywhere_with_the_planned_ids(tmp_path: Path, base: Make, other: Make) -> None:
    ours = base(PLAIN, ["<s>", "</s>"])
    theirs = other(OTHERS, ["</s>", "<|turn|>"])
    theirs.add_tokens([AddedToken("<tool>", lstrip=True, normalized=False)])
    plan = union([save(ours, tmp_path / "A"), save(theirs, tmp_path / "B")])
    out = write(plan, tmp_path / "out")
    ids = dict(plan.vocabulary.ids)
    assert set(ids) == {*ours.get_vocab(), *theirs.get_vocab()}
    assert ours.get_vocab().items() <= ids.items()
    read = read_vocabulary(out)
    assert read is not None
    assert read.ids == ids
    loaded = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert loaded.get_vocab() == ids
    for reader in (AutoTokenizer.from_pretrained(out), PreTrainedTokenizerFast.from_pretrained(out)):
        assert reader.get_vocab() == ids
        assert reader.convert_tokens_to_ids(list(ids)) == list(ids.values())
    assert loaded.encode("low<|turn|>").ids[-1] == ids["<|turn|>"]
    assert loaded.encode("low <tool>").ids == [*ours.encode("low").ids, ids["<tool>"]]
    assert loaded.decode([ids["<|turn|>"]], skip_special_tokens=True) == ""
    for line in (PLAIN, "hello there" if base not in (word_piece, word_level) else "hello then"):
        assert loaded.encode(line).ids == ours.encode(line).ids


@pytest.mark.parametrize("base", [byte_level, bpe, unigram])
def test_a_union_cuts_any_text_as_the_base_did(tmp_path: Path, base: Make) -> None:
    """Text of characters that the base knows; "yellow" and others are tokens of the second model."""
    ours, theirs = base(PLAIN, ["</s>"]), base(OTHERS, ["</s>", "<|turn|>"])
    plan = union([save(ours, tmp_path / "A"), save(theirs, tmp_path / "B")])
    loaded = Tokenizer.from_file(str(write(plan, tmp_path / "out") / "tokenizer.json"))
    assert len(plan.vocabulary.ids) > len(ours.get_vocab()) + 5
    words = [*OTHERS.split(), *PLAIN.split()]
    known = [word for word in words if base is byte_level or set(word) <= set(PLAIN)]

    @settings(deadline=None, max_examples=200)
    @given(st.one_of(st.text("helowrnt ", max_size=40), st.lists(st.sampled_from(known)).map(" ".join)))
    def check(text: str) -> None:
        assert loaded.encode(text).ids == ours.encode(text).ids
        assert loaded.decode(loaded.encode(text).ids) == ours.decode(ours.encode(text).ids)

    check()


def test_word_level_learns_the_words_it_lacked(tmp_path: Path) -> None:
    plan = union([save(word_level("a b", []), tmp_path / "A"), save(word_level("b c", []), tmp_path / "B")])
    loaded = Tokenizer.from_file(str(write(plan, tmp_path / "out") / "tokenizer.json"))
    assert loaded.encode("a b c d").tokens == ["a", "b", "c", "<unk>"]


def test_transformers_own_classes_keep_the_ids(tmp_path: Path) -> None:
    ours, theirs = byte_level(PLAIN, ["</s>"]), byte_level(OTHERS, ["<|im_start|>", "<|im_end|>"])
    models = [save(ours, tmp_path / "A", tokenizer_class="Qwen2Tokenizer"), save(theirs, tmp_path / "B")]
    plan = union(models)
    loaded = AutoTokenizer.from_pretrained(write(plan, tmp_path / "out"))
    known = loaded.get_vocab()
    assert {token: known.get(token) for token in plan.vocabulary.ids} == dict(plan.vocabulary.ids)
    assert loaded("<|im_start|>").input_ids == [plan.vocabulary.ids["<|im_start|>"]]


def test_ids_with_gaps_survive_the_loader(tmp_path: Path) -> None:
    gaps = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 7}, unk_token="<unk>"))
    gaps.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plan = union([save(gaps, tmp_path / "A"), save(word_level("a z", ["<x>"]), tmp_path / "B")])
    loaded = Tokenizer.from_file(str(write(plan, tmp_path / "out") / "tokenizer.json"))
    assert loaded.get_vocab() == dict(plan.vocabulary.ids)
    assert loaded.encode("b <x> z").ids == [7, plan.vocabulary.ids["<x>"], plan.vocabulary.ids["z"]]


def test_unigram_with_a_gap_behind_its_pieces_cannot_grow(tmp_path: Path) -> None:
    a = save(unigram(PLAIN, []), tmp_path / "A")
    path = tmp_path / "A" / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    n = len(value["model"]["vocab"])
    value["added_tokens"].append({**value["added_tokens"][0], "id": n + 1, "content": "<far>"})
    path.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(SurgeryError) as caught:
        union([a, save(unigram(OTHERS, []), tmp_path / "B")])
    assert str(caught.value) == (
        f"{path}: leaves id {n} without a token, so that no more tokens can follow. "
        "Take this tokenizer as it is: tokenizer_source: base, or MODEL."
    )


def test_unigram_that_gains_added_tokens_only_keeps_its_pieces(tmp_path: Path) -> None:
    ours = unigram(PLAIN, [])
    theirs = unigram(PLAIN, ["<|turn|>"])
    plan = union([save(ours, tmp_path / "A"), save(theirs, tmp_path / "B")])
    before = json.loads((tmp_path / "A" / "tokenizer.json").read_text(encoding="utf-8"))
    after = json.loads(plan.files["tokenizer.json"])
    assert after["model"] == before["model"]
    assert Tokenizer.from_str(json.dumps(after)).token_to_id("<|turn|>") == plan.vocabulary.ids["<|turn|>"]


def test_a_piece_without_score_is_refused(tmp_path: Path) -> None:
    files = {"tokenizer.json": json.dumps({"model": {"vocab": [["a"], ["b", -1.0]]}}).encode()}
    with pytest.raises(SurgeryError, match=r'tokenizer\.json: "model\.vocab" holds a piece without its score'):
        extend_tokenizer(files, {"a": 0, "b": 1, "c": 2}, ["c"], {}, where=tmp_path)


def test_without_tokenizer_json_nothing_can_be_added(tmp_path: Path) -> None:
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / "vocab.json").write_text('{"a": 0, "b": 1}', encoding="utf-8")
    (tmp_path / "A" / "merges.txt").write_text("", encoding="utf-8")
    models = [TokenModel("A", tmp_path / "A", 2), save(word_level("a c", []), tmp_path / "B")]
    with pytest.raises(SurgeryError) as caught:
        union(models)
    assert str(caught.value) == (
        f"{tmp_path / 'A'}: has no tokenizer.json to add 4 tokens to ('<unk>', '<s>', '</s>' and 1 more). Convert it: "
        'AutoTokenizer.from_pretrained("DIR").save_pretrained("DIR") writes tokenizer.json.'
    )
    plan = plan_tokens(models, TokenizerRule(source="base"), base="A")
    assert plan.files == {"merges.txt": b"", "vocab.json": b'{"a": 0, "b": 1}'}


def test_settings_are_kept_and_older_tables_are_dropped(tmp_path: Path) -> None:
    entry = {
        "content": "</s>",
        "special": True,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
    }
    a = save(word_level("a b", ["</s>"]), tmp_path / "A", added_tokens_decoder={"2": entry}, model_max_length=77)
    for name in (
        "tokenizer.model",
        "added_tokens.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "config.json",
    ):
        (tmp_path / "A" / name).write_text("{}", encoding="utf-8")
    plan = union([a, save(word_level("b", ["<x>"]), tmp_path / "B")])
    names = ["chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert list(plan.files) == names
    written = json.loads(plan.files["tokenizer_config.json"])
    assert written["model_max_length"] == 77
    assert written["added_tokens_decoder"] == {"2": entry, "5": {**entry, "content": "<x>"}}
    assert AutoTokenizer.from_pretrained(write(plan, tmp_path / "out")).get_vocab() == dict(plan.vocabulary.ids)


def test_flags_of_added_tokens_come_from_whichever_file_has_them(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0}', encoding="utf-8")
    (tmp_path / "added_tokens.json").write_text('{"<p>": 1, "<q>": 2, "<r>": 3, "<t>": 4}', encoding="utf-8")
    (tmp_path / "special_tokens_map.json").write_text(
        '{"pad_token": {"content": "<p>"}, "additional_special_tokens": ["<q>"]}', encoding="utf-8"
    )
    (tmp_path / "tokenizer_config.json").write_text(
        '{"added_tokens_decoder": {"4": {"content": "<t>", "lstrip": true}, "5": "<u>"}}', encoding="utf-8"
    )
    assert added_tokens(tmp_path) == {
        "<p>": {"special": True},
        "<q>": {"special": True},
        "<r>": {"special": False},
        "<t>": {"lstrip": True},
        "<u>": {},
    }


def test_a_token_of_ones_own_becomes_an_added_token(tmp_path: Path) -> None:
    a = save(byte_level(PLAIN, ["</s>"]), tmp_path / "A")
    rule = TokenizerRule(source="base", tokens={"<think>": TokenRule(source=ZeroToken())})
    plan = plan_tokens([a], rule, base="A")
    loaded = Tokenizer.from_file(str(write(plan, tmp_path / "out") / "tokenizer.json"))
    low = loaded.encode("low").ids
    assert loaded.encode("low<think>low").ids == [*low, plan.vocabulary.ids["<think>"], *low]


def test_tokenizer_files_are_told_from_others(tmp_path: Path) -> None:
    files = {
        "tokenizer.json": True,
        "spiece.model": True,
        "qwen.tiktoken": True,
        "tokenization_x.py": True,
        "chat_template.jinja": True,
        "additional_chat_templates/tool_use.jinja": True,
        "config.json": False,
        "generation_config.json": False,
        "modeling_x.py": False,
        "model.safetensors": False,
        "LICENSE": False,
    }
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    assert {name: is_tokenizer_file(name) for name in files} == files
    assert read_tokenizer_files(tmp_path) == {name: name.encode() for name, ours in sorted(files.items()) if ours}
