"""Where this program keeps what it can make again: SURGERY_CACHE, else `surgery` in the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return the path of the folder `name` in our cache. It may not be there yet."""
    own, shared = os.environ.get("SURGERY_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser() / name
    return (Path(shared) if shared else Path.home() / ".cache") / "surgery" / name
