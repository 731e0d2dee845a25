"""Promises of surgery.hub.client: tokens go to the Hub alone, and whatever a server answers ends, inside the cache."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from support.hub_models import FETCHED, REPO, content, failure
from support.hub_server import HubServer
from support.hub_uploads import git_hash

from surgery.errors import SurgeryError
from surgery.hub import client
from surgery.hub import download as hub
from surgery.hub.client import guarded, is_hub_address, requested_delay
from surgery.hub.datasets import HubDataset, resolve_commit
from surgery.hub.errors import RefusedAnswerError, http_error_types

SHARD = "model-00001-of-00002.safetensors"
ELSEWHERE = "asks to send your token to 127.0.0.1, which was not done"


@pytest.fixture
def other() -> Iterator[HubServer]:
    """Another server, to which no token may go."""
    with HubServer() as server:
        yield server


@pytest.fixture
def token(server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_TOKEN", server.token)
    server.add(REPO, model, private=True)
    return server.token


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)


def authorizations(server: HubServer) -> list[str]:
    return [each.headers["authorization"] for each in server.requests if "authorization" in each.headers]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_listing_that_redirects_elsewhere_carries_no_token(
    server: HubServer, other: HubServer, model: Path, token: str, status: int
) -> None:
    other.add(REPO, model)
    server.fail("/api/models", status, headers={"Location": f"{other.url}/api/models/{REPO}"})
    assert content(hub.fetch(REPO, progress=False).folder) == FETCHED
    assert other.requests and authorizations(other) == []


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_file_that_redirects_elsewhere_carries_no_token(
    server: HubServer, other: HubServer, model: Path, token: str, method: str
) -> None:
    other.add(REPO, model)
    commit = server.repos[REPO].revisions["main"]
    path = f"/{REPO}/resolve/{commit}/tokenizer.json"
    headers = {
        "Location": f"{other.url}{path}",
        "X-Repo-Commit": commit,
        "ETag": f'"{git_hash(FETCHED["tokenizer.json"])}"',
    }
    server.fail("/tokenizer.json", 302, method=method, times=9, headers=headers)
    assert content(hub.fetch(REPO, progress=False).folder) == FETCHED
    assert other.requests and authorizations(other) == []


def test_a_next_page_elsewhere_is_not_asked_with_the_token(
    server: HubServer, other: HubServer, model: Path, token: str
) -> None:
    next_page = {"Link": f'<{other.url}/api/models/{REPO}/tree/main?cursor=1>; rel="next"'}
    server.fail("/tree/", 200, body=b"[]", times=9, headers=next_page)
    assert ELSEWHERE in failure()
    assert other.requests == []


@pytest.mark.parametrize("header", ["Link", "X-Xet-Refresh-Route"])
def test_a_token_for_storage_is_not_asked_for_elsewhere(
    server: HubServer, other: HubServer, model: Path, token: str, header: str
) -> None:
    route = f"{other.url}/api/models/{REPO}/xet-read-token/main"
    value = f'<{route}>; rel="xet-auth"' if header == "Link" else route
    commit = server.repos[REPO].revisions["main"]
    headers = {header: value, "X-Xet-Hash": "a" * 64, "X-Repo-Commit": commit, "ETag": f'"{"b" * 40}"'}
    server.fail("/config.json", 200, body=b"{}", method="HEAD", times=9, headers=headers)
    assert ELSEWHERE in failure()
    assert other.requests == []


@pytest.mark.parametrize(("host", "is_sent"), [("hub.test", False), ("10.0.0.1", False), ("127.0.0.1", True)])
def test_no_token_goes_through_a_network_unencrypted(
    server: HubServer, token: str, monkeypatch: pytest.MonkeyPatch, host: str, is_sent: bool
) -> None:
    port = server.url.rpartition(":")[2]
    monkeypatch.setenv("HF_ENDPOINT", f"http://{host}:{port}")
    if is_sent:
        assert content(hub.fetch(REPO, progress=False).folder) == FETCHED
    else:
        assert f"your token would go to {host} for everybody on the way to read, which was not done" in failure()


def test_a_redirect_to_another_scheme_is_one_line(server: HubServer, token: str) -> None:
    for target in (
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "javascript:x",
        "http://[",
        "http://%00",
        "//:1",
        "http://a:b/",
    ):
        server.fail("/api/models", 302, headers={"Location": target})
        assert failure().startswith("lab/tiny: ")


def test_a_data_set_that_redirects_to_what_is_no_address_is_one_line(server: HubServer, token: str) -> None:
    for target in ("//::1/x", "http://host:port/", "http://[::1", "http://:99999/x"):
        server.fail("/api/datasets", 302, headers={"Location": target})
        with pytest.raises(SurgeryError, match="lab/data"):
            resolve_commit(HubDataset("lab/data", "lab/data", None, None, "train"))


def test_redirects_in_a_circle_end(server: HubServer, model: Path) -> None:
    server.add(REPO, model)
    server.fail("/api/models", 302, times=99, headers={"Location": f"/api/models/{REPO}"})
    assert "cannot reach the Hub" in failure()
    assert len(server.requests) < 40


@pytest.mark.parametrize(
    ("url", "is_hub"),
    [
        ("http://hub.test/api", True),
        ("http://hub.test:80/x", True),
        ("https://huggingface.co/x", True),
        ("http://huggingface.co/x", False),
        ("https://hub.test/x", False),
        ("http://hub.test:81/x", False),
        ("http://hub.test.evil/x", False),
        ("http://hub.test@evil/x", False),
        ("http://evil/hub.test", False),
        ("http://hub.test:port/x", False),
        ("/relative", False),
    ],
)
def test_what_is_the_hub_itself(monkeypatch: pytest.MonkeyPatch, url: str, is_hub: bool) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.test")
    assert is_hub_address(url) == is_hub


@pytest.mark.parametrize(
    "etag",
    ["../../../outside", "{folder}/outside", "..", ".", ".hidden", "a/b", "a\\b", "x" * 200, "a b", "%2e%2e/x", ""],
)
@pytest.mark.parametrize("header", ["ETag", "X-Linked-ETag"])
def test_a_hash_never_leads_out_of_the_cache(
    server: HubServer, model: Path, cache: Path, tmp_path: Path, etag: str, header: str
) -> None:
    commit = server.add(REPO, model)
    headers = {header: f'"{etag.format(folder=tmp_path)}"', "X-Repo-Commit": commit}
    server.fail("/config.json", 200, body=b"{}", method="HEAD", times=9, headers=headers)
    assert "as the hash of a file, which cannot be" in failure() or not etag
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "model"]


@pytest.mark.parametrize("status", [200, 404])
def test_a_commit_in_a_header_never_leads_out_of_the_cache(
    server: HubServer, model: Path, cache: Path, tmp_path: Path, status: int
) -> None:
    server.add(REPO, model)
    headers = {"X-Repo-Commit": "../../../outside", "ETag": f'"{"b" * 40}"', "X-Error-Code": "EntryNotFound"}
    server.fail("/config.json", status, body=b"{}", method="HEAD", times=9, headers=headers)
    assert "names '../../../outside' as the commit, which cannot be" in failure()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "model"]


@pytest.mark.parametrize("size", ["-1", "1e9", "9" * 30, "x", "1,5"])
def test_a_size_that_cannot_be_is_refused(server: HubServer, model: Path, size: str) -> None:
    commit = server.add(REPO, model)
    headers = {"X-Repo-Commit": commit, "ETag": f'"{"b" * 40}"', "X-Linked-Size": size}
    server.fail("/config.json", 200, body=b"{}", method="HEAD", times=9, headers=headers)
    assert "as the size of a file, which cannot be" in failure()


def test_an_answer_is_not_read_without_end(server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_MAX_API_BYTES", 100_000)
    server.fail("/api/models", 200, body=b" " * 100_001)
    assert "an answer has more than the 84,000 bytes that it may have" in failure()
    monkeypatch.setattr(client, "_MAX_ERROR_BYTES", 1000)
    for status, extra in ((404, {}), (500, {}), (302, {"Location": "/"})):
        server.fail("/api/models", status, body=b" " * 1001, headers=extra)
        assert "an answer has more than the 1,000 bytes that it may have" in failure()


def test_pages_without_an_end_end(server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_MAX_API_BYTES", 200_000)
    server.add(REPO, model)
    page = {"Link": f'<{server.url}/api/models/{REPO}/tree/main?cursor=1>; rel="next"'}
    server.fail("/tree/", 200, body=b"[]", times=10**6, headers=page)
    assert "bytes that it may have" in failure()
    assert len(server.asked("/tree/")) < 20


def test_a_file_that_goes_on_after_its_end_does_not_fill_the_disk(server: HubServer, model: Path) -> None:
    server.add(REPO, model)
    largest = max(map(len, FETCHED.values()))
    server.fail("/tokenizer.json", 200, body=b" " * (largest + 1))
    assert f"an answer has more than the {largest:,} bytes that it may have" in failure()


def test_what_is_compressed_is_not_unpacked(server: HubServer, model: Path) -> None:
    server.add(REPO, model)
    assert content(hub.fetch(REPO, progress=False).folder) == FETCHED
    assert {each.headers["accept-encoding"] for each in server.requests} == {"identity"}
    bomb = gzip.compress(b" " * 10_000_000)
    server.fail("/api/models", 200, body=bomb, headers={"Content-Encoding": "gzip"})
    assert "an answer is compressed ('gzip')" in failure()


@pytest.mark.parametrize("headers", [{"Retry-After": "99999999"}, {"RateLimit": '"api";r=0;t=99999999'}], ids=str)
@pytest.mark.parametrize("path", ["/api/models", "/tree/", "/config.json"])
def test_nobody_waits_as_long_as_a_server_likes(
    server: HubServer, model: Path, headers: dict[str, str], path: str
) -> None:
    server.add(REPO, model)
    for method in ("GET", "HEAD"):
        server.fail(path, 429, method=method, times=9, headers=headers)
    assert "(HTTP 429). It asks to wait 99,999,999 seconds. Run the same command then." in failure()


def test_how_long_an_answer_asks_to_wait() -> None:
    assert requested_delay({"Retry-After": " 7 "}) == 7
    assert requested_delay({"Retry-After": "٧"}) is None
    assert requested_delay({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) is None
    assert requested_delay({"RateLimit": '"api";r=0;t=55'}) == 55
    assert requested_delay({"RateLimit": '"api";r=9;t=55'}) is None


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch, server: HubServer, impatient: None) -> Iterator[list[bytes]]:
    """A server that sends the pieces in the list one after another, every 50 ms, and then nothing for ever."""
    pieces: list[bytes] = []
    ended = threading.Event()

    def answer(connection: socket.socket) -> None:
        with connection:
            connection.recv(65536)
            try:
                for piece in pieces:
                    connection.sendall(piece)
                    ended.wait(0.05)
                ended.wait()
            except OSError:
                return

    def accept(listener: socket.socket) -> None:
        while not ended.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        yield pieces
        ended.set()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [b"HTTP/1.1 200 OK\r\n"],
        [HEAD],
        [HEAD, b"{"],
        [HEAD, *([b" "] * 1000)],
        [HEAD[:17], b"X: ", *([b"x"] * 1000)],
    ],
    ids=["silence", "half a head", "head", "stall", "trickle", "trickle in the head"],
)
def test_a_slow_server_times_out_with_a_line(slow: list[bytes], pieces: list[bytes]) -> None:
    slow.extend(pieces)
    start = time.monotonic()
    message = failure()
    assert "cannot reach the Hub at" in message and "(it does not answer in time, or too slowly)" in message
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("path", ["/tree/", "/config.json"])
def test_a_server_that_falls_silent_later_times_out(server: HubServer, model: Path, impatient: None, path: str) -> None:
    server.add(REPO, model)
    for method in ("HEAD", "GET"):
        for _ in range(20):
            server.stall(path, method=method)
    start = time.monotonic()
    assert "(it does not answer in time, or too slowly)" in failure()
    assert time.monotonic() - start < 20


def test_requests_without_a_timeout_get_one(server: HubServer, model: Path, impatient: None) -> None:
    server.add(REPO, model)
    for _ in range(9):
        server.stall("/tree/", method="GET")
    api = huggingface_hub.HfApi(endpoint=server.url)
    with guarded(), pytest.raises(http_error_types(), match="timed out"):
        list(api.list_repo_tree(REPO))


def test_what_others_ask_of_huggingface_hub_is_left_alone(server: HubServer, model: Path, other: HubServer) -> None:
    server.add(REPO, model)
    api = huggingface_hub.HfApi(endpoint=server.url)
    body = json.dumps({"id": REPO, "sha": "main", "siblings": []}).encode()
    server.fail("/api/models", 200, body=body, times=2)
    with guarded(), pytest.raises(RefusedAnswerError):
        api.model_info(REPO)
    assert api.model_info(REPO).sha == "main"


def test_guards_are_set_once(server: HubServer, model: Path) -> None:
    server.add(REPO, model)
    for _ in range(3):
        hub.fetch(REPO, progress=False)
    hooks = huggingface_hub.get_session().event_hooks
    assert [hook for hook in hooks["response"] if hook is client._check_response] == [client._check_response]
