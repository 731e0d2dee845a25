"""Writes one table as a safetensors file."""

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
    """Writes a safetensors file with one tensor; returns its hash, as manifests say it. Raises SurgeryError."""
    header = build_header([(name, "F32", table.shape)], PYTORCH)
    flat = table.reshape(-1)
    digests = []
    try:
        with path.open("wb") as file:
            file.write(header.raw)
            for begin, end in segments(flat.size):
                part = octets(torch.from_numpy(flat[begin:end]))
                digests.append(hash_bytes(part))
                file.write(part)
    except OSError as error:
        raise disk_error(error, path) from error
    return hash_parts(digests)
