"""Resolve the values of a recipe: files and folders, models and data of the lab, repositories on the Hub.

Each text is looked up once. Nothing is loaded, trained or downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery import lab
from surgery.checkpoint.adapters.adapted_checkpoint import base_of
from surgery.checkpoint.checkpoint import Checkpoint, existing_path, is_adapter, read_file, read_folder
from surgery.checkpoint.dtypes import n_elements
from surgery.errors import SurgeryError
from surgery.hub import datasets as hub_data
from surgery.hub import download as hub
from surgery.io.hashing import hash_tensors
from surgery.io.input_files import read_utf8
from surgery.io.patterns import glob_paths, has_wildcard
from surgery.lab import python_text
from surgery.recipes.config_texts import config_texts
from surgery.recipes.run.content_hashes import WEIGHTS, FileHashCache

# What a lab model that is not built yet will take, and more: they have up to 0.4 M parameters.
LAB_BYTES, LAB_PARAMETERS = 2_000_000, 500_000
CONFIGS = (".yml", ".yaml", ".json")
CONFIG_BYTES = 1_000_000  # larger JSON files are data, not configs that name models


@dataclass(frozen=True)
class ResolvedInput:
    """What a text of a recipe names.

    Attributes:
        content: what its content is known by (a hash, a commit); None if that cannot be found out.
        n_bytes: of its weights.
        n_parameters: of its stored values; None if the headers cannot be read.
        missing: bytes to download.
        repo: the repository that it comes from.
        note: what people should know about it.
    """

    content: str | None
    n_bytes: int | None = None
    n_parameters: int | None = None
    missing: int = 0
    repo: str | None = None
    note: str = ""


class InputResolver:
    """Finds out what texts name; hashes of files come from `hashes`."""

    def __init__(self, hashes: FileHashCache) -> None:
        self._hashes = hashes
        self._known: dict[str, ResolvedInput | None] = {}

    def resolve(self, text: str) -> ResolvedInput | None:
        """Return what `text` names; None if it names nothing.

        Raises:
            SurgeryError: the lab has nothing of that name; a file cannot be read.
        """
        if text not in self._known:
            self._known[text] = self._resolve(text)
        return self._known[text]

    def resolve_glob(self, pattern: str) -> ResolvedInput | None:
        """Return the files and folders that a glob matches, as one input; None if it matches none."""
        contents = {str(path): self._hashes.hash_content(path) for path in self.matches(pattern)}
        return ResolvedInput(hash_tensors(contents)) if contents else None

    def matches(self, pattern: str) -> list[Path]:
        """Return the files and folders that a glob matches, in order."""
        return list(map(Path, glob_paths(pattern))) if has_wildcard(pattern) else []

    def resolve_config(self, text: str) -> list[ResolvedInput]:
        """Return what the strings in the config file `text` name, in their order; nothing for other texts."""
        strings = self.config_texts(text)
        return [resolved for each in strings if each != text and (resolved := self.resolve_quietly(each)) is not None]

    def config_texts(self, text: str) -> Sequence[str]:
        """Return the strings in the config file `text`, each once; nothing for other texts."""
        path = existing_path(text)
        if path is None or not path.is_file() or path.suffix not in CONFIGS or path.stat().st_size > CONFIG_BYTES:
            return []
        try:
            return config_texts(read_utf8(path, limit=CONFIG_BYTES), text)
        except SurgeryError:
            return []  # the command itself says what is wrong with its file

    def resolve_quietly(self, text: str) -> ResolvedInput | None:
        """Return what `text` names; None where it names nothing that can be read."""
        try:
            return self.resolve(text)
        except SurgeryError:
            return None  # a text of a config may begin with anything

    def _resolve(self, text: str) -> ResolvedInput | None:
        path = existing_path(text)
        if path is not None:
            return self._resolve_path(path)
        if text.startswith(lab.PREFIX):
            return _resolve_lab(text)
        # BASE+ADAPTER; the last plus, since a base may itself be one.
        base, _, adapter = text.rpartition("+")
        if base and adapter:
            parts = [self.resolve(base), self.resolve(adapter)]
            return _combine([part for part in parts if part is not None]) if None not in parts else None
        if data := hub_data.parse_dataset_ref(text):
            return _resolve_data(data)
        return _resolve_hub(text) if hub.is_repo_id(text) else None

    def _resolve_path(self, path: Path) -> ResolvedInput:
        content = self._hashes.hash_content(path)
        if path.is_dir() and is_adapter(path):
            try:
                below = self.resolve(base_of(path))
            except SurgeryError:
                below = None
            own = ResolvedInput(content, *_sizes(path))
            return _combine([own, below]) if below is not None else own
        return ResolvedInput(content, *_sizes(path))


def _sizes(path: Path) -> tuple[int | None, int | None]:
    """Return the bytes of the weights at `path`, and how many values they are; None if there are none."""
    files = [path] if path.is_file() else list(path.rglob(f"*{WEIGHTS}"))
    files = [file for file in files if file.suffix == WEIGHTS]
    if not files:
        return None, None
    try:
        checkpoint: Checkpoint = read_folder(path) if path.is_dir() else read_file(path)
        return checkpoint.n_bytes, sum(n_elements(tensor.shape) for tensor in checkpoint.tensors.values())
    except SurgeryError:
        return sum(file.stat().st_size for file in files), None


def _resolve_lab(text: str) -> ResolvedInput:
    name, _, kind = text.removeprefix(lab.PREFIX).partition("/")
    if name == python_text.NAME:
        return ResolvedInput(f"{python_text.cache_key()}/{kind}")
    folder = lab.path_of(name)
    content = f"lab/{folder.parent.name}/{name}/{kind}"
    if folder.is_dir():
        return ResolvedInput(content, *_sizes(folder))
    return ResolvedInput(content, LAB_BYTES, LAB_PARAMETERS, note=f"{text} is trained first")


def _resolve_hub(text: str) -> ResolvedInput | None:
    try:
        repo = hub.list_repository(*hub.parse_repo_ref(text))
    except SurgeryError as error:
        # Whether the text is a model's at all is the command's to say.
        return ResolvedInput(None, repo=text, note=f"{text}: {error.what}")
    return ResolvedInput(
        f"hub/{repo.repo_id}@{repo.revision}", repo.weight_bytes, None, repo.missing_bytes, repo.repo_id
    )


def _resolve_data(data: hub_data.HubDataset) -> ResolvedInput:
    try:
        return ResolvedInput(f"data/{data.repo_id}@{hub_data.resolve_commit(data)}", repo=data.repo_id)
    except SurgeryError as error:
        return ResolvedInput(None, repo=data.repo_id, note=f"{data.ref}: {error.what}")


def _combine(parts: list[ResolvedInput]) -> ResolvedInput:
    """Return a model and the adapter on it as one input."""
    contents = [part.content for part in parts]
    known = [part.n_bytes for part in parts if part.n_bytes is not None]
    values = [part.n_parameters for part in parts if part.n_parameters is not None]
    return ResolvedInput(
        None if None in contents else "+".join(map(str, contents)),
        sum(known) if known else None,
        max(values) if values else None,
        sum(part.missing for part in parts),
        next((part.repo for part in parts if part.repo), None),
        "; ".join(part.note for part in parts if part.note),
    )
