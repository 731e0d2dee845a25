"""Give up on servers that send a byte now and then: a timeout for each read alone would let them go on for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

MIN_RATE = 1_000  # bytes per second; slower than any line on which a model would ever arrive


def watch_rate(client: Any, is_active: Callable[[], bool]) -> None:
    """Have every connection of an httpx client fail as timed out where less than MIN_RATE arrives in a read timeout.

    Args:
        client: with the transports that httpx makes; one of another kind has to see to it by itself.
        is_active: asked at each read, as the client serves other callers too.
    """
    # The heads of answers are read where no hook of httpx is asked, so that connections are the one place for both.
    for transport in (client._transport, *client._mounts.values()):
        pool: Any = getattr(transport, "_pool", None)
        if backend := getattr(pool, "_network_backend", None):
            timeout = import_module(type(pool).__module__.partition(".")[0]).ReadTimeout
            pool._network_backend = _Backend(backend, partial(_Stream, is_active=is_active, timeout_error=timeout))


class _Backend:
    """A network backend whose connections are watched."""

    def __init__(self, inner: Any, watched: Callable[[Any], Any]) -> None:
        self._inner, self._watched = inner, watched

    def connect_tcp(self, *args: Any, **options: Any) -> Any:
        return self._watched(self._inner.connect_tcp(*args, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Stream:
    """A connection that measures what arrives on it, from each request on."""

    def __init__(self, inner: Any, is_active: Callable[[], bool], timeout_error: type[Exception]) -> None:
        self._inner, self._is_active, self._timeout_error = inner, is_active, timeout_error
        self._received, self._waited = 0, 0.0

    def read(self, max_bytes: int, timeout: float | None = None) -> Any:
        start = time.monotonic()
        data = self._inner.read(max_bytes, timeout=timeout)
        # The time in here alone: that of a reader who writes to a slow disk is not the server's.
        self._waited += time.monotonic() - start
        self._received += len(data)
        if timeout is not None and self._waited >= timeout:
            if data and self._received < MIN_RATE * self._waited and self._is_active():
                raise self._timeout_error(f"timed out: {self._received:,} bytes in {self._waited:.0f} seconds")
            self._received, self._waited = 0, 0.0
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._received, self._waited = 0, 0.0
        self._inner.write(buffer, timeout=timeout)

    def start_tls(self, *args: Any, **options: Any) -> Any:
        return _Stream(self._inner.start_tls(*args, **options), self._is_active, self._timeout_error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
