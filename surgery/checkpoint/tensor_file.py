"""Read small safetensors files of our own formats whole, after their headers were checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.checkpoint.dtypes import is_float
from surgery.checkpoint.safetensors_header import read_header
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from torch import Tensor


def load_tensors(path: Path, expected: Mapping[str, tuple[str | None, int]], *, hint: str) -> dict[str, Tensor]:
    """Return the tensors of `expected` in the file `path`; others in it are not read.

    Args:
        expected: name → dtype (of safetensors: "F32"; None for any float) and number of dimensions.
        hint: how to make the file again.

    Raises:
        SurgeryError: the file cannot be read, is damaged, lacks a tensor, or has it in another form.
    """
    entries = {entry.name: entry for entry in read_header(path).entries}
    for name, (dtype, rank) in expected.items():
        entry = entries.get(name)
        if entry is None:
            raise SurgeryError(f'lacks "{name}"', where=path, hint=hint)
        fits = is_float(entry.dtype) if dtype is None else entry.dtype == dtype
        if not fits or len(entry.shape) != rank:
            raise SurgeryError(
                f'"{name}" is {entry.dtype} {list(entry.shape)}, expected {dtype or "floats"} with {rank} dimension(s)',
                where=path,
                hint=hint,
            )
    return _load(path, expected)


def load_all_tensors(path: Path) -> dict[str, Tensor]:
    """Return every tensor in the file `path`. Raises SurgeryError where it cannot be read, or is damaged."""
    return _load(path, [entry.name for entry in read_header(path).entries])


def _load(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise SurgeryError(f"cannot be read ({getattr(error, 'strerror', None) or error})", where=path) from error
