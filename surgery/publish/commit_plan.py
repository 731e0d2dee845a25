"""What a push changes in a repository: the files that go up, those that go, and when it may not be.

In come a `UploadPackage`, its card, the `Destination` and what is there already, a `Remote`; out come the operations of
one commit.
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
from surgery.hub.settings import endpoint
from surgery.io.atomic import MANIFEST
from surgery.publish.model_card import HubCard
from surgery.publish.package import ATTRIBUTES, CARD, UploadPackage

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

MAIN = "main"
PULL_REQUESTS = "refs/pr/"
# What a model is read from: after a push, files of these names are those of OUT.
READ_BY_LOADERS = (
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
    f"{hub.TEMPLATES}/*.jinja",
    f"{hub.MEMBERS}/*",
    "donor/*",
    "undo/*",
    "scores.json",
)
FOREIGN = ("*.safetensors", "*.safetensors.index.json")
LARGE_TEXT = 10_000_000  # bytes from which the Hub keeps a file outside git, whatever its name
# As the Hub writes them into a new repository, and pictures.
LARGE_KINDS = (
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
class Destination:
    """Where a push goes; `revision` is a branch or refs/pr/N, None for main."""

    repo_id: str
    revision: str | None
    pr: bool

    @property
    def branch(self) -> str:
        """The branch by its name."""
        return self.revision or MAIN

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id


@dataclass(frozen=True)
class Remote:
    """What is there: the names of the files of `commit`. `is_new`: the branch is still to be made, from `commit`."""

    commit: str
    private: bool
    files: frozenset[str]
    is_new: bool


def destination(repo_id: str, revision: str | None, pr: bool) -> Destination:
    """`org/name` and what was asked of it. Raises SurgeryError where they cannot be, or not together."""
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
    return Destination(repo_id, None if revision == MAIN else revision, pr)


def check_destination(remote: Remote | None, to: Destination, parcel: UploadPackage, private: bool) -> None:
    """Raises SurgeryError where what is there forbids the push."""
    if remote is None:
        if to.pr or (to.revision or "").startswith(PULL_REQUESTS):
            raise usage_error(
                "there is no such repository, or your token may not see it, so it has no pull requests",
                where=to,
                hint="Push without --pr to make it.",
            )
        return
    if private and not remote.private:
        raise usage_error(
            "is there already, and it is public",
            where=to,
            hint=f"Make it private at {endpoint()}/{to.repo_id}/settings, or push without --private.",
        )
    foreign = sorted(name for name in remote.files - parcel.names if "/" not in name and _matches(name, FOREIGN))
    if foreign and MANIFEST not in remote.files:
        raise SurgeryError(
            f"holds weights that surgery did not push, and OUT has no files of these names: {listing(foreign, 3)}",
            where=to,
            hint="Loaders would mix the two: push to another repository or --revision, or remove them there first.",
        )


def removals(parcel: UploadPackage, remote: Remote) -> list[CommitOperationDelete]:
    """What a push by surgery left there for loaders to read, and OUT has not."""
    from huggingface_hub import CommitOperationDelete

    if MANIFEST not in remote.files:
        return []
    stale = sorted(name for name in remote.files - parcel.names if _matches(name, READ_BY_LOADERS))
    return [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in stale]


def additions(parcel: UploadPackage, card: HubCard, remote: Remote) -> list[CommitOperationAdd]:
    """The files of OUT, with `card` for its README.md, and .gitattributes where there is none."""
    from huggingface_hub import CommitOperationAdd

    content: dict[str, Path | bytes] = {file.name: file.path for file in parcel.files} | {CARD: card.text.encode()}
    if ATTRIBUTES not in remote.files | parcel.names:
        content[ATTRIBUTES] = attributes(parcel).encode()
    return [CommitOperationAdd(name, source) for name, source in sorted(content.items())]


def attributes(parcel: UploadPackage) -> str:
    """The .gitattributes of a repository that has none: which files the Hub keeps outside git."""
    large = [
        file.name
        for file in parcel.files
        if file.size >= LARGE_TEXT and file.name.rpartition(".")[2] not in LARGE_KINDS
    ]
    patterns = [*(f"*.{kind}" for kind in LARGE_KINDS), "*.lfs.*", "saved_model/**/*", "*.tar.*", "*tfevents*"]
    names = [name.replace(" ", "[[:space:]]") for name in large]
    return "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in (*patterns, *names))


def sizes(parcel: UploadPackage, card: HubCard) -> Mapping[str, int]:
    """Name → size in bytes of every file of OUT that goes up, sorted by name."""
    sizes = {file.name: file.size for file in parcel.files} | {CARD: len(card.text.encode())}
    return dict(sorted(sizes.items()))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
