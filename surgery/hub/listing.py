"""Check the listings of files that a Hub answers with, before anybody follows a name or takes a number in them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError
from surgery.hub.errors import RefusedAnswerError
from surgery.io.json_io import check_json_size

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_MAX_BYTES = 1 << 62  # no disk is as large
_GIT_HASH = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHOWN = 80  # characters of a name that a message repeats
_CHECK_ADDRESS = "Check HF_ENDPOINT."
_ASK_AUTHOR = "Such a repository is not fetched: tell its author, or check HF_ENDPOINT."


@dataclass(frozen=True)
class ListedFile:
    """A file as the listing has it: its path, bytes and hashes. None: the listing does not say.

    sha256: of large files, which are kept outside git. git_sha1: git's hash of all others.
    """

    name: str
    size: int | None
    sha256: str | None
    git_sha1: str | None

    @classmethod
    def of(cls, file: RepoSibling) -> ListedFile:
        """Return `file`, which was checked when it arrived, as what we need of it."""
        # The git hash of a large file is that of the pointer to it.
        return cls(file.rfilename, file.size, file.lfs.sha256 if file.lfs else None, None if file.lfs else file.blob_id)


def check_listing(content: bytes, path: str) -> None:
    """Raise RefusedAnswerError where the answer `content` is a listing of files that no repository can have.

    What is no JSON at all passes: huggingface_hub finds that by itself.

    Args:
        path: of the request, by which listings of commits and of folders are told from all other answers.
    """
    try:
        check_json_size(content, where="listing")
        value = json.loads(content)
    except SurgeryError as error:
        raise RefusedAnswerError(f"the Hub's answer {error.what}", _CHECK_ADDRESS) from error
    except RecursionError as error:
        raise RefusedAnswerError("the Hub's answer is nested too deeply", _CHECK_ADDRESS) from error
    except ValueError:
        return
    if "/tree/" in path:
        _check_entries(value, "path")
    elif isinstance(value, dict) and "siblings" in value:
        _check_commit(value.get("sha"))
        _check_entries([] if value["siblings"] is None else value["siblings"], "rfilename")


def _check_commit(commit: object) -> None:
    if not isinstance(commit, str) or not _GIT_HASH.fullmatch(commit):
        raise RefusedAnswerError(f"the Hub names {_quoted(commit)} as its commit, which cannot be", _CHECK_ADDRESS)


def _check_entries(entries: object, key: str) -> None:
    if not isinstance(entries, list):
        raise _damaged("is no list of files")
    seen: set[str] = set()
    for entry in entries:
        if not isinstance(entry, dict):
            raise _damaged(f"has {_quoted(entry)} for a file")
        name = entry.get(key)
        _check_name(name)
        assert isinstance(name, str)
        if name in seen:
            raise _damaged(f"has the file {_quoted(name)} twice")
        seen.add(name)
        _check_size(entry.get("size"), name)
        for hash_key in ("blobId", "oid"):
            _check_hash(entry.get(hash_key), _GIT_HASH, name)
        if (large := entry.get("lfs")) is not None:
            _check_large(large, name)


def _check_large(large: object, name: str) -> None:
    if not isinstance(large, Mapping):
        raise _damaged(f"has {_quoted(large)} for the storage of {_quoted(name)}")
    for key in ("sha256", "oid"):
        _check_hash(large.get(key), _SHA256, name)
    for key in ("size", "pointerSize"):
        _check_size(large.get(key), name)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise _damaged(f"has {_quoted(name)} for a file's name")
    # Both separators, and drives: what leads outside on any system is no file of a repository.
    parts = re.split(r"[/\\]", name)
    if any(part in ("", ".", "..") for part in parts) or re.match(r"[A-Za-z]:", name):
        raise RefusedAnswerError(f"lists a file outside of the repository: {_quoted(name)}", _ASK_AUTHOR)
    if not name.isprintable():
        raise RefusedAnswerError(f"lists a file whose name is not printable: {_quoted(name)}", _ASK_AUTHOR)


def _check_size(size: Any, name: str) -> None:
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < _MAX_BYTES):
        raise _damaged(f"gives {_quoted(size)} as the size of {_quoted(name)}")


def _check_hash(value: object, form: re.Pattern[str], name: str) -> None:
    if value is not None and not (isinstance(value, str) and form.fullmatch(value)):
        raise _damaged(f"gives {_quoted(value)} as the hash of {_quoted(name)}")


def _damaged(what: str) -> RefusedAnswerError:
    return RefusedAnswerError(f"the Hub's listing {what}", _CHECK_ADDRESS)


def _quoted(value: object) -> str:
    text = ascii(value) if isinstance(value, str) else str(type(value).__name__ if value else value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        text = repr(value) if isinstance(value, float) or abs(value) < 1 << 70 else "a huge number"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
