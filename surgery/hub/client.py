"""Guard the requests that huggingface_hub sends: where a token may go, and what an answer may be.

A Hub is a server, and HF_ENDPOINT may name anybody's. huggingface_hub takes its word for the names of files in the
cache, for how long to wait, and for where to ask next, and reads any answer whole. So within `guarded` every request
and every answer passes through here first:

- a token goes to the Hub alone, never to an address that an answer names;
- commits and hashes in headers have the form of such, since they become paths in the cache;
- answers end: in bytes, in time, in how long they ask to wait;
- listings of files are checked before anybody follows a name in them (`surgery.hub.listing`).
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from surgery.hub.errors import RefusedAnswerError, http_library
from surgery.hub.listing import check_listing
from surgery.hub.settings import DEFAULT_ENDPOINT, endpoint, request_timeout
from surgery.hub.transfer_rate import watch_rate
from surgery.io.input_files import MAX_TEXT_BYTES, MB
from surgery.io.redaction import holds_secret

CLIENT_LOGGER = "huggingface_hub"
MAX_WAIT = 900.0  # seconds that a busy Hub may ask to wait; with more it is better to come back later
_WRITE_TIMEOUT = 600.0  # seconds for the answer to an upload: a commit of many files takes the Hub minutes
_MAX_ERROR_BYTES = 1 * MB  # of an error or a redirect, whose text is a line
# Of all answers of the API to one command, which may be a listing of many pages. Each counts as _MIN_COST bytes at
# least, so that pages without an end, each of them empty, end too.
_MAX_API_BYTES = MAX_TEXT_BYTES
_MIN_COST = 16_000
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r'(?:W/)?"?[\w-][\w.:-]{0,127}"?', re.ASCII)  # becomes a file name: no separator, no leading dot
_LOCAL = re.compile(r"localhost|.+\.localhost|127(?:\.\d{1,3}){3}|::1")  # this machine itself
_HUB_HOME = "https://hf.co"
_RESET = re.compile(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d+)")


@dataclass
class _Limits:
    """What the answers within one `guarded` block may still take, in bytes; `file_bytes` of each file."""

    api_bytes: int
    file_bytes: int | None


_lock = threading.Lock()
_active: list[_Limits] = []
_factories: set[Any] = set()


@contextmanager
def guarded(*, largest_file: int | None = None) -> Iterator[None]:
    """Guard all requests of huggingface_hub in the block, those of its threads among them.

    Args:
        largest_file: bytes of the largest file that may be downloaded; None where that is not known.

    Raises:
        RefusedAnswerError: an answer is not what a Hub may say. `surgery.hub.errors` makes a SurgeryError of it.
    """
    _install()
    limits = _Limits(_MAX_API_BYTES, largest_file)
    with _lock:
        _active.append(limits)
    try:
        yield
    finally:
        with _lock:
            _active.remove(limits)


@contextmanager
def quiet_client() -> Iterator[None]:
    """Keep the log of huggingface_hub off the terminal in the block: it repeats a server's words, and signed addresses.

    What matters of it arrives as an error.
    """
    logger = logging.getLogger(CLIENT_LOGGER)
    handlers, propagates = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [logging.NullHandler()], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagates


@contextmanager
def own_blobs() -> Iterator[None]:
    """Keep what is downloaded in the block in its repository's folder of the cache, which may be closed to others.

    Where repositories share a blob, huggingface_hub keeps it where everybody who may enter the cache may read it.
    """
    from huggingface_hub import constants

    before = getattr(constants, "HF_HUB_DISABLE_SHARED_BLOBS", False)
    constants.HF_HUB_DISABLE_SHARED_BLOBS = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_SHARED_BLOBS = before


def requested_delay(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that an answer asks to wait (`Retry-After`, or the Hub's `RateLimit`); None without any."""
    after = str(headers.get("Retry-After", "")).strip()
    if after.isascii() and after.isdigit():
        return float(after)
    limit = _RESET.search(str(headers.get("RateLimit", "")))
    return float(limit[1]) if limit else None


