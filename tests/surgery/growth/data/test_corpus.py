"""Promises of growth.data.corpus: every kind of reference gives its documents, and what is wrong gets one line."""

from __future__ import annotations

import builtins
import json
import os
import re
import shutil
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hub_server import HubServer

from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.growth.data import corpus
from surgery.growth.data.corpus import Document, commits_of, documents, fingerprint, open_corpus, shuffle
from surgery.lab import builder as family


def texts(*refs: str | Path, field: str = "text") -> list[str]:
    return [document.text for document in documents([str(ref) for ref in refs], field=field)]


def failure(*refs: str | Path, field: str = "text") -> str:
    with pytest.raises(SurgeryError) as caught:
        texts(*refs, field=field)
    assert caught.value.exit_code == WRONG_USAGE and "\n" not in str(caught.value)
    return str(caught.value)


def jsonl(path: Path, *found: str | None, field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in found), encoding="utf-8")
    return path


def parquet(path: Path, *found: str | None, field: str = "text") -> Path:
    pytest.importorskip("pyarrow")
    from pyarrow import Table
    from pyarrow.parquet import write_table

    write_table(Table.from_pydict({"n": list(range(len(found))), field: list(found)}), path, row_group_size=2)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with files of all kinds, some of which are not to be read."""
    folder = tmp_path / "tree"
    for name in ("b/deep", ".git", "b/.cache"):
        (folder / name).mkdir(parents=True)
    for name in ("a.txt", "b/c.py", "b/deep/d.md", ".git/no.txt", "b/.cache/no.txt", ".hidden.txt"):
        (folder / name).write_text(name)
    (folder / "b" / "image.png").write_bytes(b"\x89PNG\0\0\xff")
    (folder / "b" / "blank.txt").write_text(" \n")
    jsonl(folder / "e.jsonl", "e0", "e1")
    return folder


def test_a_file_is_one_document_whatever_its_kind(tmp_path):
    (tmp_path / "a.py").write_bytes("\ufeffdef ä():\r\n    pass\u2028\n".encode())
    found = list(documents([str(tmp_path / "a.py")]))
    assert found == [Document(str(tmp_path / "a.py"), "def ä():\n    pass\u2028\n")]


def test_rows_are_documents_and_blank_ones_are_passed_over(tmp_path):
    lines = jsonl(tmp_path / "a.jsonl", "one\u2028more", "  ", None, "two")
    table = parquet(tmp_path / "a.parquet", "one", None, "", "two", "three")
    assert [(d.where, d.text) for d in documents([str(lines), str(table)])] == [
        (f"{lines}:1", "one\u2028more"),
        (f"{lines}:4", "two"),
        (f"{table}[0]", "one"),
        (f"{table}[3]", "two"),
        (f"{table}[4]", "three"),
    ]


def test_the_column_can_be_named(tmp_path):
    refs = jsonl(tmp_path / "a.jsonl", "x", field="content"), parquet(tmp_path / "a.parquet", "y", field="content")
    assert texts(*refs, field="content") == ["x", "y"]


def test_a_folder_is_read_by_path_without_hidden_and_binary_files(tree):
    assert texts(tree) == ["a.txt", "b/c.py", "b/deep/d.md", "e0", "e1"]


def test_a_glob_gives_the_files_it_matches(tree, monkeypatch):
    assert texts(tree / "**/*.txt") == ["a.txt"]
    assert texts(tree / "b/*") == ["b/c.py"]
    monkeypatch.chdir(tree)
    assert texts("**/*.[mp]*") == ["b/c.py", "b/deep/d.md"]
    monkeypatch.setenv("HOME", str(tree))
    assert texts("~/?.txt") == texts("~/a.txt") == ["a.txt"]


def test_a_glob_reads_a_file_once_however_links_lead_to_it(tree):
    (tree / "b" / "circle").symlink_to(tree)
    (tree / "b" / "linked.md").symlink_to(tree / "b/deep/d.md")
    assert texts(tree / "**/*.[mp]*") == ["b/c.py", "b/deep/d.md", "b/deep/d.md"]
    found = [document.where for document in documents([str(tree / "**/*.md")])]
    assert found == [str(tree / "b/deep/d.md"), str(tree / "b/linked.md")]


def test_a_blank_first_line_may_follow_a_mark_of_byte_order(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf\r\n{"text": "x"}\n')
    assert texts(tmp_path / "a.jsonl") == ["x"]


def test_the_lab_has_text_of_its_own(tmp_path, monkeypatch):
    asked = []

    def data_path(name: str, kind: str) -> Path:
        asked.append((name, kind))
        return tmp_path / "lab.jsonl"

    jsonl(tmp_path / "lab.jsonl", "import this")
    monkeypatch.setattr(family, "data_path", data_path)
    assert texts("lab:python/code", "lab:python/docs-held") == ["import this"] * 2
    assert asked == [("python", "code"), ("python", "docs-held")]


def test_references_come_one_after_the_other_and_only_as_far_as_they_are_asked_for(tmp_path):
    first = jsonl(tmp_path / "a.jsonl", "1", "2")
    (tmp_path / "b.jsonl").write_text('{"text": "3"}\nno JSON\n')
    found = documents([str(first), str(tmp_path / "b.jsonl")])
    assert [document.text for document in islice(found, 3)] == ["1", "2", "3"]
    with pytest.raises(SurgeryError, match=re.escape("b.jsonl:2: is not valid JSON")):
        next(found)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\t", "a.txt: holds no text"),
        ("a.txt", b"", "a.txt: holds no text"),
        ("a.txt", b"caf\xe9", "a.txt: is not UTF-8 (byte 3). Convert it first, or leave it out."),
        ("a.bin", b"a\0b", "a.bin: holds zero bytes, so it is no text"),
        ("a.jsonl", b"\n\n", "a.jsonl: holds no text"),
        ("a.jsonl", b'{"text": null}', "a.jsonl: holds no text"),
        ("a.jsonl", b'\n{"txt": "a"}', 'a.jsonl:2: has no "text". Every line is an object with its text in "text".'),
        ("a.jsonl", b'["text"]', 'a.jsonl:1: has no "text"'),
        ("a.jsonl", b'{"text": [1, 2]}', 'a.jsonl:1: "text" is [1, 2], expected text'),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}', 'a.jsonl:2: "text" holds half of a surrogate pair'),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "a.jsonl:2: is not UTF-8 (byte 10)"),
        ("a.jsonl", b'{"text": "a"', "a.jsonl:1: is not valid JSON ("),
        ("a.parquet", b"PAR1 no", "a.parquet: cannot be read as Parquet ("),
    ],
)
def test_a_file_that_is_no_text_gets_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in failure(tmp_path / name)


def test_a_table_without_the_column_gets_one_line(tmp_path):
    table = parquet(tmp_path / "a.parquet", "x", field="content")
    assert failure(table) == f'{table}: has no column "text". It has n, content.'
    assert failure(table, field="n") == f'{table}[0]: "n" is 0, expected text'


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("nowhere.txt", "nowhere.txt: no such file or folder, and not a glob, a Hub data set (org/name["),
        ("", '"": no such file or folder'),
        ("org/name", "org/name: names no split. Give it as org/name[/config][@revision]:split[a:b], e.g."),
        ("lab:nobody/code", "no lab model is called 'nobody'."),
        ("lab:python", "lab:python: the lab has no data called 'examples'. There is code, docs, code-held, docs-held."),
    ],
)
def test_a_reference_that_leads_nowhere_gets_one_line(ref, message):
    assert message in failure(ref)


def test_a_folder_or_glob_without_text_says_where_it_looked(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\0")
    assert failure(tmp_path) == f"{tmp_path}: holds no text: none of its 1 files is text, JSONL or Parquet"
    assert failure(tmp_path / "*.png") == f"{tmp_path}/*.png: holds no text: the 1 files that it matches are all binary"
    assert failure(tmp_path / "b/*.md") == f"{tmp_path}/b/*.md: matches no file. Looked in {tmp_path}/b."
    assert failure("org/name:train[:10%]").endswith(
        "A Hub data set is given as org/name[/config][@revision]:split[a:b]."
    )


def test_a_reference_without_text_is_not_passed_over(tmp_path):
    full, blank = jsonl(tmp_path / "a.jsonl", "x"), jsonl(tmp_path / "b.jsonl", " ")
    assert failure(full, blank) == f"{blank}: holds no text"
    with pytest.raises(SurgeryError, match="corpus: no text was given"):
        documents([])


def test_what_leads_nowhere_is_said_before_anything_is_read(tmp_path):
    with pytest.raises(SurgeryError, match="no such file"):
        documents([str(jsonl(tmp_path / "a.jsonl", "x")), "nowhere"])


def test_without_the_extra_its_name_is_told(tmp_path, monkeypatch):
    table = parquet(tmp_path / "a.parquet", "x")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] in ("datasets", "pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for ref in (str(table), "org/name:train"):
        assert failure(ref) == f"{ref}: needs the extra `data`. Install it: pip install 'model-surgery[data]'"


@pytest.fixture
def hub(data_server: HubServer, tmp_path: Path) -> HubServer:
    (tmp_path / "served").mkdir()
    jsonl(tmp_path / "served" / "train.jsonl", "one", " ", None, "two", "three")
    data_server.add("datasets/lab/text", tmp_path / "served")
    return data_server


def test_a_hub_data_set_is_streamed_at_one_commit(hub, tmp_path):
    found = [(document.where, document.text) for document in documents(["lab/text:train[1:4]"])]
    assert found == [("lab/text:train[3]", "two")]
    first = fingerprint(["lab/text:train"])
    commit = hub.repos["datasets/lab/text"].revisions["main"]
    assert commits_of(first) == {"lab/text:train": commit}
    jsonl(tmp_path / "served" / "train.jsonl", "new")
    hub.add("datasets/lab/text", tmp_path / "served")
    assert fingerprint(["lab/text:train"]) != first
    old = open_corpus(["lab/text:train"], commits=commits_of(first))
    assert old.fingerprint() == first and [d.text for d in old.documents()] == ["one", "two", "three"]
    assert texts("lab/text:train") == ["new"]
    assert "lab/text:train[1:]: the split has no row 1" in failure("lab/text:train[1:]")


def many(count: int, length: int = 3) -> list[Document]:
    return [Document(str(n), f"{n:0{length}}") for n in range(count)]


def test_a_small_corpus_is_shuffled_wholly_and_by_its_seed_alone():
    every = many(500)
    orders = [list(shuffle(iter(every), seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0], key=lambda d: d.text) == every
    # Documents come from everywhere: the mean place of the first hundred is the middle, give or take five deviations.
    mean = sum(int(document.text) for document in orders[0][:100]) / 100
    assert abs(mean - 249.5) < 5 * 500 / 12**0.5 / 10


def test_the_same_seed_gives_the_same_order_for_ever():
    # Runs that are continued by a later version rely on it.
    assert [document.text for document in shuffle(many(8), seed=3)] == [
        "001",
        "003",
        "002",
        "006",
        "005",
        "000",
        "004",
        "007",
    ]


def test_a_large_corpus_is_shuffled_in_bounded_memory():
    taken = 0

    def counted():
        nonlocal taken
        for document in many(1000):
            taken += 1
            yield document

    first = list(islice(shuffle(counted(), seed=0, buffer_documents=50), 10))
    assert taken == 60 and all(int(document.text) < 60 for document in first)
    taken = 0
    assert len(list(islice(shuffle(counted(), seed=0, buffer_characters=300), 5))) == 5 and taken == 105


@given(st.lists(st.text(max_size=9)), st.integers(0, 5), st.integers(1, 30), st.integers())
def test_shuffling_loses_and_repeats_nothing(found, documents_held, characters_held, seed):
    every = [Document(str(n), text) for n, text in enumerate(found)]
    order = shuffle(every, seed=seed, buffer_documents=documents_held, buffer_characters=characters_held)
    assert sorted(order, key=lambda d: int(d.where)) == every


def test_a_fingerprint_knows_contents_and_not_places(tree, tmp_path):
    first = fingerprint([str(tree)])
    assert json.loads(json.dumps(first)) == first
    shutil.copytree(tree, tmp_path / "moved")
    os.utime(tmp_path / "moved" / "a.txt", (0, 0))
    assert fingerprint([str(tmp_path / "moved")]) == first != fingerprint([str(tree)], field="content")
    (tmp_path / "moved" / "a.txt").write_text("A.txt")
    assert fingerprint([str(tmp_path / "moved")]) != first
    one = fingerprint([str(tree / "a.txt"), str(tree / "e.jsonl")])
    assert one != fingerprint([str(tree / "e.jsonl"), str(tree / "a.txt")])
    assert fingerprint([str(tree / "*.txt")])["refs"] == fingerprint([str(tree / "a.txt")])["refs"]


def test_a_fingerprint_of_much_text_knows_sizes_and_times(tree, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_HASHED_BYTES", 3)
    first = fingerprint([str(tree)])
    assert fingerprint([str(tree)]) == first
    os.utime(tree / "a.txt", (0, 0))
    assert fingerprint([str(tree)]) != first


def test_a_link_that_leads_out_of_a_corpus_is_not_learnt(tree, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (tree / "notes.txt").symlink_to(tmp_path / "secret")
    for ref in (tree, tree / "*.txt"):
        with pytest.raises(SurgeryError, match=r"notes\.txt: is a link that leads out of its folder, to .*secret"):
            list(documents([str(ref)]))


def test_a_pipe_in_a_corpus_is_called_one(tree):
    os.mkfifo(tree / "pipe.txt")
    for ref in (tree, tree / "*.txt", tree / "pipe.txt"):
        with pytest.raises(SurgeryError, match=r"pipe\.txt: is a pipe, expected a file"):
            list(documents([str(ref)]))
