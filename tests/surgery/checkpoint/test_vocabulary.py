"""Promises of surgery.checkpoint.vocabulary; the references are the `tokenizers` library and brute force."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from surgery.checkpoint.vocabulary import Vocabulary, align_rows, differences, read_vocabulary
from surgery.errors import SurgeryError

TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "Größe 12, naïve café; 犬も歩けば棒に当たる",
    "a b  c\t\n",
] * 5
SPECIAL = ["<s>", "</s>", "<unk>", "[UNK]", "<|im_start|>"]


def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def word_level() -> Tokenizer:
    return Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 7}, unk_token="[UNK]"))  # a hole in the ids


def unigram_with_a_piece_twice() -> Tokenizer:
    return Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("a", -2.0), ("b", -3.0)], unk_id=0))


EVERY_KIND = [byte_level_bpe, word_piece, unigram, word_level, unigram_with_a_piece_twice]


def write(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path.parent


def read(folder: Path) -> dict[str, int]:
    vocabulary = read_vocabulary(folder)
    assert vocabulary is not None
    return dict(vocabulary.ids)


def failure(folder: Path) -> str:
    with pytest.raises(SurgeryError) as caught:
        read_vocabulary(folder)
    return str(caught.value)


@pytest.mark.parametrize("make", EVERY_KIND)
def test_tokenizer_json_says_what_the_library_says(tmp_path: Path, make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    first = next(iter(tokenizer.get_vocab()))  # a token of the model that is added again keeps its id
    tokenizer.add_special_tokens(["<|end|>", AddedToken("<think>", lstrip=True), first])
    tokenizer.add_tokens(["犬小屋"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = read_vocabulary(tmp_path)
    assert vocabulary is not None
    assert vocabulary.ids == tokenizer.get_vocab(with_added_tokens=True)
    assert vocabulary.size == max(vocabulary.ids.values()) + 1
    assert vocabulary.source == tmp_path / "tokenizer.json"


def test_an_added_token_never_takes_the_id_that_the_model_gives(tmp_path: Path) -> None:
    described = json.loads(word_level().to_str())
    described["added_tokens"] = [
        {"id": 9, "content": "a", "special": True}
        | dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    ]
    write(tmp_path / "tokenizer.json", described)
    assert read(tmp_path)["a"] == Tokenizer.from_str(json.dumps(described)).token_to_id("a") == 1


@pytest.mark.parametrize("make", [byte_level_bpe, word_piece])
def test_the_library_s_own_older_files(tmp_path: Path, make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    tokenizer.model.save(str(tmp_path))  # vocab.json and merges.txt, or vocab.txt
    assert read(tmp_path) == tokenizer.get_vocab(with_added_tokens=False)


def test_an_added_token_on_a_taken_id_is_refused(tmp_path: Path) -> None:
    tokenizer = word_level()
    tokenizer.add_tokens([f"<{row}>" for row in range(5)])  # the library counts tokens, and meets id 7
    assert tokenizer.token_to_id("<4>") == tokenizer.token_to_id("b") == 7
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert "tokenizer.json: id 7 has two tokens, 'b' and '<4>'" in failure(tmp_path)


def test_older_files_with_what_was_added_to_them(tmp_path: Path) -> None:
    write(tmp_path / "vocab.json", {"a": 0, "b": 1})
    write(tmp_path / "added_tokens.json", {"<x>": 2})
    write(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {"2": {"content": "<x>"}, "3": "<y>"}})
    assert read(tmp_path) == {"a": 0, "b": 1, "<x>": 2, "<y>": 3}


def test_word_piece_lists_are_read_by_line_and_by_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes("[PAD]\r\na b\r\n\u2028\r\n\x85\r\n##é".encode())
    assert read(tmp_path) == {"[PAD]": 0, "a b": 1, "\u2028": 2, "\x85": 3, "##é": 4}


def test_tokenizer_json_comes_first(tmp_path: Path) -> None:
    word_level().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "vocab.json", {"stale": 0})
    write(tmp_path / "added_tokens.json", {"a": 77})
    assert read(tmp_path) == word_level().get_vocab()


@pytest.mark.parametrize("files", [{}, {"config.json": {}}, {"tokenizer_config.json": {"model_max_length": 8}}])
def test_no_tokenizer_is_none(tmp_path: Path, files: dict[str, object]) -> None:
    for name, value in files.items():
        write(tmp_path / name, value)
    assert read_vocabulary(tmp_path) is None


def varint(number: int) -> bytes:
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def sentencepiece(pieces: list[str]) -> bytes:
    """A ModelProto: pieces (text, float score, enum type), a trainer spec, a normalizer, an unknown field."""
    score, control = b"\x15\x00\x00\x80\xbf", b"\x18\x03"
    model = b"".join(field(1, field(1, piece.encode()) + score + control) for piece in pieces)
    return model + field(2, b"\x18\x01" + field(1, b"text.txt")) + field(3, field(1, b"nmt_nfkc")) + b"\x21" + bytes(8)


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"])
def test_sentencepiece_model(tmp_path: Path, name: str) -> None:
    pieces = ["<unk>", "<s>", "</s>", "▁the", "犬", "x" * 300]
    (tmp_path / name).write_bytes(sentencepiece(pieces))
    write(tmp_path / "added_tokens.json", {"<pad>": len(pieces)})
    assert read(tmp_path) == {piece: row for row, piece in enumerate([*pieces, "<pad>"])}


@given(pieces=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, unique=True))
def test_any_sentencepiece_model_is_read_whole_or_refused(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("sp")
    model = sentencepiece(pieces)
    (folder / "tokenizer.model").write_bytes(model)
    assert read(folder) == {piece: row for row, piece in enumerate(pieces)}
    (folder / "tokenizer.model").write_bytes(model[:-1])
    assert "is no whole sentencepiece model (" in failure(folder)


@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model"):
        (folder / name).write_bytes(data)
        try:
            vocabulary = read_vocabulary(folder)
        except SurgeryError as error:
            assert error.where == str(folder / name)
        else:
            assert vocabulary is not None
            assert vocabulary.source.name == name
        (folder / name).unlink()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["vocab", "id", "content", "7"]) | st.text(), inner)
    ),
    max_leaves=8,
)


@given(vocab=json_values, added=json_values, decoder=json_values)
def test_any_json_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, vocab: Any, added: Any, decoder: Any
) -> None:
    folder = tmp_path_factory.mktemp("json")
    write(folder / "tokenizer.json", {"model": {"vocab": vocab}, "added_tokens": added})
    write(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    try:
        ids = read(folder)
    except SurgeryError as error:
        assert error.where is not None
        assert error.where.startswith(str(folder / "tokenizer"))
    else:
        assert len(set(ids.values())) == len(ids)
        assert all(type(row) is int and row >= 0 for row in ids.values())


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("tokenizer.json", '{"model": ', "is not valid JSON"),
        ("tokenizer.json", "[" * 100_000, "is nested more than 100 levels deep"),
        ("tokenizer.json", [], "is not a JSON object"),
        ("tokenizer.json", {"model": {"type": "BPE"}}, 'has no "model.vocab" from tokens to ids'),
        ("tokenizer.json", {"model": {"vocab": ["a"]}}, "\"model.vocab\": got 'a', expected entries [piece, score]"),
        (
            "tokenizer.json",
            {"model": {"vocab": {}}, "added_tokens": {"a": 1}},
            '"added_tokens": got a table of 1, expected a list of tables',
        ),
        ("tokenizer.json", {"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}, '"added_tokens": got a table of 1'),
        ("tokenizer.json", {"model": {"vocab": {"a": 0, "b": 0}}}, "id 0 has two tokens, 'a' and 'b'"),
        ("vocab.json", {"a": -1}, "'a' has id -1, expected a whole number from 0"),
        ("vocab.json", {"a": 1.0}, "'a' has id 1.0, expected a whole number from 0"),
        ("vocab.json", {"a": True}, "'a' has id true, expected a whole number from 0"),
        ("vocab.json", {"a": 10**30}, "expected a whole number from 0"),
        ("vocab.txt", "", "holds no token"),
        ("tokenizer.model", "", "is no whole sentencepiece model (no piece in it)"),
        ("tokenizer.model", "IQ== 0\nIg== 1\n", "is no whole sentencepiece model"),
        ("tekken.json", {}, "is a tokenizer of a format that is not read here"),
        ("qwen.tiktoken", "IQ== 0", "is a tokenizer of a format that is not read here"),
    ],
)
def test_damage_is_named_with_its_file(tmp_path: Path, name: str, value: object, text: str) -> None:
    error = failure(write(tmp_path / name, value))
    assert error.startswith(f"{tmp_path / name}: ")
    assert text in error


@pytest.mark.parametrize(
    ("decoder", "text"),
    [
        ({"0": {"content": "b"}}, "vocab.json: id 0 has two tokens, 'a' and 'b'"),
        ({"1": {"content": "a"}}, "tokenizer_config.json: gives 'a' id 1, and vocab.json gives it 0"),
        ({"-1": {"content": "b"}}, "'b' has id -1"),
        ({"9" * 5000: {"content": "b"}}, "expected a whole number from 0"),
        ({"x": {"content": "b"}}, "expected an id and"),
        ({"1": {}}, "expected an id and"),
        (["b"], '"added_tokens_decoder": got a list of 1, expected a table'),
    ],
)
def test_files_that_contradict_each_other(tmp_path: Path, decoder: object, text: str) -> None:
    write(tmp_path / "vocab.json", {"a": 0})
    write(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    assert text in failure(tmp_path)


def vocabulary(ids: dict[str, int]) -> Vocabulary:
    return Vocabulary(ids, Path("tokenizer.json"))


vocabularies = st.dictionaries(st.sampled_from("abcdefghijkl"), st.integers(0, 20)).map(
    lambda ids: vocabulary({token: row for row, token in {row: token for token, row in ids.items()}.items()})
)


@given(target=vocabularies, donor=vocabularies, target_rows=st.integers(0, 24), donor_rows=st.integers(0, 24))
def test_align_rows_is_what_brute_force_finds(
    target: Vocabulary, donor: Vocabulary, target_rows: int, donor_rows: int
) -> None:
    expected = []
    for row in range(target_rows):
        tokens = [token for token, each in target.ids.items() if each == row]
        found = donor.ids.get(tokens[0], -1) if tokens else -1
        expected.append(found if found < donor_rows else -1)
    aligned = align_rows(target, donor, target_rows, donor_rows)
    assert aligned.dtype == np.int64
    assert aligned.tolist() == expected


@given(a=vocabularies, b=vocabularies)
def test_differences_are_what_brute_force_finds(a: Vocabulary, b: Vocabulary) -> None:
    found = differences(a, b)
    assert found.same == (a.ids == b.ids)
    assert set(found.only_in_a) == a.ids.keys() - b.ids.keys()
    assert set(found.only_in_b) == b.ids.keys() - a.ids.keys()
    shared = a.ids.keys() & b.ids.keys()
    assert found.moved == {t: (a.ids[t], b.ids[t]) for t in shared if a.ids[t] != b.ids[t]}
    assert found.same or found.describe().endswith(").")


def test_a_vocabulary_aligns_with_itself_and_padding_stays_empty() -> None:
    ids = {f"t{row}": row for row in range(5)}
    assert align_rows(vocabulary(ids), vocabulary(ids), 8, 8).tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    assert align_rows(vocabulary({}), vocabulary(ids), 2, 8).tolist() == [-1, -1]
    assert vocabulary({}).size == 0


def test_differences_are_told_in_one_paragraph() -> None:
    a = vocabulary({"a": 0, "b": 1, "\n": 2, "x": 3})
    b = vocabulary({"b": 0, "a": 1, "\n": 2} | {f"n{row}": row for row in range(3, 8)})
    assert differences(a, b).describe("TUNED", "TARGET") == (
        "2 tokens have another id in TARGET than in TUNED ('a' 0 → 1, 'b' 1 → 0); "
        "1 tokens are only in TUNED ('x'); 5 tokens are only in TARGET ('n3', 'n4', 'n5' and 2 more)."
    )
    assert differences(a, a).describe("TUNED", "BASE") == "TUNED and BASE give every token the same id."
