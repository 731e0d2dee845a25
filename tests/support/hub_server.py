"""A Hub on 127.0.0.1 for the real `huggingface_hub` client: the part of the protocol our tests need.

    GET  /api/models/ORG/NAME[/revision/REV]     what the repository is, its commit and its files
    GET  /api/models/ORG/NAME/tree/REV           the files with sizes and hashes
    HEAD /ORG/NAME/resolve/REV/PATH              commit and hash; safetensors redirect to /blobs/SHA256
    GET  /ORG/NAME/resolve/REV/PATH, /blobs/…    the bytes, from `Range` on

    What it takes for pushing is in `hub_writing`.

Data sets are the repositories added as datasets/ORG/NAME; their paths begin with /api/datasets and /datasets.
Repositories are read from folders when they are added. `requests` logs what was asked; `fail` and `cut`
make the next matching requests go wrong.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub_uploads import LARGE, Files, Writing, git_hash, sha1, sha256

DATASETS = "datasets"


@dataclass(frozen=True)
class Request:
    """One request as it arrived; `path` is unquoted, without its query; header names are lower case."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class Repo:
    private: bool
    gated: bool
    revisions: dict[str, str] = field(default_factory=dict)  # branch or tag → commit
    commits: dict[str, Files] = field(default_factory=dict)


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose method and path match."""

    match: str
    times: int
    method: str = "GET"
    status: int | None = None
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes sent, or taken of an upload, before the connection is closed
    reached: threading.Event | None = None  # set when the request is there, which then is never answered
    then: Callable[[], object] | None = None  # called before the request is answered as usual
    mute: bool = False  # what was asked is done, and the connection closed without an answer


class HubServer:
    """`with HubServer() as hub:` serves until the block ends. `token` is the only one it accepts."""

    def __init__(self, *, token: str = "hf_accepted") -> None:
        self.token = token
        self.requests: list[Request] = []
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.bodies: dict[str, bytes] = {}  # path → what was last sent there
        # Whom the token may write as, what else it may do, and what the Hub says of cards it is asked about.
        self.namespaces = {"lab"}
        self.role = "write"
        self.writes_attributes = True  # .gitattributes, into a new repository
        self.card_says: dict[str, list[dict[str, str]]] = {}
        self.closed = threading.Event()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def blob_host(self) -> str:
        """As on the Hub, large files lie on a host of another name, where the token must not be sent."""
        return f"http://localhost:{self._server.server_port}"

    def add(
        self,
        repo_id: str,
        folder: Path,
        *,
        private: bool = False,
        gated: bool = False,
        commits: Mapping[str, Path] | None = None,
    ) -> str:
        """Serves `folder` as branch main of `repo_id`, and each of `commits` (branch or tag → folder).

        Adding a repository again moves its branches; earlier commits stay. A private one is for bearers of
        the token; a gated one lists its files and gives them to nobody. Returns main's commit (40 hex).
        """
        repo = self.repos.setdefault(repo_id, Repo(private, gated))
        repo.private, repo.gated = private, gated
        for revision, source in {"main": folder, **(commits or {})}.items():
            self.commit(repo_id, revision, _read(source))
        return repo.revisions["main"]

    def commit(self, repo_id: str, revision: str, files: Files) -> str:
        """Makes `files` the newest commit of a branch. Returns its hash."""
        text = json.dumps([repo_id, {name: sha256(data) for name, data in sorted(files.items())}])
        commit = sha1(text.encode())
        self.repos[repo_id].commits[commit] = files
        self.repos[repo_id].revisions[revision] = commit
        self.blobs |= {sha256(data): data for name, data in files.items() if name.endswith(LARGE)}
        return commit

    def fail(
        self,
        match: str,
        status: int,
        *,
        times: int = 1,
        method: str = "GET",
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answers the next `times` requests whose path contains `match` with `status`."""
        self._faults.append(Fault(match, times, method, status, body, headers or {}))

    def cut(self, match: str, after: int, *, times: int = 1, method: str = "GET") -> None:
        """Closes the connection of the next `times` requests that match, after `after` bytes of the larger part."""
        self._faults.append(Fault(match, times, method, cut_after=after))

    def stall(self, match: str, *, method: str = "PUT") -> threading.Event:
        """Never answers the next request that matches. Returns what is set when it is there."""
        reached = threading.Event()
        self._faults.append(Fault(match, 1, method, reached=reached))
        return reached

    def lose_answer(self, match: str, *, method: str = "POST") -> None:
        """Does what the next request that matches asks for, and closes the connection without an answer."""
        self._faults.append(Fault(match, 1, method, mute=True))

    def before(self, match: str, call: Callable[[], object], *, method: str = "POST", times: int = 1) -> None:
        """Calls `call` before the next `times` requests that match are answered."""
        self._faults.append(Fault(match, times, method, then=call))

    def asked(self, text: str = "", *, method: str | None = None) -> list[Request]:
        """The requests so far whose path contains `text`."""
        return [each for each in self.requests if text in each.path and method in (None, each.method)]

    def take_fault(self, request: Request) -> Fault | None:
        """The fault due for `request`, counted down."""
        with self._lock:
            self.requests.append(request)
            for fault in self._faults:
                if fault.times > 0 and fault.method == request.method and fault.match in request.path:
                    fault.times -= 1
                    return fault
        return None


