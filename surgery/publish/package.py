"""Collect and check the files of an output folder that a push uploads: an `UploadPackage`.

The folder is complete if it agrees with its surgery.json. Nothing is written, and nothing is sent.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.reader import SourceFiles, TensorReader, hash_tensor
from surgery.checkpoint.safetensors_header import read_header
from surgery.checkpoint.stored_tensor import StoredTensor, stored_tensor
from surgery.engine.manifest import read_manifest
from surgery.engine.options import ExecutionOptions
from surgery.engine.work.workers import run
from surgery.errors import SurgeryError, listing, usage_error
from surgery.hub.download import is_repo_id
from surgery.hub.file_selection import WEIGHTS_SUFFIX
from surgery.io.atomic import MANIFEST, partial_path
from surgery.io.hashing import KEY

CARD = "README.md"
GITATTRIBUTES = ".gitattributes"
# What other programs leave beside weights; hidden files (.env, .git, .cache) are never uploaded either.
EXCLUDED_FOLDERS = ("__pycache__",)
REDO_HINT = "Make it again, and push that."


@dataclass(frozen=True)
class UploadFile:
    """A file to upload: its name in the repository, its path, its size in bytes, and its modification time in ns."""

    name: str
    path: Path
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class UploadPackage:
    """What is uploaded of `folder`: its files, sorted by name, and its manifest."""

    folder: Path
    manifest: Mapping[str, Any]
    files: tuple[UploadFile, ...]

    @property
    def kind(self) -> str:
        """The kind of output: model, vector, ensemble, adapter, embedding, …"""
        return str(self.manifest["kind"])

    @property
    def command(self) -> Mapping[str, Any]:
        """The command that made it, as `manifest.command_record` writes it."""
        command: Mapping[str, Any] = self.manifest.get("command", {})
        return command

    @property
    def n_bytes(self) -> int:
        """The size of all files, in bytes."""
        return sum(file.size for file in self.files)

    @property
    def names(self) -> frozenset[str]:
        """The names of the files: their paths in the folder."""
        return frozenset(file.name for file in self.files)

    @property
    def hub_ids(self) -> list[str]:
        """The repositories of the inputs that came from the Hub, in the order of the inputs."""
        ids = (entry.get("repo_id") for entry in self.inputs)
        return list(dict.fromkeys(text for text in ids if text and is_repo_id(text)))

    @property
    def local_refs(self) -> list[str]:
        """The inputs that nobody else has: folders and files of this machine."""
        refs = (str(entry.get("ref") or "") for entry in self.inputs if not entry.get("repo_id"))
        return list(dict.fromkeys(ref for ref in refs if ref and not ref.startswith("lab:")))

    @property
    def inputs(self) -> list[Mapping[str, Any]]:
        """The manifest's entry of each input."""
        return list(self.manifest.get("inputs", {}).values())

    def check_unchanged(self) -> None:
        """Raise SurgeryError where a file was written, replaced or removed since it was collected."""
        for file in self.files:
            try:
                # lstat: a file that was replaced by a link is another file.
                status = file.path.lstat()
            except OSError:
                status = None
            if status is None or (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                raise SurgeryError(
                    "changed while it was being pushed, so nothing was committed",
                    where=file.path,
                    hint="Run the command again when nothing writes to it.",
                )


def collect_files(out: Path) -> UploadPackage:
    """Collect the files of `out` to upload, and compare files, sizes, tensors, dtypes and shapes with the manifest.

    Raises:
        SurgeryError: surgery did not write `out`, it is unfinished, holds no weights, or is not what its manifest says.
    """
    manifest = read_manifest(_check_finished(out))
    if "tensors" not in manifest or "files" not in manifest:
        raise usage_error(
            f"holds a {manifest['kind']}, expected weights that surgery wrote",
            where=out,
            hint="Push the model, vector, adapter, ensemble or embedding.",
        )
    package = UploadPackage(out, manifest, tuple(_list_files(out)))
    _check_sizes(package)
    _check_tensors(package)
    return package


def check_hashes(package: UploadPackage, *, options: ExecutionOptions = ExecutionOptions()) -> None:
    """Read every tensor and compare its hash with the manifest's. Raise SurgeryError where one differs."""
    expected = package.manifest["tensors"]

    def hash_of(tensor: StoredTensor, reader: TensorReader) -> tuple[StoredTensor, str]:
        return tensor, hash_tensor(reader, tensor)

    tensors = _tensors(package)
    changed = []
    paths = {tensor.file for tensor in tensors}
    with (
        SourceFiles(paths) as files,
        options.progress("Verifying", sum(tensor.n_bytes for tensor in tensors)) as advance,
    ):
        for tensor, actual in run(tensors, hash_of, files, threads=options.threads):
            advance(tensor.n_bytes)
            if actual != expected[tensor.name][KEY]:
                changed.append(tensor.name)
    if changed:
        raise SurgeryError(
            f"{len(changed)} tensor(s) are not what {MANIFEST} says: {listing(sorted(changed))}",
            where=package.folder,
            hint=REDO_HINT,
        )


def _check_finished(out: Path) -> Path:
    """Return `out`. Raise SurgeryError where there is no finished output."""
    if out.name.endswith(partial_path(Path("x")).name.removeprefix("x")):
        raise usage_error(
            "is unfinished: it is what a job has done so far",
            where=out,
            hint="Run the job's command again, and push the folder that it writes.",
        )
    if out.is_dir():
        return out
    if partial_path(out).is_dir():
        raise usage_error(
            f"is not there yet: {partial_path(out)} is what a job has done so far",
            where=out,
            hint="Run the job's command again.",
        )
    raise usage_error("no such folder", where=out, hint="Give the folder that surgery wrote.")


def _list_files(out: Path) -> Iterator[UploadFile]:
    files = []
    for folder, folders, names in os.walk(out):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in EXCLUDED_FOLDERS]
        # os.walk counts a link to a folder among the folders, and does not follow it.
        for name in (*names, *(name for name in folders if (Path(folder) / name).is_symlink())):
            path = Path(folder) / name
            relative = path.relative_to(out).as_posix()
            if name.startswith(".") and relative != GITATTRIBUTES:
                continue
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                # A link may lead to a file that was never meant to leave this machine.
                raise SurgeryError(
                    "is a link or no regular file, and only regular files are pushed",
                    where=path,
                    hint="Put the file itself in its place, or remove it.",
                )
            files.append(UploadFile(relative, path, status.st_size, status.st_mtime_ns))
    yield from sorted(files, key=lambda file: file.name)


