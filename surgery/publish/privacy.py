"""Decide whether an output may become public: not where anything that it was made from is private.

Of repositories the Hub is asked. Of the files and folders of this machine nobody knows it, but their owner, who says so
on the command line; folders that surgery wrote count as what they were made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery import lab
from surgery.checkpoint.checkpoint import existing_path
from surgery.engine.manifest import read_manifest
from surgery.errors import SurgeryError, listing, usage_error
from surgery.hub import datasets as hub_data
from surgery.hub import download as hub
from surgery.hub.visibility import RepositoryKind, Visibility, visibility
from surgery.io.atomic import MANIFEST
from surgery.io.json_io import texts_in
from surgery.io.yaml_nodes import read_documents

MAX_INPUTS = 10_000  # that are looked at: a stranger's manifest may name millions
CORPUS = ("corpus", "embed", "start")  # keys of a growth's plan with what a model is made from
AskHub = Callable[[str, RepositoryKind], Visibility]


@dataclass(frozen=True)
class InputPrivacy:
    """What an output was made from that is not known to be public.

    Attributes:
        private: repositories that are private, or whose visibility the Hub does not say.
        local: files and folders of this machine.
    """

    private: tuple[str, ...] = ()
    local: tuple[str, ...] = ()


def input_privacy(
    refs: Iterable[str] = (), manifests: Iterable[Mapping[str, Any]] = (), ask: AskHub = visibility
) -> InputPrivacy:
    """Return which of the inputs `refs`, and of those that `manifests` name, are not known to be public."""
    found = _Inputs(ask)
    for ref in refs:
        found.add(ref)
    for manifest in manifests:
        found.add_manifest(manifest)
    return InputPrivacy(tuple(found.private), tuple(found.local))


def check_may_be_public(where: object, privacy: InputPrivacy, *, vouched: bool) -> None:
    """Raise SurgeryError where what goes to the public repository `where` must not, or may not be known to.

    Args:
        vouched: whether it was said on the command line that it may be public.
    """
    if privacy.private:
        raise usage_error(
            f"would be public, but it was made from what is private, or not known to be public: "
            f"{listing(privacy.private, 5)}",
            where=where,
            hint="Push to a private repository.",
        )
    if privacy.local and not vouched:
        raise usage_error(
            f"would be public, but it was made from what nobody else has: {listing(privacy.local, 5)}",
            where=where,
            hint="Give --public if everybody may have it, or push to a private repository.",
        )


@dataclass
class _Inputs:
    """Collects inputs, each once, in the order in which they are found."""

    ask: AskHub
    private: dict[str, None] = field(default_factory=dict)
    local: dict[str, None] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def add(self, ref: str) -> None:
        if ref in self.seen:
            return
        self.seen.add(ref)
        if len(self.seen) > MAX_INPUTS:
            self.local[f"more than {MAX_INPUTS:,} inputs"] = None
            return
        path = _path(ref)
        if path is not None:
            self._add_path(ref, path)
        elif ref.startswith(lab.PREFIX) and "+" not in ref:
            return  # made from nothing but texts of our own
        elif data := hub_data.parse_dataset_ref(ref):
            self._add_repository(data.repo_id, "dataset")
        elif "+" in ref.strip("+"):
            base, _, adapter = ref.rpartition("+")
            self.add(base)
            self.add(adapter)
        elif hub.is_repo_id(ref):
            self._add_repository(ref.partition("@")[0], "model")
        else:
            self.local[ref] = None  # a file that is not here any more

    def _add_path(self, ref: str, path: Path) -> None:
        try:
            manifest = read_manifest(path) if (path / MANIFEST).is_file() else None
        except SurgeryError:
            manifest = None
        if manifest is None or not manifest.get("inputs"):
            self.local[ref] = None
        else:
            self.add_manifest(manifest)

    def add_manifest(self, manifest: Mapping[str, Any]) -> None:
        entries = manifest.get("inputs")
        for entry in entries.values() if isinstance(entries, dict) else ():
            if not isinstance(entry, dict):
                continue
            ref, repo_id = str(entry.get("ref") or ""), entry.get("repo_id")
            if isinstance(repo_id, str) and hub.is_repo_id(repo_id):
                self._add_repository(repo_id, "model")
                # Of BASE+ADAPTER the repository is the base's.
                ref = ref.rpartition("+")[2] if "+" in ref else ""
            if ref:
                self.add(ref)
        for name in _data_names(manifest):
            self.add(name)

    def _add_repository(self, repo_id: str, kind: RepositoryKind) -> None:
        key = f"{kind}/{repo_id}"
        if key not in self.seen:
            self.seen.add(key)
            if self.ask(repo_id, kind) != "public":
                self.private[repo_id] = None


def _data_names(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield the data that a manifest's command names: data sets anywhere, and the local texts that models learn."""
    command = manifest.get("command")
    if not isinstance(command, dict):
        return
    documents: list[Any] = [command]
    for text in (command.get("files") or {}).values() if isinstance(command.get("files"), dict) else ():
        with suppress(SurgeryError):  # such a text makes nothing
            nodes, _ = read_documents(text if isinstance(text, str) else "", MANIFEST)
            documents += [node.plain for node in nodes]
    for document in documents:
        yield from (text for text in texts_in(document) if hub_data.parse_dataset_ref(text))
        for key in CORPUS:
            yield from texts_in(document.get(key)) if isinstance(document, dict) else ()
    options = command.get("options")
    # Of other options a text is only what they are called by; --tune learns from the file.
    yield from texts_in(options.get("tune")) if isinstance(options, dict) else ()


def _path(ref: str) -> Path | None:
    try:
        return existing_path(ref)
    except SurgeryError:
        return None
