"""One stream of tokens, the same whatever interrupts its making, read in windows."""

from __future__ import annotations

import json
import os
import re
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.forks import Fork
from support.processes import fork_ranks
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from surgery.errors import SurgeryError
from surgery.growth.data import token_store
from surgery.growth.data.corpus import documents, shuffle
from surgery.growth.data.token_store import INDEX, LOCK, TOKENS, TokenStore
from surgery.io.locks import exclusive_lock

ROOT = Path(__file__).parents[4]
EOS, VOCAB = 256, 257
SEQUENCE = 16


def bytewise() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for every byte. As some do, it puts EOS before texts, cuts and pads them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)} | {"<|endoftext|>": EOS}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        "<|endoftext|> $A", special_tokens=[("<|endoftext|>", EOS)]
    )
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    found.backend_tokenizer.enable_truncation(5)
    found.backend_tokenizer.enable_padding(length=9)
    return found


def store(folder: Path, *refs: str | Path, **asked: Any) -> TokenStore:
    settings = {"tokenizer": bytewise(), "sequence": SEQUENCE, "seed": 0, "eos": EOS, "vocab_size": VOCAB} | asked
    return TokenStore(folder, [str(ref) for ref in refs], settings.pop("tokenizer"), **settings)


def reference(ref: Path, *, seed: int = 0) -> list[int]:
    """The whole stream by the plainest way."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    to_letter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids: list[int] = []
    for document in shuffle(documents([str(ref)]), seed=seed):
        [(text, _)] = to_letter.pre_tokenize_str(document.text)
        ids += [*(letters[letter] for letter in text), EOS]
    return ids


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    lines = [{"text": f"{n}: " + "αβ c\n" * (n % 7)} for n in range(300)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of ten documents and commits every 500 tokens."""
    monkeypatch.setattr(token_store, "BATCH_DOCUMENTS", 10)
    monkeypatch.setattr(token_store, "COMMIT", 500)


def whole(folder: Path, text: Path, **asked: Any) -> bytes:
    found = store(folder, text, **asked)
    found.require(10**6)
    return (folder / TOKENS).read_bytes()


def test_the_stream_is_every_document_followed_by_the_end_of_text(tmp_path, text):
    ids = reference(text)
    assert whole(tmp_path / "s", text) == np.array(ids, "<u2").tobytes()
    assert whole(tmp_path / "t", text, vocab_size=2**16 + 1) == np.array(ids, "<u4").tobytes()
    assert whole(tmp_path / "u", text, seed=1) == np.array(reference(text, seed=1), "<u2").tobytes()


def test_a_window_begins_at_its_number_times_the_sequence(tmp_path, text):
    found, ids = store(tmp_path / "s", text), reference(text)
    found.require(10**6)
    assert found.count == found.known == (len(ids) - 1) // SEQUENCE
    numbers = [0, found.count - 1, 7, 7]
    rows = found.windows(numbers)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [ids[n * SEQUENCE : n * SEQUENCE + SEQUENCE + 1] for n in numbers]
    assert found.windows([]).shape == (0, SEQUENCE + 1)
    for number in (-1, found.count):
        with pytest.raises(IndexError):
            found.windows([number])


def test_no_more_is_tokenised_than_was_asked_for(tmp_path, text, small_steps):
    found = store(tmp_path / "s", text)
    assert (found.tokens, found.known, found.count) == (0, 0, None) and not (tmp_path / "s").exists()
    found.require(3)
    assert found.documents == 10 and 3 <= found.known < 40 and found.count is None
    before = found.windows([0, 1, 2])
    found.require(2)
    assert found.documents == 10
    found.require(found.known + 1)
    assert found.documents == 20 and torch.equal(found.windows([0, 1, 2]), before)
    with pytest.raises(IndexError, match="is not there yet"):
        found.window_at(found.known)
    found.require(10**6)
    assert found.documents == 300 and found.count == found.known
    assert (tmp_path / "s" / TOKENS).read_bytes() == np.array(reference(text), "<u2").tobytes()


def test_a_long_document_is_tokenised_in_pieces_that_end_with_lines(tmp_path, monkeypatch):
    (tmp_path / "long.txt").write_text("".join(f"line {n}\n" for n in range(99)) + "x" * 100)
    expected = np.array(reference(tmp_path / "long.txt"), "<u2").tobytes()
    monkeypatch.setattr(token_store, "PIECE", 50)
    monkeypatch.setattr(token_store, "BATCH_CHARACTERS", 120)
    assert whole(tmp_path / "s", tmp_path / "long.txt") == expected


