"""Fuzz what a Hub answers: listings, headers, redirects, errors and files, read by `surgery.hub` without a socket.

A seed is a folder with the answers of a Hub: `answers.json` (request → status and headers), and a file per body. The
transport `_Answers` in place of the network answers from it, and notes where a token was sent.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import huggingface_hub
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http
from support.fuzz_mutations import mutate_content, mutate_tree
from support.fuzz_values import to_text
from support.fuzzing import FuzzTarget
from support.hub_uploads import git_hash, sha256

from surgery.hub import datasets as hub_datasets
from surgery.hub.datasets import load_rows, parse_dataset_ref, resolve_commit
from surgery.hub.download import fetch, list_repository
from surgery.hub.errors import http_library

HUB, STORAGE, TOKEN = "https://hub.example", "https://storage.example", "hf_" + "t" * 34
REPO, COMMIT = "lab/tiny", "c" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"model": {}}',
    "model.safetensors": bytes(range(256)),
    "rows.jsonl": b'{"text": "a"}\n',
}
LARGE = "model.safetensors"
ANSWERS, BODIES = "answers.json", ("info.json", "tree.json", "error.json", *FILES)
MAX_REQUESTS = 300  # for two listings and two downloads of four files: more is asking in a circle
_OTHER = "https://other.example/x"
_STATUSES = (200, 204, 206, 301, 302, 303, 304, 307, 308, 400, 401, 403, 404, 409, 416, 429, 451, 500, 503, 599, 999)
_URLS = (
    _OTHER,
    HUB,
    f"{HUB}/{REPO}",
    "/",
    "",
    "//other.example/x",
    "file:///etc/passwd",
    "../../x",
    "http://[::1",
    "x:y",
)
_NUMBERS = ("0", "-1", "1", "256", "257", "9" * 400, str(2**63), "1e3", "٣", " 256 ", "", "0x10", "256, 256")
_HASHES = ("x", "../../x", "a/b", "", '""', "W/", "f" * 300, ".", "..", '"..hidden"', "a\\b", "\u202e", "A" * 40)
_HEADERS: Mapping[str, Sequence[str]] = {
    "Location": _URLS,
    "Link": [f'<{url}>; rel="{kind}"' for url in _URLS for kind in ("next", "xet-auth")] + ["<", "<>;;=", "," * 9_999],
    "X-Xet-Refresh-Route": _URLS,
    "X-Xet-Hash": _HASHES,
    "ETag": _HASHES,
    "X-Linked-ETag": _HASHES,
    "X-Repo-Commit": (*_HASHES, "d" * 40, "main", "c" * 39),
    "X-Linked-Size": _NUMBERS,
    "Content-Length": _NUMBERS,
    "Content-Range": ("bytes 0-1/2", "bytes 9-1/*", "x", "bytes */0"),
    "Content-Encoding": ("gzip", "identity", "br, gzip", "deflate", "x"),
    "Content-Type": ("text/html; charset=utf-7", "application/json; charset=x", "text/plain; charset=utf-16", "\x80"),
    "Retry-After": (*_NUMBERS, "Wed, 21 Oct 2099 07:28:00 GMT"),
    "RateLimit": ('"api";r=0;t=1', '"api";r=0;t=' + "9" * 40, "r=0;t=", ";;;"),
    "X-Error-Code": ("GatedRepo", "RepoNotFound", "RevisionNotFound", "EntryNotFound", "x", ""),
    "X-Error-Message": ("\x1b[2J", "x" * 9_999, TOKEN, "\u202e", "", "Access to model lab/tiny is restricted."),
    "Set-Cookie": ("a=b; Domain=.example", "=", "x" * 9_999),
    "Transfer-Encoding": ("chunked", "x"),
    "Accept-Ranges": ("none", "x"),
}
_NO_TOKEN = re.compile(r"[^!#$%&'*+.^_`|~0-9A-Za-z-]")


def write_answers(folder: Path) -> None:
    """Write the seed: the answers of a Hub that has one model, and one data set of the same files."""
    folder.mkdir(parents=True)
    siblings, tree, answers = [], [], {}
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
        sizes = {"size": len(data)}
        large = {"size": len(data), "pointerSize": 134}
        siblings.append({"rfilename": name, "blobId": git_hash(data), **sizes})
        tree.append({"type": "file", "path": name, "oid": git_hash(data), **sizes})
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{git_hash(data)}"', "Accept-Ranges": "bytes"}
        answer: dict[str, object] = {"status": 200, "headers": {**headers, "Content-Length": str(len(data))}}
        if name == LARGE:
            siblings[-1]["lfs"] = {"sha256": sha256(data), **large}
            tree[-1]["lfs"] = {"oid": sha256(data), **large}
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256(data)}"'}
            answer = {"status": 302, "headers": {**headers, **linked, "Location": f"{STORAGE}/{name}"}}
            answers[f"GET storage {name}"] = {"status": 200, "headers": {"Content-Length": str(len(data))}}
        answers |= {f"{method} {name}": answer for method in ("HEAD", "GET")}
    info = {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings, "tags": ["x"], "private": False}
    (folder / "info.json").write_text(json.dumps({**info, "gated": False, "cardData": {"license": "mit"}}))
    (folder / "tree.json").write_text(json.dumps(tree))
    (folder / "error.json").write_text(json.dumps({"error": "refused", "errors": [{"message": "no"}]}))
    kind = {"status": 200, "headers": {"Content-Type": "application/json"}}
    (folder / ANSWERS).write_text(json.dumps({"GET info.json": kind, "GET tree.json": kind, **answers}))


def mutate_answers(folder: Path, files: Sequence[str], draw: random.Random) -> None:
    """Change one to three times a status, a header or a body."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        name = ANSWERS if draw.random() < 0.5 else draw.choice(files)
        content = (folder / name).read_bytes()
        (folder / name).unlink()  # it is a link to the file of the corpus
        if name == ANSWERS:
            content = _changed_answers(content, draw)
        elif draw.random() < 0.02:
            content = b" " * 20_000_000  # more than any listing or error has
        else:
            content = mutate_content(name, content, draw)
        (folder / name).write_bytes(content)


