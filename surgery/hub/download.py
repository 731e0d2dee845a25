"""Reading from the Hub: `org/name[@revision]` → a folder in the cache, pinned to one commit.

Only what the weights need to be read and used is fetched: safetensors, JSON, tokenizer and chat-template
files at the top of the repository; or only the files asked for. `huggingface_hub` is imported inside the functions,
or every command, `--help` too, would wait for it.
"""

from __future__ import annotations

import glob
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import SurgeryError, listing, usage_error
from surgery.hub.errors import UnreachableError, no_space, translate_errors
from surgery.hub.settings import cache, endpoint, is_offline, timeout

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling


# *.safetensors.index.json is among *.json; *.txt is for merges.txt and vocab.txt, *.model for sentencepiece.
ALLOWED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja")
# The one folder that tokenizers read from. All others hold copies: original/, onnx/, training checkpoints.
TEMPLATES = "additional_chat_templates"
# What a logit ensemble keeps of its members besides their weights, to give them back as they were.
MEMBERS = "members"
MEMBER_FILES = (*(pattern for pattern in ALLOWED if pattern != "*.safetensors"), "*.md", "LICENSE*", "NOTICE*")
# Mistral's own format, beside the same weights as model-0000k-of-n.safetensors.
DUPLICATES = "consolidated*"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = ".safetensors"

MAX_ID_LENGTH = 96  # the Hub's own limit