@given(st.text(alphabet="a\n", max_size=60), st.integers(1, 9))
def test_pieces_are_the_document(document, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_store, "PIECE", piece)
        cut = list(token_store._pieces(document))
    assert "".join(part.text for part in cut) == document
    assert [part.is_last for part in cut] == [False] * (len(cut) - 1) + [True]
    assert all(part.text.endswith("\n") and len(part.text) > piece for part in cut[:-1])


def test_windows_come_in_order_and_then_in_another_order_in_each_pass(tmp_path, text):
    found = store(tmp_path / "s", text)
    found.require(10**6)
    count = found.count
    passes = [[found.window_at(drawn) for drawn in range(e * count, (e + 1) * count)] for e in range(3)]
    assert passes[0] == list(range(count))
    assert all(sorted(each) == passes[0] for each in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]
    again, other = store(tmp_path / "s", text), store(tmp_path / "t", text, seed=1)
    other.require(10**6)
    assert [again.window_at(drawn) for drawn in range(count, 2 * count)] == passes[1]
    assert [other.window_at(drawn) for drawn in range(count, 2 * count)] != passes[1]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[4:]
from surgery.growth.data import token_store
from test_token_store import store

token_store.BATCH_DOCUMENTS, token_store.COMMIT = 10, 500
add, calls = token_store.TokenStore._write_tokens, [0]
def add_and_die(self, file, lot):
    calls[0] += 1
    size = add(self, file, lot)
    if calls[0] == int(sys.argv[3]):
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return size
token_store.TokenStore._write_tokens = add_and_die
store(Path(sys.argv[1]), sys.argv[2]).require(10**6)
"""


@pytest.mark.slow
def test_after_a_kill_the_stream_is_continued_with_the_same_bytes(tmp_path, text, monkeypatch):
    expected, folder = whole(tmp_path / "uninterrupted", text), tmp_path / "killed"
    # Killed twice: first in its middle, then while it goes on.
    for calls, seen in ((8, 0), (9, 70)):
        killed = Fork(KILLED, folder, text, calls, ROOT, ROOT / "tests", Path(__file__).parent)
        code, _, complaints = killed.wait()
        assert code == -signal.SIGKILL, complaints
        held = json.loads((folder / INDEX).read_text())["state"]
        assert seen < held["documents"] < 300 and (folder / TOKENS).stat().st_size > 2 * held["tokens"]
    monkeypatch.setattr(token_store, "COMMIT", 500)
    found = store(folder, text)
    assert found.documents == held["documents"]
    assert found.windows([0]).tolist() == [list(np.frombuffer(expected, "<u2")[: SEQUENCE + 1])]
    found.require(10**6)
    assert (folder / TOKENS).read_bytes() == expected
    assert sorted(path.name for path in folder.iterdir()) == [TOKENS, INDEX]


def test_what_was_counted_is_read_past_and_not_tokenised_again(tmp_path, text, small_steps, monkeypatch):
    store(tmp_path / "s", text).require(100)
    sizes: list[int] = []
    add = TokenStore._write_tokens

    def counted(self, file, lot):
        sizes.append(sum(piece.is_last for piece in lot))
        return add(self, file, lot)

    monkeypatch.setattr(TokenStore, "_write_tokens", counted)
    found = store(tmp_path / "s", text)
    before = found.documents
    assert before > 50
    found.require(before)
    assert not sizes
    found.require(10**6)
    assert sum(sizes) == 300 - before


def test_an_error_on_the_way_leaves_a_stream_that_can_be_continued(tmp_path, text, small_steps, monkeypatch):
    expected = whole(tmp_path / "uninterrupted", text)
    found = store(tmp_path / "s", text)
    add, calls = TokenStore._write_tokens, [0]

    def sometimes(self, file, lot):
        calls[0] += 1
        size = add(self, file, lot)
        if calls[0] in (9, 20):
            raise KeyboardInterrupt if calls[0] == 9 else OSError(28, "No space left on device")
        return size

    monkeypatch.setattr(TokenStore, "_write_tokens", sometimes)
    with pytest.raises(KeyboardInterrupt):
        found.require(10**6)
    with pytest.raises(SurgeryError, match=r"tokens.bin: the disk is full. Free some space and run the same command"):
        found.require(10**6)
    found.require(10**6)
    assert found.documents == 300 and (tmp_path / "s" / TOKENS).read_bytes() == expected


def test_two_runs_at_one_folder_write_one_stream_between_them(tmp_path, text, small_steps):
    expected = whole(tmp_path / "alone", text)
    one, other = store(tmp_path / "s", text), store(tmp_path / "s", text)
    for windows in (20, 60, 150, 10**6):
        one.require(windows)
        other.require(windows + 30)
    one.require(10**6)
    assert (tmp_path / "s" / TOKENS).read_bytes() == expected
    assert one.documents == other.documents == 300
    assert torch.equal(one.windows([0, one.known - 1]), other.windows([0, one.known - 1]))


def test_a_folder_that_another_run_writes_to_is_left_alone(tmp_path, text, small_steps):
    found = store(tmp_path / "s", text)
    found.require(10)
    before = (tmp_path / "s" / TOKENS).read_bytes()
    with (
        exclusive_lock(tmp_path / "s" / LOCK, where="s", busy="busy"),
        pytest.raises(
            SurgeryError, match=r"s: another run is writing tokens here \(process \d+\). Wait until it is done"
        ),
    ):
        found.require(10**6)
    assert (tmp_path / "s" / TOKENS).read_bytes() == before
    found.require(10**6)
    assert found.documents == 300


def test_a_special_token_in_the_corpus_is_text_unless_it_is_asked_to_be_that_token(tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("one<|endoftext|>two")
    plain, parsed = store(tmp_path / "text", texts), store(tmp_path / "parse", texts, parse_special=True, sequence=4)
    plain.require(1)
    parsed.require(1)
    read = [np.fromfile(tmp_path / name / TOKENS, "<u2").tolist() for name in ("text", "parse")]
    assert [ids.count(EOS) for ids in read] == [1, 2]
    assert plain.identity != parsed.identity
    for name, parse in (("text", True), ("parse", False)):
        with pytest.raises(SurgeryError, match="these tokens were made with another reading of special tokens"):
            store(tmp_path / name, texts, parse_special=parse)


def test_a_stream_that_another_run_began_anew_is_not_mixed_with_the_old_one(tmp_path, text, small_steps):
    found = store(tmp_path / "s", text)
    found.require(20)
    (tmp_path / "s" / INDEX).unlink()
    with pytest.raises(SurgeryError, match="s: was begun anew by another run"):
        found.require(10**6)
    store(tmp_path / "s", text, seed=1).require(1)
    with pytest.raises(SurgeryError, match="made with another seed"):
        found.require(10**6)


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"seed": 1}, "seed"),
        ({"eos": 0}, "end-of-text id"),
        ({"vocab_size": 2**16 + 1}, "dtype"),
        ({"field": "prompt"}, "corpus"),
        ({"seed": 1, "eos": 0}, "seed and end-of-text id"),
    ],
)
def test_a_stream_of_something_else_is_not_continued(tmp_path, text, small_steps, asked, what):
    store(tmp_path / "s", text).require(1)
    with pytest.raises(SurgeryError, match=f"s: these tokens were made with another {what}. Put back what was changed"):
        store(tmp_path / "s", text, **asked)


def test_a_stream_of_another_corpus_or_tokenizer_is_not_continued(tmp_path, text, small_steps):
    first = store(tmp_path / "s", text)
    first.require(1)
    other = bytewise()
    other.add_tokens(["αβ"])
    with pytest.raises(SurgeryError, match="another tokenizer"):
        store(tmp_path / "s", text, tokenizer=other, vocab_size=VOCAB + 1)
    content = text.read_text()
    text.write_text(content.replace("299", "300"))
    with pytest.raises(SurgeryError, match="another corpus"):
        store(tmp_path / "s", text)
    assert store(tmp_path / "t", text).identity != first.identity
    text.write_text(content)
    assert store(tmp_path / "s", text).identity == first.identity == store(tmp_path / "t", text).identity
    assert store(tmp_path / "s", text, sequence=8).identity != first.identity


def test_a_corpus_that_changed_without_a_trace_is_found_out(tmp_path, text, small_steps, monkeypatch):
    monkeypatch.setattr("surgery.growth.data.corpus.MAX_HASHED_BYTES", 0)
    store(tmp_path / "s", text).require(1)
    stamp = text.stat().st_mtime_ns
    text.write_text("".join(reversed(text.read_text().splitlines(keepends=True))))
    os.utime(text, ns=(stamp, stamp))
    with pytest.raises(SurgeryError, match="s: document 10 is another than before: the corpus was changed"):
        store(tmp_path / "s", text).require(10**6)


def test_a_corpus_of_less_than_a_window_says_so_each_time(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 15)
    message = f"{tmp_path}/a.txt: holds 16 tokens, fewer than one window of 17"
    found = store(tmp_path / "s", tmp_path / "a.txt")
    for again in (found, found, store(tmp_path / "s", tmp_path / "a.txt")):
        with pytest.raises(SurgeryError, match=re.escape(message)):
            again.require(1)
    (tmp_path / "a.txt").write_text("x" * 16)
    exact = store(tmp_path / "t", tmp_path / "a.txt")
    exact.require(2)
    assert (exact.count, exact.window_at(5), exact.windows([0])[0, -1]) == (1, 0, EOS)


def test_a_tokenizer_that_does_not_fit_the_embedding_is_refused(tmp_path, text):
    with pytest.raises(SurgeryError, match="vocabulary: the end-of-text id is 256, but the embedding has 256 rows"):
        store(tmp_path / "s", text, vocab_size=256)
    wide = bytewise()
    wide.add_tokens(["αβ"])
    with pytest.raises(
        SurgeryError, match=r"vocabulary: the tokenizer gives id 257 \('αβ'\), but the embedding has 257"
    ):
        store(tmp_path / "s", text, tokenizer=wide).require(1)
    with pytest.raises(SurgeryError, match=r"object: is no fast tokenizer. Give one that has a tokenizer.json."):
        store(tmp_path / "s", text, tokenizer=object())


def test_damage_is_said_to_be_so(tmp_path, text, small_steps):
    folder = tmp_path / "s"
    store(folder, text).require(10**6)
    size = (folder / TOKENS).stat().st_size
    os.truncate(folder / TOKENS, size - 1)
    with pytest.raises(
        SurgeryError, match=rf"tokens.bin: holds {size - 1:,} bytes, but tokens.json counts {size // 2:,}"
    ):
        store(folder, text)
    (folder / INDEX).write_text('{"state": {}}')
    with pytest.raises(SurgeryError, match=r"tokens.json: is no index of a token stream"):
        store(folder, text)


SHARED = """
import json, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from surgery.growth.data import token_store
from surgery.runtime.environment import rank
from test_token_store import store

