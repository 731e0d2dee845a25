"""Write a table of numbers, such as an embedding matrix in memory, as a safetensors file with one float32 tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from surgery.checkpoint.reader import octets, segments
from surgery.checkpoint.safetensors_header import PYTORCH, build_header
from surgery.io.atomic import disk_error
from surgery.io.hashing import hash_bytes, hash_parts

Table = npt.NDArray[np.float32]


def write_table(path: Path, name: str, table: Table) -> str:
    """Write `table` to `path` as the tensor `name`; return the tensor's hash as in manifests. Raises SurgeryError.

    Not atomic by itself: `path` is in a folder that is committed as a whole.
    """
    header = build_header([(name, "F32", table.shape)], PYTORCH)
    flat = table.reshape(-1)
    digests = []
    try:
        with path.open("wb") as file:
            file.write(header.raw)
            # Hashed by the segments in which the engine reads it, so that the hash is what `verify` will compute.
            for begin, end in segments(flat.size):
                part = octets(torch.from_numpy(flat[begin:end]))
                digests.append(hash_bytes(part))
                file.write(part)
    except OSError as error:
        raise disk_error(error, path) from error
    return hash_parts(digests)