def _install() -> None:
    """Have every client that huggingface_hub makes from now on ask us, whoever set how it is made."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    with _lock:
        factory = vars(_http)["_GLOBAL_CLIENT_FACTORY"]  # it can be set, but not asked for
        if factory in _factories:
            return

        def guarded_factory() -> Any:
            client = factory()
            watch_rate(client, lambda: bool(_active))
            hooks = client.event_hooks
            client.event_hooks = {
                "request": [*hooks["request"], _check_request],
                "response": [_check_response, *hooks["response"]],
            }
            return client

        _factories.add(guarded_factory)
    # Outside the lock: it closes the open client, for which it has a lock of its own.
    set_client_factory(guarded_factory)


def _check_request(request: Any) -> None:
    if not _active:
        return
    url = str(request.url)
    if holds_secret(url) or any(map(holds_secret, request.headers.values())):
        _check_recipient(url)
    # Uncompressed, or a few bytes could become any number of them.
    request.headers["Accept-Encoding"] = "identity"
    request.extensions["timeout"] = _timeouts(request)


def _check_recipient(url: str) -> None:
    """Raise RefusedAnswerError where a token may not go to `url`."""
    parts = urlsplit(url)
    if not is_hub_address(url):
        raise RefusedAnswerError(
            f"the Hub asks to send your token to {parts.hostname or 'an address without a host'}, which was not done",
            "If that is your Hub's own address, set HF_ENDPOINT to it.",
        )
    if parts.scheme != "https" and not _LOCAL.fullmatch(parts.hostname or ""):
        raise RefusedAnswerError(
            f"your token would go to {parts.hostname} for everybody on the way to read, which was not done",
            "Give HF_ENDPOINT an https address; for public models unset the token.",
        )


def _timeouts(request: Any) -> dict[str, float]:
    """Return the timeouts of `request`, none longer than the user's settings allow.

    Some requests of huggingface_hub have none, and would wait for ever; others wait a minute, six times.
    """
    from huggingface_hub import constants

    seconds = {"HEAD": request_timeout(), "GET": max(request_timeout(), constants.HF_HUB_DOWNLOAD_TIMEOUT)}
    longest = seconds.get(request.method, _WRITE_TIMEOUT)
    given = request.extensions.get("timeout") or {}
    return {
        kind: longest if given.get(kind) is None else min(given[kind], longest)
        for kind in ("connect", "read", "write", "pool")
    }


def is_hub_address(url: str) -> bool:
    """Return whether `url` is at the Hub itself, to which a token may go: HF_ENDPOINT's host, or huggingface.co."""
    from huggingface_hub import constants

    return _origin(url) in {_origin(hub) for hub in (endpoint(), constants.ENDPOINT, DEFAULT_ENDPOINT, _HUB_HOME)}


def _is_api(url: str) -> bool:
    return is_hub_address(url) and urlsplit(url).path.startswith(f"{urlsplit(endpoint()).path}/api/")


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    return parts.scheme, parts.hostname or "", port or (443 if parts.scheme == "https" else 80)


def _check_response(response: Any) -> None:
    if not _active:
        return
    limits = _active[-1]
    headers, request = response.headers, response.request
    _check_headers(response)
    if (wait := requested_delay(headers)) is not None and wait > MAX_WAIT:
        raise RefusedAnswerError(
            f"the Hub limits how often you may ask (HTTP {response.status_code})",
            f"It asks to wait {wait:,.0f} seconds. Run the same command then.",
        )
    encoding = headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity") and request.method != "HEAD":
        raise RefusedAnswerError(
            f"an answer is compressed ({encoding[:20]!r}) though none was asked for that",
            "Check HF_ENDPOINT and the network.",
        )
    is_api = _is_api(str(request.url))
    if response.status_code >= 300:
        limit: int | None = _MAX_ERROR_BYTES
    elif is_api:
        limits.api_bytes -= _MIN_COST
        limit = limits.api_bytes
    else:
        limit = limits.file_bytes
    library = http_library()
    stream = _bounded(library, response, limit, limits if is_api else None)
    response.stream = stream
    if is_api and response.status_code == 200 and request.method == "GET":
        response.read()
        check_listing(response.content, request.url.path)


def _check_headers(response: Any) -> None:
    headers = response.headers
    commit = headers.get("X-Repo-Commit")
    if commit is not None and not _COMMIT.fullmatch(commit):
        raise _bad_header("commit", commit)
    for name in ("X-Linked-ETag", "ETag"):
        etag = headers.get(name)
        if etag is not None and (not _ETAG.fullmatch(etag) or ".." in etag):
            raise _bad_header("hash of a file", etag)
    for name in ("X-Linked-Size", "Content-Length"):
        size = headers.get(name)
        if size is not None and not (size.isascii() and size.isdigit() and int(size[:20]) < 1 << 62):
            raise _bad_header("size of a file", size)
    # Where the token for the storage of large files is asked for, with the Hub's own token.
    routes = [link.get("url", "") for key, link in response.links.items() if key == "xet-auth"]
    for route in (*routes, *headers.get_list("X-Xet-Refresh-Route")):
        _check_recipient(route)


def _bad_header(what: str, value: str) -> RefusedAnswerError:
    shown = ascii(value if len(value) <= 60 else f"{value[:60]}…")
    return RefusedAnswerError(f"the Hub names {shown} as the {what}, which cannot be", "Check HF_ENDPOINT.")


def _bounded(library: Any, response: Any, limit: int | None, shared: _Limits | None) -> Any:
    """Return the body of `response`, which raises where it is longer than `limit` bytes."""
    body = response.stream

    class Bounded(library.SyncByteStream):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            total = 0
            for chunk in body:
                total += len(chunk)
                if limit is not None and total > limit:
                    raise RefusedAnswerError(
                        f"an answer has more than the {limit:,} bytes that it may have", "Check HF_ENDPOINT."
                    )
                yield chunk
            if shared is not None:
                shared.api_bytes -= total

        def close(self) -> None:
            body.close()

    return Bounded()