class _Handler(Writing, BaseHTTPRequestHandler):
    """One connection. Answers are made in `_answer`; everything below it writes one kind of answer."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which waits 40 ms between the two writes of an answer
    _cut_after: int | None = None
    _mute = False

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        request = Request(self.command, path, {name.lower(): value for name, value in self.headers.items()})
        fault = self.hub.take_fault(request)
        if fault and fault.reached:
            fault.reached.set()
            self.hub.closed.wait()
        if fault and fault.cut_after is not None and self.command in ("POST", "PUT"):
            self.rfile.read(fault.cut_after)
        if fault and (fault.reached or (fault.cut_after is not None and self.command in ("POST", "PUT"))):
            self.close_connection = True
            return None
        body = self.hub.bodies[path] = self.read_body()
        self._cut_after = fault.cut_after if fault else None
        self._mute = bool(fault and fault.mute)
        if fault and fault.then:
            fault.then()
        if fault and fault.status is not None:
            return self._send(fault.status, fault.body, dict(fault.headers))
        if self.command in ("POST", "PUT") or path == "/api/whoami-v2":
            return self.answer_writing(path, parts.path, parse_qs(parts.query), body)
        if path.startswith("/blobs/"):
            return self._send_file(self.hub.blobs[path.removeprefix("/blobs/")], {})
        if path.startswith(("/api/models/", f"/api/{DATASETS}/")):
            kind, org, name, *rest = path.removeprefix("/api/").split("/")
            kind = f"{DATASETS}/" if kind == DATASETS else ""
            return self._answer_api(f"{kind}{org}/{name}", rest, parse_qs(parts.query))
        kind = f"{DATASETS}/" if path.startswith(f"/{DATASETS}/") else ""
        org, name, verb, *rest = [*path.removeprefix(f"/{kind}").strip("/").split("/"), "", "", ""]
        if verb == "resolve":
            # A revision with a slash (refs/pr/1) is quoted in the URL, so it is split off before unquoting.
            revision = unquote(parts.path.removeprefix(f"/{kind}").strip("/").split("/")[3])
            return self._answer_resolve(f"{kind}{org}/{name}", revision, path.split(f"/resolve/{revision}/")[1])
        return self._error(404, "", "Not Found")

    def _answer_api(self, repo_id: str, rest: list[str], query: Mapping[str, list[str]]) -> None:
        repo = self._repo(repo_id)
        if repo is None:
            return None
        kind, revision = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        folder = ""
        if kind == "tree" and rest[1] in repo.commits:
            revision, folder = rest[1], "".join(f"{name}/" for name in rest[2:])
        commit = self._commit(repo, revision)
        if commit is None:
            return None
        files = repo.commits[commit]
        if kind == "tree":
            found = [_tree_entry(name, data) for name, data in sorted(files.items()) if name.startswith(folder)]
            return self._send_json(found) if found else self._error(404, "EntryNotFound", "Entry not found")
        blobs = "blobs" in query
        siblings = [_sibling(name, data) if blobs else {"rfilename": name} for name, data in sorted(files.items())]
        info = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings, "tags": []}
        return self._send_json({**info, "private": repo.private, "gated": "manual" if repo.gated else False})

    def _answer_resolve(self, repo_id: str, revision: str, name: str) -> None:
        repo = self._repo(repo_id)
        if repo is None:
            return None
        if repo.gated:
            status = 403 if self._has_token() else 401
            return self._error(status, "GatedRepo", f"Access to model {repo_id} is restricted.")
        commit = self._commit(repo, revision)
        if commit is None:
            return None
        data = repo.commits[commit].get(name)
        if data is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit}
        if not name.endswith(LARGE):
            return self._send_file(data, {**headers, "ETag": f'"{git_hash(data)}"'})
        blob = sha256(data)
        linked = {
            "X-Linked-Size": str(len(data)),
            "X-Linked-ETag": f'"{blob}"',
            "Location": f"{self.hub.blob_host}/blobs/{blob}",
        }
        return self._send(302, b"", {**headers, **linked})

    def _repo(self, repo_id: str) -> Repo | None:
        """The repository, or None when the refusal is already sent: 401 for what a stranger may not know."""
        repo = self.hub.repos.get(repo_id)
        sent = self.headers.get("Authorization")
        if sent and not self._has_token():
            self._error(401, "", "Invalid credentials in Authorization header")
            return None
        if repo is None or (repo.private and not sent):
            self._error(404 if sent else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _commit(self, repo: Repo, revision: str) -> str | None:
        commit = revision if revision in repo.commits else repo.revisions.get(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _send_file(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = self.headers.get("Range")
        headers["Accept-Ranges"] = "bytes"
        if wanted is None:
            return self._send(200, data, headers)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), int(last) + 1 if last else len(data)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self._send(206, data[start:stop], headers)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        if self._mute:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: self._cut_after])
        if self._cut_after is not None:
            self.close_connection = True


def _read(folder: Path) -> Files:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _sibling(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git_hash(data)}
    if name.endswith(LARGE):
        entry["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
    return entry


def _tree_entry(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
    return entry
