"""Everything that can go wrong while something is sent: one line each, and the same command goes on."""

from __future__ import annotations

import json
import logging
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from support.hub_server import HubServer
from support.hub_uploads import sha256
from support.publish import REPO, TOKEN, commits, failure, files_at, uploads

from surgery.publish import upload_session
from surgery.publish.upload import push

pytestmark = pytest.mark.usefixtures("writable")


def test_no_such_organisation(server: HubServer, out: Path) -> None:
    assert failure(out, "strangers/x").startswith(
        "strangers/x: your token may not write here (HTTP 403: You don't have the rights to create a model under the "
        'namespace "strangers"). Use one with write access to strangers'
    )
    server.fail("/create", 404, method="POST")
    assert "no user or organisation lab, or your token has no access to it (HTTP 404)" in failure(out)


def test_no_permission_shows_before_weights_are_sent(server: HubServer, out: Path) -> None:
    push(out, REPO)
    server.requests.clear()
    server.namespaces = set()
    server.blobs.clear()
    assert "your token may not write here (HTTP 403: Authorization error)" in failure(out)
    assert not server.asked("/lfs/")


def test_a_name_that_is_taken_out_of_sight(server: HubServer, out: Path) -> None:
    server.fail(f"/api/models/{REPO}", 404, times=9, headers={"X-Error-Code": "RepoNotFound"})
    body = json.dumps({"url": f"{server.url}/{REPO}"}).encode()
    server.fail("/create", 409, method="POST", body=body)
    assert "is taken, but your token may not see it" in failure(out)


def test_somebody_who_pushes_in_between_costs_one_more_look(server: HubServer, out: Path) -> None:
    push(out, REPO)
    (out / "README.md").write_text("# New words\n")
    messages: list[str] = []
    server.before("/commit/", lambda: server.commit(REPO, "main", {**files_at(server), "theirs.md": b"x"}))
    push(out, REPO, notify=messages.append)
    assert f"{REPO}: somebody else pushed in between (HTTP 412). Looking again." in messages
    assert b"# New words" in files_at(server)["README.md"]
    assert files_at(server)["theirs.md"] == b"x"


@pytest.mark.parametrize("status", [409, 412])
def test_somebody_who_keeps_pushing_is_an_error(server: HubServer, out: Path, status: int) -> None:
    server.fail("/commit/", status, method="POST", times=2)
    assert f"somebody else pushed in between (HTTP {status}). Run the same command again" in failure(out)
    assert push(out, REPO).changed


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


@pytest.mark.parametrize("step", ["/whoami-v2", "/create", "/preupload/", "/lfs/", "/commit/"])
def test_a_busy_hub_is_waited_for_as_long_as_it_asks(
    server: HubServer, out: Path, slept: list[float], step: str
) -> None:
    messages: list[str] = []
    server.fail(step, 429, method="GET" if "who" in step else "POST", headers={"Retry-After": "30"})
    assert push(out, REPO, notify=messages.append).changed
    assert slept in ([30], [31])  # the client adds a second
    assert sum(f"{slept[0]:g} s" in line for line in messages) == 1


def test_a_hub_that_stays_busy_is_an_error(server: HubServer, out: Path, slept: list[float]) -> None:
    server.fail("/create", 429, method="POST", times=9, headers={"Retry-After": "7"})
    assert "the Hub limits how often you may ask (HTTP 429). It asks to wait 7 seconds. Run the same" in failure(out)
    assert slept == [7, 7, 7]


def test_nobody_waits_for_hours(server: HubServer, out: Path, slept: list[float]) -> None:
    server.fail("/whoami", 429, headers={"RateLimit": '"api";r=0;t=7200'})
    assert "It asks to wait 7,200 seconds" in failure(out)
    assert not slept


@pytest.mark.parametrize("status", [500, 502, 503])
@pytest.mark.parametrize("step", ["/create", "/preupload/", "/lfs/", "/uploads/", "/commit/"])
def test_a_hub_that_fails_is_asked_again(server: HubServer, out: Path, step: str, status: int) -> None:
    server.fail(step, status, method="PUT" if step == "/uploads/" else "POST")
    assert push(out, REPO).changed


@pytest.mark.parametrize("step", ["/create", "/preupload/", "/lfs/", "/uploads/", "/commit/"])
def test_a_hub_that_keeps_failing_is_an_error_that_the_same_command_mends(
    server: HubServer, out: Path, step: str
) -> None:
    server.fail(step, 503, method="PUT" if step == "/uploads/" else "POST", times=99)
    assert "the Hub fails (HTTP 503). Wait a little. Run the same command again" in failure(out)
    server._faults.clear()
    assert push(out, REPO).changed
    assert len(commits(server)) == (1 if step != "/commit/" else 5)


def test_a_pull_request_is_never_opened_twice_by_asking_again(server: HubServer, out: Path) -> None:
    push(out, REPO)
    (out / "README.md").write_text("# New words\n")
    server.requests.clear()
    server.fail("/commit/", 500, method="POST")
    assert "the Hub fails (HTTP 500)" in failure(out, pr=True)
    assert len(commits(server)) == 1


def test_an_answer_to_the_commit_that_is_lost_is_no_loss(server: HubServer, out: Path) -> None:
    server.lose_answer("/commit/")
    pushed = push(out, REPO)
    assert (pushed.changed, pushed.commit) == (True, server.repos[REPO].revisions["main"])
    assert "surgery.json" in files_at(server)


