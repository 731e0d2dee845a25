"""The part of the Hub's protocol that writes, for `hub_server`.

GET  /api/whoami-v2                          whose token it is, and what it may do
POST /api/repos/create                       {name, organization, private or visibility}
POST /api/models/ORG/NAME/branch/B           {startingPoint}
POST /api/validate-yaml                      {content}: a card, before anything is sent
POST /api/models/ORG/NAME/preupload/REV      {files: [{path, sample, size}]} → regular or lfs, and what is there
POST /ORG/NAME.git/info/lfs/objects/batch    {objects: [{oid, size}]} → where to PUT those that are not there
PUT  /uploads/SHA256                         the bytes, at a host of another name
POST /api/models/ORG/NAME/commit/REV         lines of JSON: header, file, lfsFile, deletedFile; ?create_pr=1
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import yaml

if TYPE_CHECKING:
    from support.hub_server import HubServer, Repo

Files = dict[str, bytes]
Query = Mapping[str, list[str]]
LARGE = ".safetensors"  # what the Hub keeps outside git
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"  # what the Hub puts into a new repository
PULL_REQUESTS = "refs/pr/"


class Writing(BaseHTTPRequestHandler):
    """Handlers of requests that write; `hub_server` gives the ways to answer."""

    hub: HubServer

    def read_body(self) -> bytes:
        """What was sent, by its length or in chunks."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer_writing(self, path: str, quoted: str, query: Query, body: bytes) -> None:
        """Answers a POST, a PUT, or whoami."""
        if path.startswith("/uploads/"):
            return self._take(path.removeprefix("/uploads/"), body)
        if not self._has_token():
            return self._error(401, "", "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return self._send_json({"name": "ann", "auth": {"accessToken": {"role": self.hub.role}}})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        _, _, _, org, name, verb, *rest = quoted.split("/")
        repo_id, revision = f"{org}/{name}", unquote("/".join(rest))
        repo = self._repo(repo_id)
        if repo is None:
            return None
        opens = "create_pr" in query
        if org not in self.hub.namespaces and not opens:
            return self._error(403, "", "Authorization error")
        if verb == "branch":
            return self._branch(repo, revision, json.loads(body).get("startingPoint", "main"))
        commit = self._commit(repo, revision)
        if commit is None:
            return None
        if verb == "preupload":
            return self._modes(repo.commits[commit], json.loads(body)["files"])
        return self._add(repo_id, repo, revision, opens, [json.loads(line) for line in body.splitlines()])

    def _create(self, asked: Mapping[str, Any]) -> None:
        from support.hub_server import Repo

        org = asked["organization"]
        if org not in self.hub.namespaces:
            message = f'You don\'t have the rights to create a model under the namespace "{org}"'
            return self._error(403, "", message)
        repo_id = f"{org}/{asked['name']}"
        if repo_id in self.hub.repos:
            answer = {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"}
            return self._send(409, json.dumps(answer).encode(), {})
        self.hub.repos[repo_id] = Repo(asked.get("private", asked.get("visibility") == "private"), False)
        self.hub.commit(repo_id, "main", {".gitattributes": ATTRIBUTES} if self.hub.writes_attributes else {})
        return self._send_json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def _branch(self, repo: Repo, name: str, start: str) -> None:
        if name in repo.revisions:
            return self._error(409, "", "Reference already exists")
        repo.revisions[name] = repo.revisions.get(start, start)
        return self._send_json({})

    def _validate(self, card: str) -> None:
        says = self.hub.card_says
        if "errors" not in says and not isinstance(yaml.safe_load(card.split("---")[1]), dict):
            says = {"errors": [{"message": "no metadata"}]}
        body = json.dumps({"errors": says.get("errors", []), "warnings": says.get("warnings", [])}).encode()
        self._send(400 if "errors" in says else 200, body, {"Content-Type": "application/json"})

    def _modes(self, files: Files, asked: list[Mapping[str, Any]]) -> None:
        answers = []
        for file in asked:
            name = file["path"]
            hashed = sha256 if name.endswith(LARGE) else git_hash
            mode = "lfs" if name.endswith(LARGE) else "regular"
            oid = hashed(files[name]) if name in files else None
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send_json({"files": answers})

    def _batch(self, asked: Mapping[str, Any]) -> None:
        objects = []
        for each in asked["objects"]:
            # As the real ones, the address is signed: whoever has it may write.
            href = f"{self.hub.blob_host}/uploads/{each['oid']}?signature=s3cret"
            missing = {} if each["oid"] in self.hub.blobs else {"actions": {"upload": {"href": href}}}
            objects.append({**each, **missing})
        self._send_json({"transfer": "basic", "objects": objects})

    def _take(self, oid: str, body: bytes) -> None:
        if sha256(body) != oid:
            return self._error(400, "", "The content has another hash")
        self.hub.blobs[oid] = body
        return self._send(200, b"", {"ETag": f'"{oid}"'})

    def _add(self, repo_id: str, repo: Repo, revision: str, opens: bool, lines: list[Mapping[str, Any]]) -> None:
        header, *operations = [(line["key"], line["value"]) for line in lines]
        parent = header[1].get("parentCommit", repo.revisions[revision])
        if not opens and parent != repo.revisions[revision]:
            return self._error(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[parent])
        for key, value in operations:
            if key == "deletedFile":
                del files[value["path"]]
            elif key == "lfsFile" and value["oid"] not in self.hub.blobs:
                return self._error(400, "", f"{value['path']} was not uploaded")
            else:
                large = key == "lfsFile"
                files[value["path"]] = (
                    self.hub.blobs[value["oid"]] if large else base64.b64decode(value["content"], validate=True)
                )
        number = 1 + sum(name.startswith(PULL_REQUESTS) for name in repo.revisions)
        branch = f"{PULL_REQUESTS}{number}" if opens else revision
        commit = self.hub.commit(repo_id, branch, files)
        page = f"{self.hub.url}/{repo_id}"
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{page}/commit/{commit}"}
        return self._send_json(answer | ({"pullRequestUrl": f"{page}/discussions/{number}"} if opens else {}))

    def _has_token(self) -> bool:
        raise NotImplementedError

    def _repo(self, repo_id: str) -> Repo | None:
        raise NotImplementedError

    def _commit(self, repo: Repo, revision: str) -> str | None:
        raise NotImplementedError

    def _send_json(self, value: object) -> None:
        raise NotImplementedError

    def _error(self, status: int, code: str, message: str) -> None:
        raise NotImplementedError

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        raise NotImplementedError


def sha256(data: bytes) -> str:
    """By which the Hub knows large files."""
    return hashlib.sha256(data).hexdigest()


def sha1(data: bytes) -> str:
    """By which it knows commits."""
    return hashlib.sha1(data).hexdigest()


def git_hash(data: bytes) -> str:
    """By which git, and so the Hub, knows other files."""
    return sha1(b"blob %d\0" % len(data) + data)
