"""A folder that surgery wrote → the files that leave it, found whole by its surgery.json.

In comes OUT, out comes a `UploadPackage`: what is sent when OUT is pushed. Nothing is written, and nothing is sent.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.checkpoint import StoredTensor, stored_tensor
from surgery.checkpoint.reader import SourceFiles, TensorReader, hash_tensor
from surgery.checkpoint.safetensors_header import read_header
from surgery.engine.manifest import read_manifest
from surgery.engine.options import ExecutionOptions
from surgery.engine.workers import run
from surgery.errors import SurgeryError, listing, usage_error
from surgery.hub import download as hub
from surgery.io.atomic import MANIFEST, partial_path
from surgery.io.hashing import KEY

CARD = "README.md"
ATTRIBUTES = ".gitattributes"
# What other programs leave beside weights; hidden files stay too.
LEFT_HERE = ("__pycache__",)
AGAIN = "Make it again, and push that."


@dataclass(frozen=True)
class UploadFile:
    """A file that leaves: its path in the folder, where it lies, its size in bytes, and when it was written, in ns."""

    name: str
    path: Path
    size: int
    written: int


@dataclass(frozen=True)
class UploadPackage:
    """What leaves `folder`: its files sorted by name, and its manifest."""

    folder: Path
    manifest: Mapping[str, Any]
    files: tuple[UploadFile, ...]

    @property
    def kind(self) -> str:
        """model, vector, ensemble, adapter, embedding, …"""
        return str(self.manifest["kind"])

    @property
    def command(self) -> Mapping[str, Any]:
        """The command that made it, as `manifest.command_record` writes it."""
        command: Mapping[str, Any] = self.manifest.get("command") or {}
        return command

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def names(self) -> frozenset[str]:
        """The paths in the folder."""
        return frozenset(file.name for file in self.files)

    @property
    def hub_ids(self) -> list[str]:
        """The models on the Hub that it was made from, in the order of its inputs."""
        ids = (entry.get("repo_id") for entry in self.inputs)
        return list(dict.fromkeys(text for text in ids if text and hub.is_repo_id(text)))

    @property
    def local_refs(self) -> list[str]:
        """What it was made from that nobody else has: folders and files of this machine."""
        refs = (str(entry.get("ref") or "") for entry in self.inputs if not entry.get("repo_id"))
        return list(dict.fromkeys(ref for ref in refs if ref and not ref.startswith("lab:")))

    @property
    def inputs(self) -> list[Mapping[str, Any]]:
        """What the manifest says of each thing that it was made from."""
        return [entry for entry in (self.manifest.get("inputs") or {}).values() if isinstance(entry, dict)]

    def check_unchanged(self) -> None:
        """Raises SurgeryError where a file was written, replaced or removed since it was looked at."""
        for file in self.files:
            try:
                status = file.path.lstat()
            except OSError:
                status = None
            if status is None or (status.st_size, status.st_mtime_ns) != (file.size, file.written):
                raise SurgeryError(
                    "changed while it was being pushed, so nothing was committed",
                    where=file.path,
                    hint="Run the command again when nothing writes to it.",
                )


def collect_files(out: Path) -> UploadPackage:
    """Lists what leaves `out`, and compares its weights with the manifest: files, sizes, tensors, dtypes, shapes.

    Raises:
        SurgeryError: surgery did not write `out`, it is unfinished, holds no weights, or is not what its manifest says.
    """
    manifest = read_manifest(_finished(out))
    if not isinstance(manifest.get("tensors"), dict) or not isinstance(manifest.get("files"), dict):
        raise usage_error(
            f"holds a {manifest.get('kind')}, expected weights that surgery wrote",
            where=out,
            hint="Push the model, vector, adapter, ensemble or embedding.",
        )
    parcel = UploadPackage(out, manifest, tuple(_files(out)))
    _check_sizes(parcel)
    _check_table(parcel)
    return parcel


def check_hashes(parcel: UploadPackage, *, options: ExecutionOptions = ExecutionOptions()) -> None:
    """Reads every tensor, and compares its hash with the manifest's. Raises SurgeryError where one differs."""
    expected = parcel.manifest["tensors"]

    def work(tensor: StoredTensor, reader: TensorReader) -> tuple[StoredTensor, str]:
        return tensor, hash_tensor(reader, tensor)

    tensors = _tensors(parcel)
    changed = []
    paths = {tensor.file for tensor in tensors}
    with (
        SourceFiles(paths) as files,
        options.progress("Verifying", sum(tensor.n_bytes for tensor in tensors)) as advance,
    ):
        for tensor, found in run(tensors, work, files, threads=options.threads):
            advance(tensor.n_bytes)
            if found != expected[tensor.name][KEY]:
                changed.append(tensor.name)
    if changed:
        raise SurgeryError(
            f"{len(changed)} tensor(s) are not what {MANIFEST} says: {listing(sorted(changed))}",
            where=parcel.folder,
            hint=AGAIN,
        )


def _finished(out: Path) -> Path:
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


def _files(out: Path) -> Iterator[UploadFile]:
    found = []
    for folder, folders, names in os.walk(out):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in LEFT_HERE]
        for name in (*names, *(name for name in folders if (Path(folder) / name).is_symlink())):
            path = Path(folder) / name
            relative = path.relative_to(out).as_posix()
            if name.startswith(".") and relative != ATTRIBUTES:
                continue
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                # A link may lead to a file that was never meant to leave this machine.
                raise SurgeryError(
                    "is a link or no regular file, and only regular files are pushed",
                    where=path,
                    hint="Put the file itself in its place, or remove it.",
                )
            found.append(UploadFile(relative, path, status.st_size, status.st_mtime_ns))
    yield from sorted(found, key=lambda file: file.name)


def _check_sizes(parcel: UploadPackage) -> None:
    sizes = {file.name: file.size for file in parcel.files}
    for name, size in sorted(parcel.manifest["files"].items()):
        if name == CARD:
            continue  # people may write into it
        if name not in sizes:
            raise SurgeryError(f"{MANIFEST} lists it, but it is not there", where=parcel.folder / name, hint=AGAIN)
        if sizes[name] != size:
            raise SurgeryError(
                f"has {sizes[name]:,} bytes, {MANIFEST} says {size:,}", where=parcel.folder / name, hint=AGAIN
            )


def _check_table(parcel: UploadPackage) -> None:
    expected = parcel.manifest["tensors"]
    found = {tensor.name: tensor for tensor in _tensors(parcel)}
    differing = sorted(
        name
        for name in {*expected, *found}
        if name not in found
        or name not in expected
        or (expected[name]["dtype"], expected[name]["shape"]) != (found[name].dtype, list(found[name].shape))
    )
    if differing:
        raise SurgeryError(
            f"{len(differing)} tensor(s) are missing, unlisted, or of another dtype or shape than {MANIFEST} says: "
            f"{listing(differing)}",
            where=parcel.folder,
            hint=AGAIN,
        )


def _tensors(parcel: UploadPackage) -> list[StoredTensor]:
    """The tensors of the files that the manifest lists."""
    tensors = []
    for file in parcel.files:
        if file.name.endswith(hub.WEIGHTS):
            header = read_header(file.path)  # also of files that it does not list: those must be whole too
            if file.name in parcel.manifest["files"]:
                tensors += [stored_tensor(entry, file.path, header) for entry in header.entries]
    return tensors
