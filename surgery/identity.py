"""Which weights a checkpoint holds, as one hash: what findings of one model are known by, so that they are not used on
another."""

from __future__ import annotations

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.execute import Options
from surgery.hashing import hash_tensors
from surgery.stream import Reader, SourceFiles, hash_tensor
from surgery.workers import run_shared


def weights_hash(checkpoint: Checkpoint, *, options: Options = Options()) -> str:
    """The hash of all stored tensors, as in manifests: the same however they are sharded, and wherever they lie.

    Raises:
        SurgeryError: a file cannot be read, or changes while it is read.
    """
    return hash_tensors(tensor_hashes(checkpoint, options=options))


def tensor_hashes(checkpoint: Checkpoint, *, options: Options = Options()) -> dict[str, str]:
    """The hash of every stored tensor, by name. Errors as in `weights_hash`."""

    def work(tensor: StoredTensor, reader: Reader) -> tuple[StoredTensor, str]:
        return tensor, hash_tensor(reader, tensor)

    tensors = {part.name: part for stored in checkpoint.tensors.values() for part in stored.parts}
    hashes = {}
    size = sum(tensor.n_bytes for tensor in tensors.values())
    with SourceFiles(checkpoint.files) as files, options.progress("Hashing the model", size) as advance:
        for tensor, found in run_shared(list(tensors.values()), work, files, threads=options.threads):
            hashes[tensor.name] = found
            advance(tensor.n_bytes)
        files.check_unchanged()
    return hashes