def _changed_answers(content: bytes, draw: random.Random) -> bytes:
    tree = _parsed(content)
    answer = tree.get(draw.choice(sorted(tree) or ["x"]))
    if draw.random() < 0.2 or not isinstance(answer, dict):
        return to_text(mutate_tree(tree, draw)).encode()
    headers = answer.get("headers")
    if draw.random() < 0.3 or not isinstance(headers, dict):
        answer["status"] = draw.choice(_STATUSES)
    else:
        # Half of the time a header that is there: the others are seldom looked at.
        known = [header for header in headers if header in _HEADERS]
        header = draw.choice(known if known and draw.random() < 0.5 else list(_HEADERS))
        headers[header] = draw.choice(_HEADERS[header])
    return to_text(tree).encode()


def _parsed(content: bytes) -> dict[str, Any]:
    """Return the answers; none where a mutation has left no table of them."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


@dataclass
class _Answers:
    """What answers in place of the network; a transport of httpx."""

    folder: Path = Path()
    answers: Mapping[str, Any] = field(default_factory=dict)
    requests: int = 0
    faults: list[str] = field(default_factory=list)

    def open(self, folder: Path) -> None:
        """Answer from `folder` from now on."""
        self.folder, self.answers = folder, _parsed((folder / ANSWERS).read_bytes())
        self.requests, self.faults = 0, []

    def handle_request(self, request: Any) -> Any:
        """Return the answer to a request, as a server of any manners would give it."""
        self.requests += 1
        url = request.url
        if self.requests > MAX_REQUESTS:
            self.faults.append(f"asks more than {MAX_REQUESTS} times")
            raise http_library().ConnectError("enough")
        if url.host != "hub.example" and any(TOKEN in value for value in (str(url), *request.headers.values())):
            self.faults.append(f"sends the token to {url.host}")
        name = _name_of(url)
        answer = self.answers.get(f"{request.method} {name}")
        if not isinstance(answer, dict):
            answer = {"status": 404, "headers": {}}
        status = answer.get("status")
        # No parser of HTTP lets another one through.
        status = status if isinstance(status, int) and 200 <= status <= 999 else 200
        body = self._body("error.json" if status >= 400 else name.removeprefix("storage "))
        if request.method == "HEAD" or status in (204, 304):
            body = b""
        return http_library().Response(status, headers=list(_headers(answer.get("headers"))), stream=_stream(body))

    def _body(self, name: str) -> bytes:
        path = self.folder / name
        return path.read_bytes() if name in BODIES and path.is_file() else b""

    def __enter__(self) -> _Answers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Do nothing: there is no connection."""


