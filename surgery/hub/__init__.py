"""Download models and data sets from the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from surgery.hub.download import HubSnapshot, fetch, list_repository

__all__ = [
    "HubSnapshot",
    "fetch",
    "list_repository",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "surgery.hub.download": ["HubSnapshot", "fetch", "list_repository"],
    },
)
