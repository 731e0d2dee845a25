"""Upload results to the Hub with completed model cards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from surgery.publish.upload import preview_push, push
    from surgery.publish.upload_session import PushResult

__all__ = [
    "PushResult",
    "preview_push",
    "push",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "surgery.publish.upload": ["preview_push", "push"],
        "surgery.publish.upload_session": ["PushResult"],
    },
)
