"""Fetch repositories from the Hub: `org/name[@revision]` → a folder in the cache, pinned to one commit.

Every file is checked against the Hub's hash of it before its folder is returned (`surgery.hub.verification`).

`huggingface_hub` is imported inside the functions, or every command, `--help` too, would wait for it.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import SurgeryError, usage_error
from surgery.hub.arrival import show_arrival
from surgery.hub.client import guarded, own_blobs, quiet_client
from surgery.hub.errors import UnreachableError, cache_error, no_space_error, translate_errors
from surgery.hub.file_selection import DUPLICATES, MODEL_FILES, WEIGHTS_SUFFIX, select_files
from surgery.hub.listing import ListedFile
from surgery.hub.settings import cache_dir, endpoint, is_offline, request_timeout
from surgery.hub.verification import verify_files
from surgery.io.atomic import write_file
from surgery.io.input_files import read_utf8
from surgery.io.private_files import FOLDER_MODE
from surgery.io.safe_paths import list_folder, safe_relative_path
from surgery.runtime.progress import writes_lines
from surgery.runtime.terminal import library_bars

_BARS_ANYWHERE = "TQDM_POSITION"  # huggingface_hub's: -1 asks for bars without a terminal
MAX_ID_LENGTH = 96  # the Hub's own limit

_REPO_ID = re.compile(r"\w[\w.-]*/[\w.-]*\w", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Characters that git allows in the name of a branch or tag; no leading slash, or it would be an absolute path.
_REVISION = re.compile(r"[^\s/~^:?*\[\\@\x00-\x1f][^\s~^:?*\[\\\x00-\x1f]*")


@dataclass(frozen=True)
class HubSnapshot:
    """A repository at one commit, on disk. `revision` is the commit's hash, 40 hex digits."""

    folder: Path
    repo_id: str
    revision: str


def is_repo_id(text: str) -> bool:
    """Return whether `text` has the form `org/name[@revision]`, without asking the Hub."""
    repo_id, _, _ = text.partition("@")
    if text.endswith("@") or len(repo_id) > MAX_ID_LENGTH or not _REPO_ID.fullmatch(repo_id):
        return False
    # The Hub's own rules: "--" separates org and name in the cache's folder names.
    return not any(wrong in repo_id for wrong in ("--", "..")) and not repo_id.endswith(".git")


def parse_repo_ref(text: str) -> tuple[str, str | None]:
    """Split `org/name[@revision]` into (repository, revision or None for its default branch).

    Raises:
        SurgeryError: `text` has another form, or no branch, tag or commit can have that name.
    """
    if not is_repo_id(text):
        raise usage_error(f"got {text!r}, expected org/name or org/name@revision", where="Hub id")
    repo_id, _, revision = text.partition("@")
    check_revision(repo_id, revision or None)
    return repo_id, revision or None


def check_revision(repo_id: str, revision: str | None) -> None:
    """Raise SurgeryError where no branch, tag or commit can have the name `revision`."""
    # The cache keeps refs/<revision> as a path: a revision with ".." would be read outside it.
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise usage_error(
            f"revision {revision!r} cannot be a branch, tag or commit",
            where=repo_id,
            hint="Give the name as the model's page shows it, e.g. main.",
        )


def fetch(
    repo_id: str, revision: str | None = None, *, patterns: Sequence[str] | None = None, progress: bool = True
) -> HubSnapshot:
    """Download what the Hub's cache lacks of `repo_id` at `revision`, and return where it is.

    Under HF_HUB_OFFLINE=1 nothing is asked of the Hub and the cached copy is returned. A commit that is
    already cached is returned too when the Hub cannot be reached; for a branch or tag that would hide newer
    weights, and is an error. HF_ENDPOINT, HF_HUB_CACHE and HF_HOME are read at each call.

    Args:
        revision: a branch, tag or commit; None for the default branch.
        patterns: the files to fetch instead, when no weights are needed; in folders only chat templates.
        progress: whether to show how much has arrived: by huggingface_hub's bars on a terminal, else in lines.

    Raises:
        SurgeryError: no such repository or revision, no access, no connection, no safetensors (with `patterns`:
            no such file), no space; a file is not what the Hub lists.
    """
    ref = _checked_ref(repo_id, revision, None if patterns is None else tuple(patterns))
    if is_offline():
        return _verified(ref, _cached_snapshot(ref), progress)
    try:
        return _download(ref, progress)
    except UnreachableError:
        if ref.is_pinned and (snapshot := _find_cached(ref)):
            return _verified(ref, snapshot, progress)
        raise


