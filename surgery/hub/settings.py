"""Hub settings read from the environment at each call: address, offline mode, cache folder, request timeout."""

from __future__ import annotations

import os
from pathlib import Path

from surgery.io.redaction import redact

DEFAULT_ENDPOINT = "https://huggingface.co"


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE is set, now or when huggingface_hub was imported."""
    from huggingface_hub import constants

    # huggingface_hub reads the variable once, at its import, and refuses every request by that value: setting the
    # variable later must count too, but unsetting it later cannot help.
    return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in (
        "1",
        "ON",
        "YES",
        "TRUE",
    )


def endpoint() -> str:
    """Return the Hub's address, without a slash at its end."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or DEFAULT_ENDPOINT


def shown_endpoint() -> str:
    """Return the Hub's address for messages: without the user and password that it may hold."""
    return redact(endpoint())


def cache_dir() -> Path:
    """Return the absolute path of the Hub cache: HF_HUB_CACHE, else HF_HOME/hub, else the client's default."""
    from huggingface_hub import constants

    named = os.environ.get("HF_HUB_CACHE")
    if not named and (home := os.environ.get("HF_HOME")):
        named = f"{home}/hub"
    return Path(os.path.expandvars(named or constants.HF_HUB_CACHE)).expanduser().absolute()


def request_timeout() -> float:
    """Return the seconds that a metadata request to the Hub may take (HF_HUB_ETAG_TIMEOUT)."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_ETAG_TIMEOUT)