token_store.BATCH_DOCUMENTS, token_store.COMMIT, token_store.ROUND = 10, 500, 700
folder, text = Path(sys.argv[1]), Path(sys.argv[2])
found, seen = store(folder / "s", text), []
for windows in (1, 1, 150, 10**6):
    found.require(windows)
    seen.append([found.tokens, found.count, found.windows([0, found.known - 1]).tolist()])
seen.append(found.identity)
(folder / f"{rank()}.json").write_text(json.dumps(seen))
(folder / "bad.jsonl").write_text('{"text": "fine"}\\nno JSON')
store(folder / "bad", folder / "bad.jsonl").require(1)
"""


@pytest.mark.slow
def test_two_processes_read_what_one_writes_and_end_together(tmp_path, text):
    codes, complaints, _ = fork_ranks(SHARED, tmp_path, text, ROOT, ROOT / "tests", Path(__file__).parent)
    assert codes == [1, 1], complaints
    assert "bad.jsonl:2: is not valid JSON" in complaints[0]
    assert "SurgeryError: process 0 failed:" in complaints[1] and "bad.jsonl:2: is not valid JSON" in complaints[1]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    alone = store(tmp_path / "alone", text)
    alone.require(10**6)
    assert first == second and first[-1] == alone.identity
    assert first[3][:2] == [alone.tokens, alone.count]
    assert first[3][2] == alone.windows([0, alone.known - 1]).tolist()
    assert (tmp_path / "s" / TOKENS).read_bytes() == (tmp_path / "alone" / TOKENS).read_bytes()


def test_tokenising_and_reading_to_where_it_stopped_are_shown(tmp_path, text, small_steps):
    bars: list[list[Any]] = []

    @contextmanager
    def shown(label: str, total: int, unit: str = "bytes"):
        bars.append([label, unit, total, 0])
        bar = bars[-1]

        def advance(amount: int, note: str = "") -> None:
            bar[3] += amount

        yield advance

    found = store(tmp_path / "s", text, progress=shown)
    found.require(1)
    assert bars == [["Tokenising", "tokens", SEQUENCE + 1, found.tokens]]
    again = store(tmp_path / "s", text, progress=shown)
    again.require(100)
    assert bars[1:] == [
        ["Tokenising", "tokens", 100 * SEQUENCE + 1 - found.tokens, again.tokens - found.tokens],
        ["Reading to where it stopped", "steps", 10, 10],
    ]


def test_tokens_are_texts_that_only_their_owner_may_read(tmp_path, text):
    before = os.umask(0)
    try:
        whole(tmp_path / "s", text)
    finally:
        os.umask(before)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "s" / TOKENS, tmp_path / "s" / INDEX)} == {0o600}