@dataclass(frozen=True)
class RepositoryListing:
    """Sizes of a repository at one commit, in bytes, read from its listing.

    weight_bytes: of the weights that would be fetched. missing_bytes: of all that would be, and is not cached yet.
    """

    repo_id: str
    revision: str
    weight_bytes: int
    missing_bytes: int


def list_repository(repo_id: str, revision: str | None = None) -> RepositoryListing:
    """Return how much `fetch` would download; offline, what is in the cache. Raises SurgeryError as `fetch`."""
    ref = _checked_ref(repo_id, revision)
    if is_offline():
        snapshot = _cached_snapshot(ref)
        names = select_files([path.name for path in snapshot.folder.iterdir()], ref)
        weights = sum((snapshot.folder / name).stat().st_size for name in names if name.endswith(WEIGHTS_SUFFIX))
        return RepositoryListing(repo_id, snapshot.revision, weights, 0)
    remote = _list_remote(ref)
    weights = sum(file.size or 0 for file in remote.files if file.name.endswith(WEIGHTS_SUFFIX))
    return RepositoryListing(repo_id, remote.commit, weights, _missing_bytes(ref, remote))


@dataclass(frozen=True)
class _SnapshotRef:
    """A repository, a revision and file patterns, as given to `fetch`; its text is the `where` of errors."""

    repo_id: str
    revision: str | None
    patterns: tuple[str, ...] | None = None

    @property
    def is_pinned(self) -> bool:
        return bool(self.revision and _COMMIT.fullmatch(self.revision))

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id


def _checked_ref(repo_id: str, revision: str | None, patterns: tuple[str, ...] | None = None) -> _SnapshotRef:
    if not is_repo_id(repo_id) or "@" in repo_id:
        raise usage_error(f"got {repo_id!r}, expected org/name", where="Hub id")
    check_revision(repo_id, revision)
    return _SnapshotRef(repo_id, revision, patterns)


@dataclass(frozen=True)
class _Remote:
    """What the Hub says of a repository: its commit, the files of it to fetch, and whether it is private."""

    commit: str
    files: tuple[ListedFile, ...]
    private: bool


def _download(ref: _SnapshotRef, progress: bool) -> HubSnapshot:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    # A class, because huggingface_hub can switch its bars off only for the whole process.
    class Silent(tqdm):
        # Without it each of these classes starts a thread that watches its bars, and never ends.
        monitor_interval = 0

        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

    remote = _list_remote(ref)
    _check_space(ref, remote)
    _create_cache(ref, remote)
    sizes = [file.size for file in remote.files]
    limits = guarded(largest_file=None if None in sizes else max(filter(None, sizes), default=0))
    blobs = own_blobs() if remote.private else nullcontext()
    # In a log the client's bars are one long line.
    lines = progress and writes_lines() and os.environ.get(_BARS_ANYWHERE) != "-1"
    arrival = (
        show_arrival(ref.repo_id, _missing_bytes(ref, remote), _repository_folder(ref)) if lines else nullcontext()
    )
    with _hub_request(ref), limits, blobs, arrival, library_bars() if progress else nullcontext():
        folder = Path(
            snapshot_download(
                ref.repo_id,
                # Not the branch, which may have moved since it was listed.
                revision=remote.commit,
                cache_dir=cache_dir(),
                endpoint=endpoint(),
                # A file may be called model[1].safetensors, which as a pattern would match another name.
                allow_patterns=[glob.escape(file.name) for file in remote.files],
                tqdm_class=None if progress and not lines else Silent,
            )
        )
    verify_files(folder, remote.files, ref, progress=progress)
    _write_ref(ref, remote.commit)
    return HubSnapshot(folder, ref.repo_id, remote.commit)


def _write_ref(ref: _SnapshotRef, commit: str) -> None:
    """Note which commit the branch names, by which it is found offline: once it is whole, never before."""
    path = _repository_folder(ref) / "refs" / (ref.revision or "main")
    if ref.is_pinned or (path.is_file() and read_utf8(path, limit=MAX_ID_LENGTH) == commit):
        return
    # A cache that is complete may be read-only; that the branch is not found in it offline is told then.
    with suppress(SurgeryError):
        write_file(path, commit)


