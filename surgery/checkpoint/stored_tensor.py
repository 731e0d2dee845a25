"""The location of a tensor's bytes in a file, or how its values are computed from stored ones when they are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.checkpoint.dtypes import is_float, n_elements
from surgery.checkpoint.safetensors_header import Entry, Header
from surgery.io.hashing import hash_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.checkpoint.reader import TensorReader


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk.

    name: the name that it is seen under.
    dtype, shape: of its values.
    file, start: the place of its bytes; of a derived tensor those of the stored one that it is made of before all.
    n_bytes: what its values take in `dtype`.
    derivation: how the values are computed; None where they are read as they are stored.
    stored_as: its name in the file, where it is seen under another.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    n_bytes: int
    derivation: Derivation | None = None
    stored_as: str | None = None

    @property
    def n_elements(self) -> int:
        return n_elements(self.shape)

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The stored tensors that are read for this one, each once; itself where it is not derived."""
        if self.derivation is None:
            return (self,)
        return tuple({id(part): part for source in self.derivation.inputs() for part in source.parts}.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """The files read for this tensor."""
        return tuple(part.file for part in self.parts)

    @property
    def name_in_file(self) -> str:
        """The name that its file has it under."""
        return self.stored_as or self.name

    @property
    def is_float(self) -> bool:
        return is_float(self.dtype)

    def key(self) -> list[Any]:
        """Return what decides its values, besides the contents of the files, as JSON."""
        derived = [] if self.derivation is None else [self.derivation.key()]
        return [str(self.file), self.name_in_file, self.start, self.dtype, list(self.shape), *derived]


class Derivation(ABC):
    """How a tensor's values are computed from stored ones whenever they are read: a frozen dataclass.

    Its fields are stored tensors (derived ones as well), tuples of them, arrays, numbers and texts; nothing else.
    """

    @abstractmethod
    def values(self, tensor: StoredTensor, begin: int, end: int, reader: TensorReader, slot: object) -> Tensor:
        """Return elements [begin, end) of `tensor`, 1-D, in its dtype or a wider one.

        Args:
            tensor: the one that has this derivation.
            slot: prefix of the reader's buffers that may be used, as (slot, …).
        """

    def inputs(self) -> Iterator[StoredTensor]:
        """Yield the tensors that the values are computed from."""
        for value in self._values():
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, StoredTensor):
                    yield one

    def key(self) -> list[Any]:
        """Return what decides the values, besides the contents of the files, as JSON."""
        return [type(self).__name__, *map(_key, self._values())]

    def _values(self) -> Iterator[Any]:
        return (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]  # a dataclass


def stored_tensor(entry: Entry, path: Path, header: Header) -> StoredTensor:
    """Return the location of the tensor `entry` of `header` in the file `path`."""
    start = header.data_start + entry.begin
    return StoredTensor(entry.name, entry.dtype, entry.shape, path, start, entry.end - entry.begin)


def _key(value: Any) -> Any:
    if isinstance(value, StoredTensor):
        return value.key()
    if isinstance(value, np.ndarray):
        return hash_bytes(value.tobytes()).hex()
    return [_key(one) for one in value] if isinstance(value, tuple) else value