@pytest.mark.parametrize("after", [0, 1000])
def test_a_cut_connection_costs_one_file(server: HubServer, out: Path, after: int) -> None:
    path = min(out.glob("*.safetensors"))
    server.cut(sha256(path.read_bytes()), after, method="PUT")
    push(out, REPO)
    assert len(uploads(server)) == len(list(out.glob("*.safetensors"))) + 1


def test_a_connection_that_keeps_breaking_is_an_error_and_what_arrived_stays(server: HubServer, out: Path) -> None:
    last = max(out.glob("*.safetensors"))
    server.cut(sha256(last.read_bytes()), 100, method="PUT", times=99)
    message = failure(out)
    assert message.startswith(f"{REPO}: cannot reach the Hub at {server.url} (")
    assert message.endswith("Run the same command again: what has arrived is not sent twice.")
    assert not commits(server)
    server._faults.clear()
    server.requests.clear()
    push(out, REPO)
    assert 0 < len(uploads(server)) <= 5


def test_a_storage_that_refuses_is_not_taken_for_missing_rights(server: HubServer, out: Path) -> None:
    server.fail("/uploads/", 403, method="PUT")
    assert "the Hub's storage refuses a file (HTTP 403)" in failure(out)


def test_nobody_answers(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", url)
        assert failure(out).startswith(f"{REPO}: cannot reach the Hub at {url} (Connection refused). Check the")


def test_an_answer_that_is_no_hub(server: HubServer, out: Path) -> None:
    server.fail("/whoami", 200, body=b"<html>Please log in to the network</html>")
    assert "(the answer is not a Hub's)" in failure(out)


def test_offline_mode(server: HubServer, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert failure(out) == f"{REPO}: offline mode is on, so nothing can be pushed. Unset HF_HUB_OFFLINE."
    assert not server.requests


def test_a_full_disk_on_the_way(out: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Error while uploading") from OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.HfApi.preupload_lfs_files", fail)
    assert failure(out).startswith(f"{cache}: the disk filled up while sending. Free some space. Run the same")


def test_a_transfer_that_breaks_off_without_a_reason(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"CAS error for {TOKEN}")  # as hf_xet

    monkeypatch.setattr("huggingface_hub.HfApi.preupload_lfs_files", fail)
    assert failure(out).startswith(f"{REPO}: the upload broke off. Run the same command again")


@pytest.mark.parametrize(
    ("repo_id", "options", "text"),
    [
        ("reasoner", {}, "Hub id: got 'reasoner', expected org/name"),
        ("lab/x@v1", {}, "Name a branch with --revision."),
        ("lab/x", {"revision": "a..b"}, "cannot be a branch"),
        ("lab/x", {"revision": "0" * 40}, "is a commit, and commits never change"),
        ("lab/x", {"revision": "v1", "pr": True}, "To add to one that is open, give --revision refs/pr/N alone."),
    ],
)
def test_what_was_asked_wrongly(server: HubServer, out: Path, repo_id: str, options: dict[str, Any], text: str) -> None:
    assert text in failure(out, repo_id, **options)
    assert not server.requests


def test_the_client_is_left_as_it_was(server: HubServer, out: Path) -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    logger = logging.getLogger("huggingface_hub")
    before = (logger.handlers, logger.propagate, are_progress_bars_disabled())
    push(out, REPO)
    server.fail("/whoami", 403)
    failure(out)
    assert (logger.handlers, logger.propagate, are_progress_bars_disabled()) == before


def test_nothing_is_printed(server: HubServer, out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server.fail("/uploads/", 500, method="PUT")
    push(out, REPO)
    assert capfd.readouterr() == ("", "")


def test_a_storage_that_has_uploads_confirmed_elsewhere_gets_no_token(
    server: HubServer, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_session, "FILES_PER_UPLOAD", 100)
    with HubServer() as other:
        objects = []
        for path in sorted(out.glob("*.safetensors")):
            oid = sha256(path.read_bytes())
            actions = {name: {"href": f"{other.url}/{name}/{oid}"} for name in ("upload", "verify")}
            objects.append({"oid": oid, "size": path.stat().st_size, "actions": actions})
            other.fail(f"/upload/{oid}", 200, method="PUT", headers={"ETag": f'"{oid}"'})
        body = json.dumps({"transfer": "basic", "objects": objects}).encode()
        server.fail("/objects/batch", 200, method="POST", body=body, times=9)
        assert "asks to send your token to 127.0.0.1, which was not done" in failure(out)
        assert other.asked("/upload/") and not other.asked("/verify/")
        assert not [each for each in other.requests if "authorization" in each.headers]


@pytest.mark.parametrize(
    "body", [b"[]", b"{}", b'{"objects": 5}', b'{"objects": [5]}', b"null", b"<html>", b"[" * 99999]
)
@pytest.mark.parametrize("path", ["/whoami", "/create", "/preupload/", "/objects/batch", "/commit/"])
def test_an_answer_of_another_form_is_one_line(server: HubServer, out: Path, path: str, body: bytes) -> None:
    for method in ("GET", "POST"):
        server.fail(path, 200, method=method, body=body, times=9)
    if path == "/whoami" and body not in (b"<html>", b"[" * 99999):
        push(out, REPO)  # whose token it is matters only where it may not write
    else:
        assert failure(out).startswith(f"{REPO}: ")
