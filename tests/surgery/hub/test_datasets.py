"""Promises of surgery.hub.datasets: what counts as a reference, and all that is read is of one commit."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path

import pytest
from support.hub_server import HubServer

from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.hub.dataset_files import DatasetCommit, own_files
from surgery.hub.datasets import HubDataset, load_rows, parse_dataset_ref, resolve_commit, stream_column

ROWS = 2500  # more than two batches of the stream


def dataset(ref: str) -> HubDataset:
    parsed = parse_dataset_ref(ref)
    assert parsed is not None
    return parsed


def streamed(ref: str, column: str = "text") -> list[tuple[int, str]]:
    return list(stream_column(dataset(ref), resolve_commit(dataset(ref)), column))


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts))


@pytest.fixture
def hub(data_server: HubServer, tmp_path: Path) -> HubServer:
    folder = tmp_path / "lab-data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(rows(*(f"t{n}" for n in range(ROWS))))
    (folder / "test.jsonl").write_text(rows("only"))
    (folder / "README.md").write_text("# data\n")
    data_server.add("datasets/lab/data", folder)
    return data_server


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("org/name:train", HubDataset("org/name:train", "org/name", None, None, "train")),
        ("org/name/big@v1:test[2:5]", HubDataset("org/name/big@v1:test[2:5]", "org/name", "big", "v1", "test", 2, 5)),
        ("o/n@refs/pr/1:s[:7]", HubDataset("o/n@refs/pr/1:s[:7]", "o/n", None, "refs/pr/1", "s", 0, 7)),
        ("o/n:s[3:]", HubDataset("o/n:s[3:]", "o/n", None, None, "s", 3)),
        ("org/name", None),
        ("org/name:train[-5:]", None),
        ("org/name:train[:10%]", None),
        ("name:train", None),
        ("org/na..me:train", None),
        ("a/b/c/d:train", None),
        ("", None),
    ],
)
def test_a_reference_has_one_shape(ref, expected):
    assert parse_dataset_ref(ref) == expected


def test_errors_point_at_rows_by_the_reference_without_its_slice():
    assert dataset("org/name@v1:train[2:5]").name == "org/name@v1:train"


def test_a_stream_gives_the_rows_that_loading_gives_with_their_numbers(hub):
    every = dataset("lab/data:train")
    loaded = [row["text"] for row in load_rows(every, resolve_commit(every))]
    assert loaded == [f"t{n}" for n in range(ROWS)]
    assert streamed("lab/data:train") == list(enumerate(loaded))
    assert streamed("lab/data:train[998:2003]") == list(enumerate(loaded))[998:2003]
    assert streamed("lab/data:train[2400:9999]") == list(enumerate(loaded))[2400:]
    assert [number for _, number in streamed("lab/data:train[5:7]", "n")] == [5, 6]


def test_a_stream_is_lazy(hub):
    stream = stream_column(dataset("lab/data:train"), resolve_commit(dataset("lab/data:train")), "text")
    assert not hub.asked(".jsonl")
    assert next(stream) == (0, "t0")


def test_all_is_of_the_commit_that_was_pinned(hub, tmp_path):
    first = resolve_commit(dataset("lab/data:train"))
    assert first == hub.repos["datasets/lab/data"].revisions["main"]
    (tmp_path / "lab-data" / "train.jsonl").write_text(rows("new"))
    hub.add("datasets/lab/data", tmp_path / "lab-data")
    assert len(list(stream_column(dataset("lab/data:train"), first, "text"))) == ROWS
    fetched = [request.path for request in hub.asked(".jsonl", method="GET")]
    assert fetched and all(f"/resolve/{first}/" in path for path in fetched)
    assert streamed("lab/data:train") == [(0, "new")]
    assert [row["text"] for row in load_rows(dataset("lab/data:train"), first, limit=2)] == ["t0", "t1"]


def test_a_commit_is_not_looked_up(hub):
    assert resolve_commit(dataset(f"lab/data@{'a' * 40}:train")) == "a" * 40
    assert not hub.requests


@pytest.mark.parametrize(
    ("ref", "column", "message"),
    [
        ("lab/data:valid", "text", "lab/data:valid: cannot be loaded ("),
        ("lab/data/big:train", "text", "lab/data/big:train: cannot be loaded (BuilderConfig 'big' not found."),
        ("lab/data:train", "prompt", 'lab/data:train: has no column "prompt". It has text, n.'),
        ("lab/data:test[1:]", "text", "lab/data:test[1:]: the split has no row 1"),
        ("lab/data:test[3:3]", "text", "lab/data:test[3:3]: the slice is empty"),
        ("lab/other:train", "text", "lab/other:train: no such data set on the Hub, or it is private"),
        ("lab/data@v9:train", "text", "lab/data@v9:train: has no revision 'v9'"),
    ],
)
def test_what_the_hub_lacks_is_named(hub, ref, column, message):
    with pytest.raises(SurgeryError, match=re.escape(message)) as caught:
        streamed(ref, column)
    assert caught.value.exit_code == WRONG_USAGE and "\n" not in str(caught.value)


def test_a_hub_that_fails_is_not_quoted(hub):
    hub.fail("/api/datasets/lab/data", 403, times=9, body=b"secret")
    with pytest.raises(SurgeryError, match=re.escape("cannot be asked for its commit (HTTP 403)")) as caught:
        resolve_commit(dataset("lab/data:train"))
    assert "secret" not in str(caught.value)


def test_a_stream_that_breaks_off_says_where(hub, tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    for part in range(2):
        (folder / f"train-{part:05}-of-00002.jsonl").write_text(rows(*(f"{part} {n}" for n in range(1500))))
    hub.add("datasets/lab/parts", folder)
    stream = stream_column(dataset("lab/parts:train"), resolve_commit(dataset("lab/parts:train")), "text")
    assert next(stream) == (0, "0 0")
    hub.fail("train-00001", 403, times=99, body=b"secret")
    with pytest.raises(SurgeryError) as caught:
        list(stream)
    assert str(caught.value) == (
        "lab/parts:train: the stream broke off after 1,000 rows (HTTP 403). Run the same command again."
    )


def test_a_hub_that_fails_when_a_stream_is_opened_is_not_quoted(hub):
    commit = resolve_commit(dataset("lab/data:train"))
    hub.fail("train.jsonl", 403, times=99, body=b"secret")
    with pytest.raises(SurgeryError, match=re.escape("lab/data:train: cannot be loaded (HTTP 403)")):
        list(stream_column(dataset("lab/data:train"), commit, "text"))


def test_without_the_extra_its_name_is_told(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SurgeryError) as caught:
        resolve_commit(dataset("org/name:train"))
    assert str(caught.value) == "org/name:train: needs the extra `data`. Install it: pip install 'model-surgery[data]'"


def card(path: str) -> str:
    return f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: '{path}'\n---\n"


@pytest.mark.parametrize("read", [streamed, lambda ref: load_rows(dataset(ref), resolve_commit(dataset(ref)))])
def test_files_of_this_machine_are_no_data_of_a_strangers_set(hub, tmp_path, read):
    secret = tmp_path / "private.jsonl"
    secret.write_text(rows("secret"))
    (tmp_path / "lab-data" / "README.md").write_text(card(str(secret)))
    hub.add("datasets/lab/data", tmp_path / "lab-data")
    # By us, or by a `datasets` that does it too.
    with pytest.raises(SurgeryError, match=r"is made of a file outside of its repository|Data files don't belong to"):
        read("lab/data:train")


@pytest.mark.parametrize(
    "place",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "https://evil.test/x.jsonl",
        "hf://datasets/other/data@{commit}/x.jsonl",
        "hf://datasets/lab/data@{other}/x.jsonl",
        "hf://datasets/lab/data@{commit}/../x.jsonl",
        "hf://datasets/lab/data@{commit}/%2e%2e/x.jsonl",
        "zip://x.jsonl::/home/x.zip",
    ],
)
def test_only_files_of_its_own_repository_and_commit_are_read(place):
    data = DatasetCommit("lab/data:train", "lab/data", "a" * 40)
    own = f"hf://datasets/lab/data@{'a' * 40}/"
    assert own_files(data, {"train": [f"{own}x.jsonl", f"zip://a.txt::{own}b.zip"]}) == ["x.jsonl", "b.zip"]
    with pytest.raises(SurgeryError):
        own_files(data, {"train": [f"{own}x.jsonl"], "test": [place.format(commit="a" * 40, other="b" * 40)]})


def test_rows_with_other_bytes_than_listed_are_refused_and_fetched_anew(hub):
    commit = resolve_commit(dataset("lab/data:test"))
    real = hub.repos["datasets/lab/data"].commits[commit]["test.jsonl"]
    hub.fail("/test.jsonl", 200, body=real.replace(b"only", b"evil"))
    with pytest.raises(SurgeryError, match=r"the cache holds other bytes than the Hub lists: test.jsonl has git SHA-1"):
        load_rows(dataset("lab/data:test"), commit)
    assert [row["text"] for row in load_rows(dataset("lab/data:test"), commit)] == ["only"]


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"id": 5}', b"<html>", b'{"id": "x", "sha": "../x", "siblings": []}'])
def test_an_answer_that_is_no_data_set_is_one_line(hub, body):
    hub.fail("/api/datasets", 200, body=body, times=9)
    with pytest.raises(SurgeryError) as caught:
        resolve_commit(dataset("lab/data:test"))
    assert str(caught.value).startswith("lab/data:test: ") and "\n" not in str(caught.value)