def _check_sizes(package: UploadPackage) -> None:
    sizes = {file.name: file.size for file in package.files}
    # Sizes first: they are known without reading, and an incomplete copy differs in them.
    for name, size in sorted(package.manifest["files"].items()):
        if name == CARD:
            continue  # people may edit the card
        if name not in sizes:
            raise SurgeryError(f"{MANIFEST} lists it, but it is not there", where=package.folder / name, hint=REDO_HINT)
        if sizes[name] != size:
            raise SurgeryError(
                f"has {sizes[name]:,} bytes, {MANIFEST} says {size:,}", where=package.folder / name, hint=REDO_HINT
            )


def _check_tensors(package: UploadPackage) -> None:
    expected = package.manifest["tensors"]
    actual = {tensor.name: tensor for tensor in _tensors(package)}
    differing = sorted(
        name
        for name in {*expected, *actual}
        if name not in actual
        or name not in expected
        or (expected[name]["dtype"], expected[name]["shape"]) != (actual[name].dtype, list(actual[name].shape))
    )
    if differing:
        raise SurgeryError(
            f"{len(differing)} tensor(s) are missing, unlisted, or of another dtype or shape than {MANIFEST} says: "
            f"{listing(differing)}",
            where=package.folder,
            hint=REDO_HINT,
        )


def _tensors(package: UploadPackage) -> list[StoredTensor]:
    """Return the tensors of the files that the manifest lists."""
    tensors = []
    for file in package.files:
        if file.name.endswith(WEIGHTS_SUFFIX):
            # Read also where the manifest does not list the file: it is uploaded, so that it must be whole.
            header = read_header(file.path)
            if file.name in package.manifest["files"]:
                tensors += [stored_tensor(entry, file.path, header) for entry in header.entries]
    return tensors
