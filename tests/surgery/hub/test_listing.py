"""Promises of surgery.hub.listing: a listing that no repository can have is refused, with the true reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.hub_models import FETCHED, REPO, content, failure, folder_of
from support.hub_server import HubServer

from surgery.hub import download as hub
from surgery.hub.errors import RefusedAnswerError
from surgery.hub.listing import check_listing

COMMIT = "a" * 40
OUTSIDE = "lists a file outside of the repository: "
INFO, TREE = "/api/models/lab/tiny", "/api/models/lab/tiny/tree/main"


def info(*siblings: object, **fields: object) -> dict[str, object]:
    return {"id": REPO, "sha": COMMIT, "siblings": list(siblings), "tags": [], "private": False, **fields}


def file(name: object = "model.safetensors", **fields: object) -> dict[str, object]:
    return {"rfilename": name, "size": 2, "blobId": "b" * 40, **fields}


HOSTILE: list[tuple[Any, str]] = [
    (info(file("../../.bashrc")), f"{OUTSIDE}'../../.bashrc'"),
    (info(file("/etc/x.json")), f"{OUTSIDE}'/etc/x.json'"),
    (info(file("a/../../x.json")), OUTSIDE),
    (info(file("a//x.json")), OUTSIDE),
    (info(file("./x.json")), OUTSIDE),
    (info(file("..\\..\\x.json")), OUTSIDE),
    (info(file("C:\\x.json")), OUTSIDE),
    (info(file(), file("sub/..")), OUTSIDE),
    (info(file("a\x1b[2J.json")), "lists a file whose name is not printable: 'a\\x1b[2J.json'"),
    (info(file("a\n.json")), "lists a file whose name is not printable"),
    (info(file("a\u202ejson.json")), "lists a file whose name is not printable"),
    (info(file("a\x00.json")), "lists a file whose name is not printable"),
    (info(file("\ud800.json")), "lists a file whose name is not printable"),
    (info(file(".hidden.safetensors")), "'.hidden.safetensors' is hidden"),
    (info(file("a\\b.safetensors")), "leads to another folder"),
    (info(file("x" * 300 + ".safetensors")), "is longer than 255 bytes"),
    (info(file(), file()), "has the file 'model.safetensors' twice"),
    (info(file(5)), "has 5 for a file's name"),
    (info(file(None)), "has None for a file's name"),
    (info(file("")), "for a file's name"),
    (info(file(["x"])), "has list for a file's name"),
    (info("model.safetensors"), "has 'model.safetensors' for a file"),
    (info(file(), None), "has None for a file"),
    (info(size=1) | {"siblings": {"a": 1}}, "is no list of files"),
    (info() | {"siblings": "model.safetensors"}, "is no list of files"),
    (info(file(size=-1)), "gives -1 as the size of 'model.safetensors'"),
    (info(file(size=1 << 63)), "as the size of"),
    (info(file(size=10**400)), "gives a huge number as the size of"),
    (info(file(size=1e309)), "gives inf as the size of"),
    (info(file(size=2.5)), "gives 2.5 as the size of"),
    (info(file(size="2")), "gives '2' as the size of"),
    (info(file(size=True)), "as the size of"),
    (info(file(blobId="../../x")), "gives '../../x' as the hash of"),
    (info(file(blobId=7)), "gives 7 as the hash of"),
    (info(file(lfs={"sha256": "x" * 64, "size": 2, "pointerSize": 3})), "as the hash of"),
    (info(file(lfs={"sha256": None, "size": -2, "pointerSize": 3})), "as the size of"),
    (info(file(lfs="x")), "for the storage of 'model.safetensors'"),
    (info(file(), sha="../../../x"), "names '../../../x' as its commit"),
    (info(file(), sha=None), "names None as its commit"),
    (info(file(), sha=5), "names 5 as its commit"),
    (info(file(), sha="main"), "names 'main' as its commit"),
]
MALFORMED: list[Any] = [
    [],
    None,
    "text",
    5,
    {"id": REPO},
    {"id": REPO, "sha": COMMIT},
    info() | {"siblings": None},
    info(file(), safetensors=5),
    info(file(), cardData=[1]),
    info(file(lfs={"size": 2})),
    info(file(), createdAt="never"),
    info(file(), createdAt=10**30),
    info(file(), private="what", tags={"a": 1}),
]


@pytest.mark.parametrize(
    ("listing", "reason"), HOSTILE, ids=[f"{number}-{reason[:30]}" for number, (_, reason) in enumerate(HOSTILE)]
)
def test_a_hostile_listing_is_refused_with_its_reason(
    server: HubServer, cache: Path, tmp_path: Path, listing: Any, reason: str
) -> None:
    server.fail("/api/models", 200, body=json.dumps(listing).encode(), times=9)
    message = failure()
    assert message.startswith("lab/tiny: ") and reason in message
    assert "cannot reach" not in message and message.isprintable()
    assert not server.asked("/resolve/")
    assert [path.name for path in tmp_path.iterdir() if path != cache] == []


@pytest.mark.parametrize("listing", MALFORMED, ids=lambda listing: str(listing)[:40])
def test_a_listing_of_another_form_is_one_line(server: HubServer, listing: Any) -> None:
    server.fail("/api/models", 200, body=json.dumps(listing).encode(), times=9)
    message = failure()
    assert message.startswith("lab/tiny: ") and message.isprintable()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "(the answer is not a Hub's)"),
        (b"<html>", "(the answer is not a Hub's)"),
        (b"\xff\xfe\x00", "(the answer is not a Hub's)"),
        (b"[" * 200_000 + b"]" * 200_000, "the Hub's answer is nested too deeply"),
        (b'{"siblings": [' + b"0," * 7_000_000 + b"0]}", "the Hub's answer has about 7,000,003 values, more than"),
        (b"1" * 5000, "(the answer is not a Hub's)"),
    ],
    ids=["empty", "html", "binary", "deep", "long", "digits"],
)
def test_an_answer_that_is_no_listing(server: HubServer, body: bytes, reason: str) -> None:
    server.fail("/api/models", 200, body=body, times=9)
    assert reason in failure()


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"path": "../x.json"}, OUTSIDE),
        ({"lfs": {"oid": "../../../x", "size": 2}}, "as the hash of"),
        ({"oid": "/etc/x"}, "as the hash of"),
        ({"size": -2}, "as the size of"),
    ],
    ids=str,
)
def test_the_listing_by_folders_is_checked_too(server: HubServer, model: Path, entry: Any, reason: str) -> None:
    server.add(REPO, model)
    real = {"type": "file", "path": "config.json", "size": 2, "oid": "b" * 40}
    server.fail("/tree/", 200, body=json.dumps([real | entry]).encode(), times=9)
    assert reason in failure()


def test_a_commit_that_was_asked_for_is_the_one_that_is_answered(server: HubServer, model: Path) -> None:
    server.add(REPO, model)
    server.fail("/api/models", 200, body=json.dumps(info(file(), sha="b" * 40)).encode(), times=9)
    assert f"names '{'b' * 40}' as its commit, expected {COMMIT}" in failure(REPO, COMMIT)


def test_hidden_and_odd_files_that_are_not_fetched_are_no_reason_to_refuse(server: HubServer, tmp_path: Path) -> None:
    files = {"model.safetensors": b"weights", "config.json": b"{}"}
    odd = {".gitattributes": b"x", ".github/workflows/ci.yml": b"x", "Read me.md": b"x", "ünï.png": b"x"}
    server.add(REPO, folder_of(tmp_path / "model", files | odd))
    assert content(hub.fetch(REPO, progress=False).folder) == files


def test_pickles_and_code_are_never_asked_for(server: HubServer, model: Path) -> None:
    server.add(REPO, model)
    assert content(hub.fetch(REPO, progress=False).folder) == FETCHED
    endings = (".bin", ".pt", ".pth", ".pkl", ".py", ".gguf")
    assert not [each.path for each in server.asked("/resolve/") if each.path.endswith(endings)]


def test_other_answers_than_listings_pass() -> None:
    check_listing(b'{"name": "../x"}', "/api/whoami-v2")
    check_listing(b"no JSON", INFO)
    with pytest.raises(RefusedAnswerError, match="is no list of files"):
        check_listing(b"{}", TREE)
