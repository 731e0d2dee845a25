"""Promises of surgery.hub.errors: whatever the Hub, the net or the disk answers is one line, without the token."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest
from huggingface_hub import file_download
from support.hub_models import FETCHED, REPO, content, failure
from support.hub_server import HubServer

from surgery.hub import download as hub

BAD_TOKEN = "Invalid credentials in Authorization header"  # by which the client knows a refused token


def test_no_such_model(server: HubServer) -> None:
    assert failure() == (
        f"lab/tiny: no such model at {server.url}, or it is private and needs a token. "
        "Check the spelling; for a private model log in with `hf auth login`, or set HF_TOKEN."
    )


def test_private_model_opens_with_the_token(server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add(REPO, model, private=True)
    assert "it is private and needs a token" in failure()
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert content(hub.fetch(REPO, progress=False).folder) == FETCHED
    assert not any("authorization" in request.headers for request in server.asked("/blobs/"))


def test_no_such_model_with_a_token(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert "it is private and your token may not read it. Check the spelling" in failure()


def test_refused_token(server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add(REPO, model)
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    assert failure().startswith("lab/tiny: the Hub does not accept your token. To replace it log in")


def test_gated_model(server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add(REPO, model, gated=True)
    gated = f"lab/tiny: is gated: its authors ask you to accept terms first. Accept them at {server.url}/lab/tiny"
    assert failure() == f"{gated}, then log in with `hf auth login`, or set HF_TOKEN."
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert failure() == f"{gated}, then ask again."


def test_no_such_revision(server: HubServer, model: Path) -> None:
    server.add(REPO, model)
    expected = f"has no such revision. Its branches and tags are listed at {server.url}/lab/tiny/tree/main."
    assert failure(REPO, "v9") == f"lab/tiny@v9: {expected}"


def test_nobody_answers(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", url)
        assert failure() == (
            f"lab/tiny: cannot reach the Hub at {url} (Connection refused). "
            "Check the connection (and HF_ENDPOINT, if set), or give a local folder."
        )


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (401, "the Hub does not accept your token"),
        (403, "the Hub refuses (HTTP 403). See http://127.0.0.1"),
        (404, "a file of its listing is not there (HTTP 404)"),
        (429, "the Hub limits how often you may ask (HTTP 429). Wait some minutes"),
        (500, "cannot reach the Hub at"),
        (503, "(HTTP 503)"),
    ],
)
def test_every_refusal_is_one_line(server: HubServer, model: Path, status: int, text: str) -> None:
    server.add(REPO, model)
    server.fail("/resolve/", status, times=50, method="HEAD", headers={"X-Error-Message": BAD_TOKEN})
    assert text in failure()


def test_an_answer_that_is_no_hub(server: HubServer) -> None:
    server.fail("/api/models", 200, body=b"<html>Please log in to the network</html>")
    assert "(the answer is not a Hub's)" in failure()


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "the disk filled up while downloading to"),
        (errno.EDQUOT, "the disk filled up while downloading to"),
        (errno.EACCES, "cannot be written. Set HF_HUB_CACHE to a folder of yours."),
    ],
)
def test_a_disk_that_refuses(
    server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch, number: int, text: str
) -> None:
    server.add(REPO, model)

    def refuse(*args: object, **options: object) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(file_download, "http_get", refuse)
    assert text in failure()


def test_the_token_is_in_no_error(
    server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "hf_averysecrettoken"
    server.token = secret
    monkeypatch.setenv("HF_TOKEN", secret)
    server.add(REPO, model)
    server.add("lab/gated", model, gated=True)
    texts = [failure("lab/gated"), failure("lab/none"), failure(REPO, "v9")]
    for status in (400, 401, 403, 404, 418, 429, 500):
        server.fail("/api/models", status, headers={"X-Error-Message": f"what of {secret}?"})
        texts.append(failure())
    monkeypatch.setenv("HF_TOKEN", f"{secret}-wrong")
    texts.append(failure())
    assert server.asked()[0].headers["authorization"] == f"Bearer {secret}"
    shown = capfd.readouterr()
    assert secret not in "".join([*texts, shown.out, shown.err])
