"""Plan the commit of a push: the files to add and to delete in the repository, and whether it may be pushed to.

`HubDestination` says where a push goes, `RemoteState` what is there already.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import SurgeryError, listing, usage_error
from surgery.hub import download as hub
from surgery.hub.file_selection import CHAT_TEMPLATES, MEMBERS
from surgery.hub.settings import shown_endpoint
from surgery.io.atomic import MANIFEST
from surgery.publish.model_card import HubCard
from surgery.publish.package import CARD, GITATTRIBUTES, UploadPackage
from surgery.publish.privacy import check_may_be_public, input_privacy

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

MAIN = "main"
PULL_REQUESTS = "refs/pr/"
# What models are loaded from. Where an earlier push left such a file and OUT lacks it, it is deleted: loaders would mix
# the two.
LOADER_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    f"{CHAT_TEMPLATES}/*.jinja",
    f"{MEMBERS}/*",
    "donor/*",
    "undo/*",
    "scores.json",
)
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
LFS_MIN_BYTES = 10_000_000  # from this size on the Hub keeps a file outside git, whatever its name
# Kept outside git by their extension: those that the Hub lists in a new repository's .gitattributes, and pictures.
LFS_EXTENSIONS = (
    "7z",
    "arrow",
    "bin",
    "bz2",
    "ckpt",
    "ftz",
    "gz",
    "h5",
    "joblib",
    "mlmodel",
    "model",
    "msgpack",
    "npy",
    "npz",
    "onnx",
    "ot",
    "parquet",
    "pb",
    "pickle",
    "pkl",
    "pt",
    "pth",
    "rar",
    "safetensors",
    "tar",
    "tflite",
    "tgz",
    "wasm",
    "xz",
    "zip",
    "zst",
    "png",
)


@dataclass(frozen=True)
class HubDestination:
    """Where a push goes: `revision` is a branch or refs/pr/N, None for main; `pr` opens a pull request."""

    repo_id: str
    revision: str | None
    pr: bool

    @property
    def branch(self) -> str:
        """The name of the branch."""
        return self.revision or MAIN

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id


@dataclass(frozen=True)
class RemoteState:
    """The repository at `commit`: the names of its files. `is_new`: the branch does not exist yet, and starts there."""

    commit: str
    private: bool
    files: frozenset[str]
    is_new: bool


def parse_destination(repo_id: str, revision: str | None, pr: bool) -> HubDestination:
    """Parse `org/name` and the options of a push. Raise SurgeryError where they are wrong, alone or together."""
    if "@" in repo_id:
        raise usage_error(f"got {repo_id!r}, expected org/name", where="Hub id", hint="Name a branch with --revision.")
    if not hub.is_repo_id(repo_id):
        raise usage_error(f"got {repo_id!r}, expected org/name", where="Hub id")
    hub.check_revision(repo_id, revision)
    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        raise usage_error("is a commit, and commits never change", where=f"{repo_id}@{revision}", hint="Name a branch.")
    if revision and pr:
        raise usage_error(
            "--pr opens a pull request against main, so it goes without --revision",
            where=repo_id,
            hint=f"To add to one that is open, give --revision {PULL_REQUESTS}N alone.",
        )
    # One form for main, so that messages and addresses do not depend on how it was given.
    return HubDestination(repo_id, None if revision == MAIN else revision, pr)


def check_destination(
    remote: RemoteState | None, target: HubDestination, package: UploadPackage, private: bool
) -> None:
    """Raise SurgeryError where the state of the repository forbids the push."""
    if remote is None:
        if target.pr or (target.revision or "").startswith(PULL_REQUESTS):
            raise usage_error(
                "there is no such repository, or your token may not see it, so it has no pull requests",
                where=target,
                hint="Push without --pr to make it.",
            )
        return
    if private and not remote.private:
        raise usage_error(
            "is there already, and it is public",
            where=target,
            hint=f"Make it private at {shown_endpoint()}/{target.repo_id}/settings, or push without --private.",
        )
    # Weights under other names, in a repository without our manifest: somebody else's, which a push must not delete.
    foreign = sorted(name for name in remote.files - package.names if "/" not in name and _matches(name, WEIGHT_FILES))
    if foreign and MANIFEST not in remote.files:
        raise SurgeryError(
            f"holds weights that surgery did not push, and OUT has no files of these names: {listing(foreign, 3)}",
            where=target,
            hint="Loaders would mix the two: push to another repository or --revision, or remove them there first.",
        )


@dataclass(frozen=True)
class UploadPrivacy:
    """Who may see what is pushed.

    Attributes:
        private: whether the repository must be private.
        public: whether it is public if it is created.
        vouched: whether the user says that everybody may have what was made from local files.
    """

    package: UploadPackage
    private: bool
    public: bool
    vouched: bool

    def check(self, remote: RemoteState | None, target: HubDestination) -> None:
        """Raise SurgeryError where the push would make something public that must not be, or may not."""
        if self.public if remote is None else not remote.private:
            inputs = input_privacy(manifests=[self.package.manifest])
            check_may_be_public(target, inputs, vouched=self.vouched)


def files_to_delete(package: UploadPackage, remote: RemoteState) -> list[CommitOperationDelete]:
    """Return the deletion of what an earlier push left there for loaders to read, and OUT lacks."""
    from huggingface_hub import CommitOperationDelete

    # Without our manifest the files are not ours to delete.
    if MANIFEST not in remote.files:
        return []
    stale = sorted(name for name in remote.files - package.names if _matches(name, LOADER_FILES))
    return [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in stale]


def files_to_add(package: UploadPackage, card: HubCard, remote: RemoteState) -> list[CommitOperationAdd]:
    """Return the addition of the files of OUT, with `card` as README.md, and of .gitattributes where there is none."""
    from huggingface_hub import CommitOperationAdd

    content: dict[str, Path | bytes] = {file.name: file.path for file in package.files} | {CARD: card.text.encode()}
    if GITATTRIBUTES not in remote.files | package.names:
        content[GITATTRIBUTES] = gitattributes(package).encode()
    return [CommitOperationAdd(name, source) for name, source in sorted(content.items())]


def gitattributes(package: UploadPackage) -> str:
    """Return the text of .gitattributes for a repository that has none: which files the Hub keeps outside git."""
    large = [
        file.name
        for file in package.files
        if file.size >= LFS_MIN_BYTES and file.name.rpartition(".")[2] not in LFS_EXTENSIONS
    ]
    patterns = [
        *(f"*.{extension}" for extension in LFS_EXTENSIONS),
        "*.lfs.*",
        "saved_model/**/*",
        "*.tar.*",
        "*tfevents*",
    ]
    # A pattern ends at the first space.
    names = [name.replace(" ", "[[:space:]]") for name in large]
    return "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in (*patterns, *names))


def upload_sizes(package: UploadPackage, card: HubCard) -> Mapping[str, int]:
    """Return name → size in bytes of every file of OUT that is uploaded, sorted by name."""
    sizes = {file.name: file.size for file in package.files} | {CARD: len(card.text.encode())}
    return dict(sorted(sizes.items()))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
