"""Keep the user's Hub tokens, and passwords in addresses, out of every text that leaves the program.

What a server, a library or a traceback says may quote them. So texts pass through `redact` where they leave: by
the functions that escape texts for terminals, logs, cards, pages, JSON and YAML (`surgery.io.escaping`), and by those
that write text files. Nothing is asked of the Hub; a token that is neither set nor stored is known by its looks only.
"""

from __future__ import annotations

import base64
import os
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

SHOWN = "hf_…"  # what stands in the place of a token
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_ADDRESSES = ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
_MIN_LENGTH = 8  # characters; to replace a shorter word everywhere would garble texts, and protect nothing
_MAX_STORED = 1_000_000  # bytes of the files with stored tokens, which have some hundred
# What is a token by its looks, whosever it is: the Hub's own have 34 characters behind the prefix.
_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}")
_CREDENTIALS = re.compile(r"(\b[a-z][a-z0-9+.-]{1,20}://)[^\s/@:?#\"']*:[^\s/@\"']*@", re.IGNORECASE)


def redact(text: str) -> str:
    """Return `text` with `hf_…` for each Hub token in it, and without user and password in addresses."""
    for secret in _secrets():
        text = text.replace(secret, SHOWN)
    # Looked for first, since the patterns are slow on the texts of megabytes that have neither.
    if "hf_" in text or "api_org_" in text:
        text = _TOKEN.sub(SHOWN, text)
    return _CREDENTIALS.sub(r"\1…@", text) if "://" in text and "@" in text else text


def holds_secret(text: str) -> bool:
    """Return whether `text` holds a token or password that the user has set or stored."""
    return any(secret in text for secret in _secrets())


def _secrets() -> tuple[str, ...]:
    """Return all texts to hide, longest first: of two tokens one may begin with the other."""
    environment = tuple(os.environ.get(name, "") for name in (*_VARIABLES, *_ADDRESSES))
    return _known_secrets(environment, tuple(_version(path) for path in _token_files()))


@lru_cache(maxsize=8)
def _known_secrets(environment: tuple[str, ...], files: tuple[tuple[Path, int], ...]) -> tuple[str, ...]:
    found = {value.strip() for value in environment[: len(_VARIABLES)]}
    for address in environment[len(_VARIABLES) :]:
        parts = urlsplit(address)
        if parts.password:
            both = f"{unquote(parts.username or '')}:{unquote(parts.password)}"
            # As it stands in the address, and as it is sent.
            found |= {parts.password, unquote(parts.password), base64.b64encode(both.encode()).decode()}
    for path, version in files:
        found |= set() if version < 0 else set(_stored_tokens(path))
    found |= {quote(secret, safe="") for secret in found}
    return tuple(sorted((each for each in found if len(each) >= _MIN_LENGTH), key=lambda each: (-len(each), each)))


def _token_files() -> list[Path]:
    """Return where huggingface_hub keeps the token in use, and those of other logins; it need not be imported."""
    constants: Any = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        token = Path(constants.HF_TOKEN_PATH)
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
        token = Path(os.path.expandvars(os.environ.get("HF_TOKEN_PATH") or f"{home}/token")).expanduser()
    return [token, token.with_name("stored_tokens")]


def _version(path: Path) -> tuple[Path, int]:
    try:
        return path, path.stat().st_mtime_ns
    except (OSError, ValueError):
        return path, -1


def _stored_tokens(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_STORED).decode(errors="replace")
    except OSError:
        return []
    # The one file holds a token, the other lines such as `hf_token = …` below the names of logins.
    return [line.partition("=")[2].strip() if " = " in line else line.strip() for line in text.splitlines()]