def _name_of(url: Any) -> str:
    if url.host != "hub.example":
        return f"storage {Path(url.path).name}"
    if "/api/" in url.path:
        return "tree.json" if "/tree/" in url.path else "info.json"
    return Path(url.path).name


def _headers(found: object) -> Iterator[tuple[bytes, bytes]]:
    if not isinstance(found, dict):
        return
    for name, value in found.items():
        # What no parser of HTTP lets through: other characters in names, and ends of lines in values.
        if name := _NO_TOKEN.sub("", str(name)):
            text = str(value).encode("utf-8", "surrogatepass")
            yield name.encode(), re.sub(rb"[\r\n\x00]", b"", text).strip()[:65_000]


def _stream(body: bytes) -> Any:
    library = http_library()

    class Body(library.SyncByteStream):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            for at in range(0, len(body), 1 << 16):
                yield body[at : at + (1 << 16)]

    return Body()


_answers = _Answers()


@functools.cache
def _install() -> None:
    """Have huggingface_hub's client ask `_answers`, once in a process."""

    def client() -> Any:
        made = _http.default_client_factory()
        made._transport, made._mounts = _answers, {}  # type: ignore[assignment]
        return made

    huggingface_hub.set_client_factory(client)


class _DatasetsError(Exception):
    """What `datasets` raises."""


class _Rows:
    """A split of one row."""

    def __len__(self) -> int:
        return 1

    def with_format(self, name: str) -> _Rows:
        return self

    def __getitem__(self, rows: slice) -> _Rows:
        return self

    def to_pylist(self) -> list[dict[str, str]]:
        return [{"text": "a"}]


def _datasets_library() -> Any:
    """Return what stands for `datasets`, which is slow to import, and reads the files after us."""

    def builder(repo_id: str, config: str | None, revision: str) -> Any:
        files = {"train": [f"hf://datasets/{repo_id}@{revision}/rows.jsonl"]}
        return SimpleNamespace(
            config=SimpleNamespace(data_files=files),
            download_and_prepare=lambda: None,
            as_dataset=lambda split: _Rows(),
        )

    return SimpleNamespace(
        config=SimpleNamespace(HF_ENDPOINT=HUB),
        exceptions=SimpleNamespace(DatasetsError=_DatasetsError),
        load_dataset_builder=builder,
    )


@contextmanager
def _online(folder: Path, out: Path) -> Iterator[None]:
    """Answer from `folder`, with a cache in `out` and a token."""
    _install()
    _answers.open(folder)
    environment = {"HF_ENDPOINT": HUB, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(out / "hub"), "HF_TOKEN": TOKEN}
    names = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(out / "hub")}
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.multiple(constants, **names),
        # It waits between its tries.
        mock.patch.object(_http, "time", SimpleNamespace(sleep=lambda seconds: None)),
        mock.patch.object(file_download, "time", SimpleNamespace(sleep=lambda seconds: None)),
        mock.patch.object(hub_datasets, "_import_datasets", lambda dataset: _datasets_library()),
    ):
        yield
    assert not _answers.faults, _answers.faults[:3]


def _model(folder: Path, out: Path) -> None:
    with _online(folder, out):
        list_repository(REPO)
        found = fetch(REPO, progress=False)
        assert found.folder.is_relative_to(out / "hub"), f"the model is in {found.folder}"


def _dataset(folder: Path, out: Path) -> None:
    dataset = parse_dataset_ref(f"{REPO}:train")
    assert dataset is not None
    with _online(folder, out):
        commit = resolve_commit(dataset)
        load_rows(dataset, commit)


HUB_TARGETS = (
    FuzzTarget("hub model", ("hub",), BODIES, _model, weight=2, mutate=mutate_answers),
    FuzzTarget("hub dataset", ("hub",), ("info.json", "rows.jsonl", "error.json"), _dataset, mutate=mutate_answers),
)
