"""Read an output back, and check that every tensor is readable, finite, and hashed as its manifest says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.reader import (
    SourceFiles,
    TensorReader,
    count_nonfinite,
    digest,
    hash_tensor,
    segments,
)
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.stored_tensor import StoredTensor
from surgery.engine.manifest import read_manifest
from surgery.engine.options import ExecutionOptions
from surgery.engine.work.workers import run_shared
from surgery.errors import listing
from surgery.io.atomic import MANIFEST
from surgery.io.hashing import KEY, hash_parts, hash_tensors
from surgery.reporting.report import format_value


@dataclass(frozen=True)
class VerifyReport:
    """The result of reading `model` back; `ok` where everything is as it should be.

    hashes_compared: whether there was a manifest to compare with.
    nonfinite: name → number of NaN and infinite values.
    changed: tensors whose bytes, dtype or shape are not as the manifest says.
    missing: tensors in the manifest that are not in the files.
    unlisted: tensors in the files that are not in the manifest.
    """

    model: str
    tensors: int
    n_bytes: int
    hashes_compared: bool
    nonfinite: Mapping[str, int]
    changed: Sequence[str]
    missing: Sequence[str]
    unlisted: Sequence[str]

    @property
    def ok(self) -> bool:
        return not (self.nonfinite or self.changed or self.missing or self.unlisted)

    def sentence(self) -> str:
        """Return the result in words."""
        problems = [
            f"{len(names)} tensor(s) {what}: {listing(names)}"
            for names, what in (
                (
                    [f"{name} ({count:,})" for name, count in self.nonfinite.items()],
                    "hold NaN or infinite values",
                ),
                (self.changed, "are not what the manifest says"),
                (self.missing, "are in the manifest but not there"),
                (self.unlisted, "are there but not in the manifest"),
            )
            if names
        ]
        if problems:
            return f"{self.model}: " + "; ".join(problems)
        hashes = "hashes as in the manifest" if self.hashes_compared else "no manifest, so hashes were not compared"
        size = format_value(self.n_bytes, "bytes")
        return f"{self.model}: {self.tensors} tensors, {size}, readable and finite; {hashes}"


def verify(model: str, *, options: ExecutionOptions = ExecutionOptions()) -> VerifyReport:
    """Read every byte of `model`'s tensors, and compare them with surgery.json where the folder has one.

    Example:
        report = surgery.verify("OUT")
        assert report.ok

    Raises:
        SurgeryError: the checkpoint is damaged so that it cannot be opened or read.
    """
    checkpoint = open_checkpoint(model)
    folder = checkpoint.folder
    # With an adapter the tensors are not those that the folder's manifest lists.
    has_manifest = folder is not None and (folder / MANIFEST).is_file() and checkpoint.adapter is None
    expected: Mapping[str, Mapping[str, object]] = (
        read_manifest(folder, needs=["tensors"])["tensors"] if has_manifest and folder is not None else {}
    )

    def check(tensor: StoredTensor, reader: TensorReader) -> tuple[StoredTensor, str, int]:
        digests, nonfinite = [], 0
        for begin, end in segments(tensor.n_elements):
            data = reader.raw(tensor, begin, end, "verify")
            digests.append(digest(data))
            if tensor.is_float:
                nonfinite += count_nonfinite(data, tensor.dtype)
        return tensor, hash_parts(digests), nonfinite

    changed, bad = [], {}
    tensors = _stored_tensors(checkpoint)
    size = sum(tensor.n_bytes for tensor in tensors.values())
    with SourceFiles(checkpoint.files) as files, options.progress("Verifying", size) as advance:
        for tensor, tensor_hash, nonfinite in run_shared(list(tensors.values()), check, files, threads=options.threads):
            advance(tensor.n_bytes)
            if nonfinite:
                bad[tensor.name_in_file] = nonfinite
            entry = expected.get(tensor.name_in_file)
            # Dtype and shape count too: the same bytes under another dtype are other weights.
            if entry and (entry[KEY], entry["dtype"], entry["shape"]) != (
                tensor_hash,
                tensor.dtype,
                list(tensor.shape),
            ):
                changed.append(tensor.name_in_file)
    return VerifyReport(
        model,
        len(tensors),
        size,
        bool(has_manifest),
        dict(sorted(bad.items())),
        sorted(changed),
        sorted(set(expected) - set(tensors)),
        sorted(set(tensors) - set(expected)) if has_manifest else [],
    )


def weights_hash(checkpoint: Checkpoint, *, options: ExecutionOptions = ExecutionOptions()) -> str:
    """Return the hash of all stored tensors, as in manifests: the same however they are sharded.

    Raises:
        SurgeryError: a file cannot be read, or changes while it is read.
    """
    return hash_tensors(tensor_hashes(checkpoint, options=options))


def tensor_hashes(checkpoint: Checkpoint, *, options: ExecutionOptions = ExecutionOptions()) -> dict[str, str]:
    """Return the hash of every stored tensor, by name. Errors as in `weights_hash`."""

    def work(tensor: StoredTensor, reader: TensorReader) -> tuple[StoredTensor, str]:
        return tensor, hash_tensor(reader, tensor)

    tensors = _stored_tensors(checkpoint)
    hashes = {}
    size = sum(tensor.n_bytes for tensor in tensors.values())
    with SourceFiles(checkpoint.files) as files, options.progress("Hashing the model", size) as advance:
        for tensor, tensor_hash in run_shared(list(tensors.values()), work, files, threads=options.threads):
            hashes[tensor.name_in_file] = tensor_hash
            advance(tensor.n_bytes)
        files.check_unchanged()
    return hashes


def _stored_tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Return every tensor that is read from a file, those that others are computed from among them, by name."""
    return {part.name_in_file: part for stored in checkpoint.tensors.values() for part in stored.parts}