_REPO_ID = re.compile(r"\w[\w.-]*/[\w.-]*\w", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[^\s/~^:?*\[\\@\x00-\x1f][^\s~^:?*\[\\\x00-\x1f]*")


@dataclass(frozen=True)
class HubSnapshot:
    """A repository at one commit, on disk. `revision` is the commit's hash, 40 hex digits."""

    folder: Path
    repo_id: str
    revision: str


def is_repo_id(text: str) -> bool:
    """Whether `text` has the shape `org/name[@revision]`; the Hub is not asked."""
    repo_id, _, _ = text.partition("@")
    if text.endswith("@") or len(repo_id) > MAX_ID_LENGTH or not _REPO_ID.fullmatch(repo_id):
        return False
    return not any(wrong in repo_id for wrong in ("--", "..")) and not repo_id.endswith(".git")


def parse_repo_ref(text: str) -> tuple[str, str | None]:
    """`org/name[@revision]` → (repository, revision or None for its default branch).

    Raises:
        SurgeryError: the shape is another, or no branch, tag or commit can have that name.
    """
    if not is_repo_id(text):
        raise usage_error(f"got {text!r}, expected org/name or org/name@revision", where="Hub id")
    repo_id, _, revision = text.partition("@")
    check_revision(repo_id, revision or None)
    return repo_id, revision or None


def fetch(
    repo_id: str, revision: str | None = None, *, only: Sequence[str] | None = None, progress: bool = True
) -> HubSnapshot:
    """Downloads what is missing of `repo_id` at `revision` into the Hub's cache, and says where it lies.

    Under HF_HUB_OFFLINE=1 nothing is asked of the Hub and the cached copy is returned. A commit that is
    already cached is returned too when the Hub cannot be reached; for a branch or tag that would hide newer
    weights, and is an error. HF_ENDPOINT, HF_HUB_CACHE and HF_HOME are read at each call.

    Args:
        revision: a branch, tag or commit; None for the default branch.
        only: patterns of the files to fetch instead, when no weights are needed; in folders only chat templates.
        progress: whether huggingface_hub draws its bars on stderr.

    Raises:
        SurgeryError: no such repository or revision, no access, no connection, no safetensors (with `only`: no
            such file), no space.
    """
    if not is_repo_id(repo_id) or "@" in repo_id:
        raise usage_error(f"got {repo_id!r}, expected org/name", where="Hub id")
    check_revision(repo_id, revision)
    ref = _Ref(repo_id, revision, None if only is None else tuple(only))
    if is_offline():
        return _cached(ref)
    try:
        return _download(ref, progress)
    except UnreachableError:
        if ref.is_pinned and (snapshot := _find_cached(ref)):
            return snapshot
        raise


@dataclass(frozen=True)
class RepositoryListing:
    """A repository at one commit, by its listing: bytes of the weights that would be fetched, and of all that is not in
    the cache yet."""

    repo_id: str
    revision: str
    weights: int
    missing: int


def list_repository(repo_id: str, revision: str | None = None) -> RepositoryListing:
    """What `fetch` would download, without doing so; offline, what is in the cache. Raises SurgeryError as `fetch`."""
    if not is_repo_id(repo_id) or "@" in repo_id:
        raise usage_error(f"got {repo_id!r}, expected org/name", where="Hub id")
    check_revision(repo_id, revision)
    ref = _Ref(repo_id, revision)
    if is_offline():
        snapshot = _cached(ref)
        names = _wanted([path.name for path in snapshot.folder.iterdir()], ref)
        weights = sum((snapshot.folder / name).stat().st_size for name in names if name.endswith(WEIGHTS))
        return RepositoryListing(repo_id, snapshot.revision, weights, 0)
    from huggingface_hub import HfApi

    with _asking(ref):
        info = HfApi(endpoint=endpoint()).model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout())
        files = info.siblings or []
        names = _wanted([file.rfilename for file in files], ref)
        wanted = [file for file in files if file.rfilename in names]
        weights = sum(file.size or 0 for file in wanted if file.rfilename.endswith(WEIGHTS))
        return RepositoryListing(repo_id, info.sha or "", weights, _missing(ref, info.sha or "", wanted))


@dataclass(frozen=True)
class _Ref:
    """What is asked for; `only` as in `fetch`."""

    repo_id: str
    revision: str | None
    only: tuple[str, ...] | None = None

    @property
    def is_pinned(self) -> bool:
        return bool(self.revision and _COMMIT.fullmatch(self.revision))

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id


def check_revision(repo_id: str, revision: str | None) -> None:
    """Raises SurgeryError where no branch, tag or commit can have the name `revision`."""
    # The cache keeps refs/<revision> as a path: a revision with ".." would be read outside it.
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise usage_error(
            f"revision {revision!r} cannot be a branch, tag or commit",
            where=repo_id,
            hint="Give the name as the model's page shows it, e.g. main.",
        )


def _download(ref: _Ref, progress: bool) -> HubSnapshot:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

    with _asking(ref):
        info = HfApi(endpoint=endpoint()).model_info(
            ref.repo_id, revision=ref.revision, files_metadata=True, timeout=timeout()
        )
        files = info.siblings or []
        names = _wanted([file.rfilename for file in files], ref)
        _check_space(ref, info.sha or "", [file for file in files if file.rfilename in names])
        folder = Path(
            snapshot_download(
                ref.repo_id,
                revision=ref.revision,
                cache_dir=cache(),
                endpoint=endpoint(),
                allow_patterns=[glob.escape(name) for name in names],
                tqdm_class=None if progress else Silent,
            )
        )
    if folder.name != info.sha:
        raise SurgeryError(
            f"the Hub named commit {info.sha}, but {folder.name} arrived: the branch moved in between",
            where=ref,
            hint="Run the command again.",
        )
    return HubSnapshot(folder, ref.repo_id, folder.name)


def _wanted(names: Sequence[str], ref: _Ref) -> list[str]:
    """The files of a repository to fetch, sorted. Raises SurgeryError where what is needed is not among them."""
    if ref.only is not None:
        near = sorted(name for name in names if name.rpartition("/")[0] in ("", TEMPLATES))
        chosen = [name for name in near if any(fnmatchcase(name, pattern) for pattern in ref.only)]
        if not chosen:
            raise SurgeryError(
                f"has none of the files that are needed among its {len(names)} files ({listing(sorted(names), 5)})",
                where=ref,
            )
        return chosen
    wanted = sorted(name for name in names if _is_allowed(name))
    weights = [name for name in wanted if name.endswith(WEIGHTS)]
    if not weights:
        raise _no_weights(names, ref)
    if all(fnmatchcase(name, DUPLICATES) for name in weights):
        return wanted
    return [name for name in wanted if not fnmatchcase(name, DUPLICATES)]


def _is_allowed(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    if folder == TEMPLATES:
        return file.endswith(".jinja")
    if folder == MEMBERS or folder.startswith(f"{MEMBERS}/"):
        return any(fnmatchcase(file, pattern) for pattern in MEMBER_FILES)
    return not folder and any(fnmatchcase(file, pattern) for pattern in ALLOWED)


def _no_weights(names: Sequence[str], ref: _Ref) -> SurgeryError:
    pickles = sorted(name for name in names if "/" not in name and name.endswith(PICKLES))
    if pickles:
        return SurgeryError(
            f"holds weights only as Python pickles ({listing(pickles, 3)}), which can run code when opened",
            where=ref,
            hint="Look on its page for a pull request that adds safetensors, and give "
            f"{ref.repo_id}@refs/pr/N; or convert it in a throw-away environment, "
            f'AutoModelForCausalLM.from_pretrained("{ref.repo_id}").save_pretrained("DIR"), and give DIR.',
        )
    nested = sorted(name for name in names if name.endswith(WEIGHTS))
    if nested:
        return SurgeryError(
            f"has its .safetensors files only in subfolders ({listing(nested, 3)})",
            where=ref,
            hint="Download the subfolder with `hf download`, and give its path.",
        )
    return SurgeryError(
        f"has no .safetensors file among its {len(names)} files ({listing(sorted(names), 5)})",
        where=ref,
        hint="Give a repository that holds a model's weights.",
    )


def _missing(ref: _Ref, commit: str, files: Sequence[RepoSibling]) -> int:
    """Bytes of those files of a commit that are not in the cache."""
    from huggingface_hub import try_to_load_from_cache

    return sum(
        file.size or 0
        for file in files
        if try_to_load_from_cache(ref.repo_id, file.rfilename, cache_dir=cache(), revision=commit) is None
    )


def _check_space(ref: _Ref, commit: str, files: Sequence[RepoSibling]) -> None:
    folder = cache()
    needed = _missing(ref, commit, files)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise no_space(f"needs {needed:,} bytes in the cache at {folder}, where {free:,} are free", ref)


@contextmanager
def _asking(ref: _Ref) -> Iterator[None]:
    """`translate_errors`, and where the Hub cannot be reached, what the cache has instead."""
    try:
        with translate_errors(ref):
            yield
    except UnreachableError as error:
        if copy := _find_cached(ref):
            hint = f"Set HF_HUB_OFFLINE=1 to use the copy in your cache, of commit {copy.revision}."
            raise UnreachableError(error.what, where=ref, hint=hint) from error.__cause__
        raise


def _cached(ref: _Ref) -> HubSnapshot:
    snapshot = _find_cached(ref)
    if snapshot is None:
        raise SurgeryError(
            f"no complete copy in the cache at {cache()}, and offline mode is on",
            where=ref,
            hint="Unset HF_HUB_OFFLINE once, so that it can be downloaded.",
        )
    return snapshot


def _find_cached(ref: _Ref) -> HubSnapshot | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                ref.repo_id,
                revision=ref.revision,
                cache_dir=cache(),
                local_files_only=True,
                # With these, huggingface_hub tells from its listing of the commit whether a file is missing.
                allow_patterns=list(ref.only or ALLOWED),
                ignore_patterns=["*/*", DUPLICATES],
            )
        )
    except LocalEntryNotFoundError:
        return None
    # Without that listing (a cache filled by other programs) the folder may hold as little as a config.
    needed = ref.only or (f"*{WEIGHTS}",)
    found = any(path for pattern in needed for path in folder.glob(pattern))
    return HubSnapshot(folder, ref.repo_id, folder.name) if found else None
