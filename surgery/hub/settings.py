"""Which Hub is asked, whether it may be, and where what it sent is kept, by the environment as it is at each call."""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT_ENDPOINT = "https://huggingface.co"


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask the Hub, now or when huggingface_hub was imported."""
    from huggingface_hub import constants

    # The constant is what the variable said when huggingface_hub was imported.
    return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in (
        "1",
        "ON",
        "YES",
        "TRUE",
    )


def endpoint() -> str:
    """The Hub's address, without a slash at its end."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or DEFAULT_ENDPOINT


def cache() -> Path:
    """The folder that everything fetched is kept in."""
    from huggingface_hub import constants

    named = os.environ.get("HF_HUB_CACHE")
    if not named and (home := os.environ.get("HF_HOME")):
        named = f"{home}/hub"
    return Path(os.path.expandvars(named or constants.HF_HUB_CACHE)).expanduser().absolute()


def timeout() -> float:
    """Seconds that a question to the Hub may take."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_ETAG_TIMEOUT)
