"""Tensors that are computed when they are read: what they are read from, and what decides their values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from surgery.checkpoint.reader import TensorReader
from surgery.checkpoint.stored_tensor import Derivation, StoredTensor


@dataclass(frozen=True)
class Sum(Derivation):
    """Σ terms, scaled."""

    terms: tuple[StoredTensor, ...]
    scale: float
    rows: np.ndarray | None = None

    def values(self, tensor: StoredTensor, begin: int, end: int, reader: TensorReader, slot: object):
        raise NotImplementedError


def stored(name: str) -> StoredTensor:
    return StoredTensor(name, "F32", (2, 2), Path(f"{name}.safetensors"), 8, 16)


def test_a_stored_tensor_is_its_only_part() -> None:
    tensor = stored("a")

    assert tensor.parts == (tensor,)
    assert tensor.name_in_file == "a"
    assert replace(tensor, name="b", stored_as="a").name_in_file == "a"


def test_the_parts_of_a_nested_derivation_are_stored_tensors_each_once() -> None:
    a, b, c = stored("a"), stored("b"), stored("c")
    inner = replace(a, derivation=Sum((a, b), 1.0))
    outer = replace(a, derivation=Sum((inner, c, a), 2.0))

    assert outer.parts == (a, b, c)
    assert outer.files == (a.file, b.file, c.file)


def test_the_key_changes_with_all_that_decides_the_values() -> None:
    a, b = stored("a"), stored("b")
    rows = np.arange(3)
    one = replace(a, derivation=Sum((a, b), 1.0, rows))
    others = [
        a,
        replace(a, derivation=Sum((a,), 1.0, rows)),
        replace(a, derivation=Sum((a, b), 2.0, rows)),
        replace(a, derivation=Sum((a, b), 1.0, rows + 1)),
        replace(a, derivation=Sum((a, one), 1.0, rows)),
        replace(one, dtype="BF16"),
    ]

    keys = [str(tensor.key()) for tensor in (one, *others)]
    assert len(set(keys)) == len(keys)
    assert one.key() == replace(a, derivation=Sum((a, b), 1.0, rows.copy())).key()