def _list_remote(ref: _SnapshotRef) -> _Remote:
    """Ask the Hub for the commit that `ref` names and for its files, and select those to fetch."""
    from huggingface_hub import HfApi

    with _hub_request(ref), guarded():
        info = HfApi(endpoint=endpoint()).model_info(
            ref.repo_id, revision=ref.revision, files_metadata=True, timeout=request_timeout()
        )
        files = {file.rfilename: ListedFile.of(file) for file in info.siblings or []}
    commit = info.sha or ""
    # It becomes a folder's name.
    if not _COMMIT.fullmatch(commit) or (ref.is_pinned and commit != ref.revision):
        expected = ref.revision if ref.is_pinned else "40 hex digits"
        what = f"the Hub names {commit[:50]!r} as its commit, expected {expected}"
        raise SurgeryError(what, where=ref, hint="Check HF_ENDPOINT.")
    names = select_files(list(files), ref, ref.patterns)
    for name in names:
        safe_relative_path(name, where=ref)
    return _Remote(commit, tuple(files[name] for name in names), bool(info.private))


def _missing_bytes(ref: _SnapshotRef, remote: _Remote) -> int:
    """Return the bytes of those files of a commit that are not in the cache."""
    folder = _repository_folder(ref)
    snapshot = folder / "snapshots" / remote.commit
    # Of another commit's files those that are the same have come already: a blob is called by its hash.
    there = {path.name for path in list_folder(folder / "blobs")} if (folder / "blobs").is_dir() else set()
    missing = (file for file in remote.files if not (snapshot / file.name).exists())
    return sum(file.size or 0 for file in missing if (file.sha256 or file.git_sha1) not in there)


def _repository_folder(ref: _SnapshotRef) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return cache_dir() / repo_folder_name(repo_id=ref.repo_id, repo_type="model")


def _create_cache(ref: _SnapshotRef, remote: _Remote) -> None:
    """Create the cache and, of a private model, its folder in it, so that only their owner may read them.

    What is there already stays as it is: its owner may have wanted to share it.
    """
    try:
        cache_dir().mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        if remote.private:
            _repository_folder(ref).mkdir(mode=FOLDER_MODE, exist_ok=True)
    except OSError as error:
        raise cache_error(error, ref) from error


def _check_space(ref: _SnapshotRef, remote: _Remote) -> None:
    folder = cache_dir()
    needed = _missing_bytes(ref, remote)
    # The cache's folder is made by the first download; its disk is that of the nearest folder that is there.
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise no_space_error(f"needs {needed:,} bytes in the cache at {folder}, where {free:,} are free", ref)


@contextmanager
def _hub_request(ref: _SnapshotRef) -> Iterator[None]:
    """Translate errors of the block; where the Hub cannot be reached, name the cached copy that could be used."""
    try:
        with quiet_client(), translate_errors(ref):
            yield
    except UnreachableError as error:
        if copy := _find_cached(ref):
            hint = f"Set HF_HUB_OFFLINE=1 to use the copy in your cache, of commit {copy.revision}."
            raise UnreachableError(error.what, where=ref, hint=hint) from error.__cause__
        raise


def _cached_snapshot(ref: _SnapshotRef) -> HubSnapshot:
    snapshot = _find_cached(ref)
    if snapshot is None:
        raise SurgeryError(
            f"no complete copy in the cache at {cache_dir()}, and offline mode is on",
            where=ref,
            hint="Unset HF_HUB_OFFLINE once, so that it can be downloaded.",
        )
    return snapshot


def _verified(ref: _SnapshotRef, snapshot: HubSnapshot, progress: bool) -> HubSnapshot:
    """Return `snapshot`, each file of which that `fetch` would download was checked."""
    folder = snapshot.folder
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    names = select_files(found, ref, ref.patterns)
    verify_files(folder, [ListedFile(name, None, None, None) for name in names], ref, progress=progress)
    return snapshot


def _find_cached(ref: _SnapshotRef) -> HubSnapshot | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                ref.repo_id,
                revision=ref.revision,
                cache_dir=cache_dir(),
                local_files_only=True,
                # With these, huggingface_hub tells from its listing of the commit whether a file is missing.
                allow_patterns=list(ref.patterns or MODEL_FILES),
                ignore_patterns=["*/*", DUPLICATES],
            )
        )
    except LocalEntryNotFoundError:
        return None
    # Without that listing (a cache filled by other programs) the folder may hold as little as a config.
    needed = ref.patterns or (f"*{WEIGHTS_SUFFIX}",)
    is_complete = any(path for pattern in needed for path in folder.glob(pattern))
    return HubSnapshot(folder, ref.repo_id, folder.name) if is_complete else None
