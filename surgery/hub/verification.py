"""Check downloaded files against the Hub's hashes, before anybody reads them.

The Hub says a file's hash twice: in the listing of its commit, and as the name of its blob in the cache, which is the
answer's ETag: SHA-256 of large files, git's SHA-1 of all others. A file must agree with each. Since the blob's name
stays, copies are checked offline too, and those that other programs fetched.

Hashing reads every byte, so what was checked is recorded in our own cache, with the file's size, inode and times. The
time of change is among them, which nobody can set back.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError, listing
from surgery.hub.errors import Repository
from surgery.hub.listing import ListedFile
from surgery.io.atomic import write_file
from surgery.io.hashing import hash_text
from surgery.io.input_files import open_regular
from surgery.io.json_io import read_json
from surgery.io.private_files import FILE_MODE, make_private_folder
from surgery.io.safe_paths import contained_file
from surgery.runtime.cache_folder import cache_folder
from surgery.runtime.progress import Progress, silent, terminal

SHA256, GIT_SHA1 = "SHA-256", "git SHA-1"
MAX_WORKERS = 8  # files hashed at a time: one is hashed at 1 to 2 GB/s, so that more would only wait for the disk
_BUFFER = 4 << 20  # bytes read at a time
_SHOWN_FROM = 2_000_000_000  # bytes of which hashing takes seconds, so that people are shown how far it is
_FORMS = {64: SHA256, 40: GIT_SHA1}  # hex digits → what hash has as many
_ANEW = "What was wrong is removed: run the same command again to fetch it anew."
_HEX = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True)
class _Job:
    """One file to hash. `wanted`: kind of hash → its value."""

    name: str
    path: Path
    wanted: Mapping[str, str]
    stat: tuple[int, ...]


def verify_files(folder: Path, files: Sequence[ListedFile], repository: Repository, *, progress: bool = False) -> None:
    """Check `files` of the snapshot `folder` against their hashes; a wrong copy is removed from the cache.

    Args:
        repository: the `where` of errors.
        progress: whether a bar is drawn where there are gigabytes to hash.

    Raises:
        SurgeryError: a file has another size or hash than the Hub says, or no hash of it is known; it lies outside of
            the cache, or cannot be read.
    """
    records = _Records(folder)
    # All are looked at before the first is hashed: what is wrong with names and sizes shows at once.
    jobs = [job for file in files if (job := _job(folder, file, records, repository))]
    wrong: list[str] = []
    for job, found in _hashed(jobs, terminal if progress else silent):
        bad = next((kind for kind, value in job.wanted.items() if found[kind] != value), None)
        if bad is None:
            records.add(job, found)
            continue
        wrong.append(f"{job.name} has {bad} {found[bad]}, expected {job.wanted[bad]}")
        _remove(job.path)
    records.write()
    if wrong:
        raise SurgeryError(
            f"the cache holds other bytes than the Hub lists: {listing(wrong, 3)}",
            where=repository,
            hint=_ANEW,
        )


def _job(folder: Path, file: ListedFile, records: _Records, repository: Repository) -> _Job | None:
    """Return what is to be hashed of `file`; None where that was done before."""
    path = contained_file(folder, file.name)
    wanted = _wanted(path, file, repository)
    job = _Job(file.name, path, wanted, _identity(path.stat()))
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        _remove(path)
        raise SurgeryError(
            f"{file.name} has {size:,} bytes, expected {file.size:,}",
            where=repository,
            hint=_ANEW,
        )
    if records.has(job):
        return None
    if not wanted:
        raise SurgeryError(
            f"no hash of {file.name} is known, so that it cannot be checked",
            where=repository,
            hint="Run the command once without HF_HUB_OFFLINE; if the Hub itself gives no hashes, check HF_ENDPOINT.",
        )
    return job


def _wanted(path: Path, file: ListedFile, repository: Repository) -> dict[str, str]:
    """Return each kind of hash that `file` must have, by the listing and by the name of its blob."""
    listed = {SHA256: file.sha256, GIT_SHA1: file.git_sha1}
    wanted = {kind: value for kind, value in listed.items() if value}
    # The first link's: a blob may itself be a link to one that repositories share, whose name is another hash.
    blob = path.readlink().name if path.is_symlink() else ""
    kind = _FORMS.get(len(blob)) if _HEX.fullmatch(blob) else None
    if kind is None:
        return wanted
    if wanted.get(kind, blob) != blob:
        _remove(path)
        raise SurgeryError(
            f"the Hub says two hashes of {file.name}: {wanted[kind]} in its listing, and {blob} with the file",
            where=repository,
            hint="It was not used, and is removed. Check HF_ENDPOINT, and try again later.",
        )
    return wanted | {kind: blob}


def _hashed(jobs: Sequence[_Job], progress: Progress) -> Iterator[tuple[_Job, dict[str, str]]]:
    """Yield each job with the hashes of its file."""
    total = sum(job.stat[0] for job in jobs)
    shown = progress if total >= _SHOWN_FROM else silent
    stopped, lock = threading.Event(), threading.Lock()
    workers = min(MAX_WORKERS, os.cpu_count() or 1, len(jobs) or 1)
    with shown("Checking", total) as advance, ThreadPoolExecutor(workers) as pool:

        def count(amount: int) -> None:
            with lock:
                advance(amount)

        try:
            yield from zip(jobs, pool.map(lambda job: _hashes(job, count, stopped), jobs), strict=True)
        finally:
            # After Ctrl-C or an error: leaving the pool would wait until all files are read.
            stopped.set()
            pool.shutdown(cancel_futures=True)


def _hashes(job: _Job, advance: Callable[[int], None], stopped: threading.Event) -> dict[str, str]:
    # As git hashes a file: behind a header with its size.
    header = f"blob {job.stat[0]}\0".encode()
    start = {SHA256: lambda: hashlib.sha256(), GIT_SHA1: lambda: hashlib.sha1(header, usedforsecurity=False)}
    hashes = {kind: start[kind]() for kind in job.wanted}
    buffer = bytearray(_BUFFER)
    with open_regular(job.path) as file:
        while not stopped.is_set() and (count := file.readinto(buffer)):  # type: ignore[attr-defined]
            for each in hashes.values():
                each.update(memoryview(buffer)[:count])
            advance(count)
    return {kind: each.hexdigest() for kind, each in hashes.items()}


def _remove(path: Path) -> None:
    """Remove a wrong file from the cache with all links to it on the way, so that it is fetched anew.

    Raises:
        SurgeryError: it cannot be removed.
    """
    try:
        while path.is_symlink():
            target = path.parent / path.readlink()
            path.unlink()
            path = target
        path.unlink(missing_ok=True)
    except OSError as error:
        raise SurgeryError(
            f"has other bytes than the Hub lists, and cannot be removed ({error.strerror})",
            where=path,
            hint="Remove it, then run the same command again.",
        ) from error


class _Records:
    """What was checked of one repository in the cache: real path → identity and hashes of the file."""

    def __init__(self, folder: Path) -> None:
        self._path = cache_folder("hub") / f"{hash_text(str(folder.parent.parent.resolve()))}.json"
        self._files: dict[str, Any] = {}
        self._changed = False
        # Damaged, or of another version: then all is checked again.
        with suppress(SurgeryError):
            self._files = read_json(self._path, missing={})

    def has(self, job: _Job) -> bool:
        """Return whether the file of `job`, as it is now, was found to have the hashes wanted."""
        record = self._files.get(str(job.path.resolve()))
        if not isinstance(record, dict) or record.get("stat") != list(job.stat):
            return False
        known = record.get("hashes")
        return isinstance(known, dict) and bool(known) and known.items() >= job.wanted.items()

    def add(self, job: _Job, hashes: Mapping[str, str]) -> None:
        """Note that the file of `job` has `hashes`, if it is still the one that was hashed."""
        if _identity(job.path.stat()) == job.stat:
            self._files[str(job.path.resolve())] = {"stat": list(job.stat), "hashes": dict(hashes)}
            self._changed = True

    def write(self) -> None:
        """Write what was added. Where our cache cannot be written, the files are hashed again next time."""
        if not self._changed:
            return
        with suppress(OSError, SurgeryError):
            make_private_folder(self._path.parent)
            kept = {path: record for path, record in self._files.items() if Path(path).exists()}
            write_file(self._path, json.dumps(kept)).chmod(FILE_MODE)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns
