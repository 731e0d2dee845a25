"""The tokenizer: whatever Unicode goes in comes out, and the same corpus gives the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.forks import Fork
from transformers import AutoTokenizer

from surgery.engine.manifest import read_manifest
from surgery.errors import SurgeryError
from surgery.growth.data.tokenizer_training import END, TokenizerReport, train_tokenizer

CORPUS = ["the cat sat on the mat, and the dog ate the cake.\n" * 40, "Ω Ω Ω Ω the end of the line\n" * 20, "ж 中"]
VOCAB = 400


def trained(folder: Path, corpus: list[str] = CORPUS, vocab: int = VOCAB) -> TokenizerReport:
    return train_tokenizer(iter(corpus), folder, vocab=vocab)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tok"
    trained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
@example(" the  end \n\n\t ")
@example("\r\n\x00\u2028\u00a0")
@example("👨‍👩‍👧 e\u0301 ḱ 中文 ـا")
@example(f"{END} the<0x41><0x0A>▁Ġ </s>")
@example("<0xE2>" * 3)
def test_whatever_unicode_goes_in_comes_out(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_common_words_are_tokens_and_rare_characters_bytes(tokenizer: Any) -> None:
    assert tokenizer.tokenize(" the Ω") == [" the", " Ω"]
    assert tokenizer.tokenize("中") == ["<0xE4>", "<0xB8>", "<0xAD>"]


def test_every_id_has_its_place_and_texts_end_with_the_special_token(folder: Path, tokenizer: Any) -> None:
    report = read_manifest(folder)["report"]
    assert len(tokenizer) == report["size"] <= VOCAB
    assert tokenizer.convert_ids_to_tokens([0, 1, 256]) == [END, "<0x00>", "<0xFF>"]
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == END
    ids = sorted(tokenizer.get_vocab().values())
    assert ids == list(range(report["size"])) == list(range(1 + 256 + report["alphabet"] + report["merges"]))


def test_a_corpus_with_too_few_pairs_gives_fewer_tokens_and_says_so(tmp_path: Path) -> None:
    report = trained(tmp_path / "tok", ["ab ab"], vocab=1000)
    assert (report.size, report.asked, report.alphabet) == (1 + 256 + 3 + 1, 1000, 3)
    assert AutoTokenizer.from_pretrained(tmp_path / "tok").tokenize("ab") == ["ab"]


def test_nothing_is_merged_across_a_character_that_is_spelled_in_bytes(tmp_path: Path) -> None:
    text = "x" * 50_000 + "axb" * 10 + "".join(f"q{chr(0x4E00 + at)}z" for at in range(10))
    trained(tmp_path / "tok", [text], vocab=300)
    assert "qz" not in AutoTokenizer.from_pretrained(tmp_path / "tok").get_vocab()


def test_the_same_corpus_gives_the_same_bytes_on_any_number_of_threads(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from surgery.growth.data.tokenizer_training import train_tokenizer; "
        f"train_tokenizer({CORPUS!r}, Path(sys.argv[1]), vocab={VOCAB})"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "3", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True, env=environment)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["surgery.json", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_vocabulary_without_room_is_refused(tmp_path: Path) -> None:
    message = "--vocab: got 258, expected 260 or more: 1 special tokens, 256 bytes and 3 characters"
    with pytest.raises(SurgeryError, match=message):
        trained(tmp_path / "tok", ["ab ab"], vocab=258)
    assert not (tmp_path / "tok").exists()


@pytest.mark.parametrize("corpus", [[], [""], ["", ""]])
def test_an_empty_corpus_is_refused(tmp_path: Path, corpus: list[str]) -> None:
    with pytest.raises(SurgeryError, match="corpus: holds no text"):
        trained(tmp_path / "tok", corpus)


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"'\\ud800', half of a surrogate pair"):
        trained(tmp_path / "tok", ["fine", "a\ud800b"])


@pytest.mark.parametrize("special", [(), ("<s>", "<s>"), ("x",), ("<0x41>",)])
def test_special_tokens_that_are_no_good_are_refused(tmp_path: Path, special: tuple[str, ...]) -> None:
    with pytest.raises(SurgeryError, match="--special: got"):
        train_tokenizer(CORPUS, tmp_path / "tok", vocab=VOCAB, special=special)
    with pytest.raises(SurgeryError, match=r"--special: 'the' is also learnt as ordinary text"):
        train_tokenizer(["the the the"], tmp_path / "tok", vocab=VOCAB, special=("the",))


def test_what_is_there_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    first = train_tokenizer(CORPUS, tmp_path / "tok", vocab=VOCAB, refs=["texts/*.md"])
    line = read_manifest(tmp_path / "tok")["command"]["line"]
    assert line == f"surgery grow tokenizer 'texts/*.md' -o OUT --vocab {VOCAB}"
    special = ("<end>", "<user>")
    train_tokenizer(CORPUS, tmp_path / "chat", vocab=VOCAB, special=special, refs=["a.jsonl"], field="content")
    line = read_manifest(tmp_path / "chat")["command"]["line"]
    options = f"--vocab {VOCAB} --special '<end>' --special '<user>' --field content"
    assert line == f"surgery grow tokenizer a.jsonl -o OUT {options}"
    with pytest.raises(SurgeryError, match="exists already"):
        trained(tmp_path / "tok", ["other"])
    second = train_tokenizer(["other " * 9], tmp_path / "tok", vocab=VOCAB, overwrite=True)
    assert second.hash != first.hash and read_manifest(tmp_path / "tok")["report"]["documents"] == 1
    assert first.table().rows and not (tmp_path / "tok.partial").exists()


@pytest.mark.parametrize("room", [10, 2000])
@pytest.mark.parametrize("texts", [1, 100])
def test_a_disk_that_takes_no_more_is_said_in_one_line(tmp_path: Path, room: int, texts: int) -> None:
    code = (
        "import resource, sys, transformers; from pathlib import Path; from surgery.errors import SurgeryError\n"
        "from surgery.growth.data.tokenizer_training import train_tokenizer\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.RLIM_INFINITY))\n"
        f"try: train_tokenizer(['the cat ' * 200] * {texts}, Path(sys.argv[1]), vocab=300)\n"
        "except SurgeryError as error: print(error.what)"
    )
    exit_code, out, complaints = Fork(code, tmp_path / "tok").wait()
    assert exit_code == 0, complaints
    assert out.startswith("cannot be written (File too large")
