"""Slices of stored tensors: any bounds, any rows, the same values."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from xxhash import xxh3_128

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.reader import (
    TORCH_DTYPES,
    SourceFiles,
    TensorInput,
    TensorReader,
    compute_dtype,
    count_nonfinite,
    digest,
    hash_tensor,
    segments,
)
from surgery.checkpoint.resolve import open_checkpoint
from surgery.errors import SurgeryError


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, torch.Tensor]:
    values = torch.randn(13, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    path = tmp_path_factory.mktemp("stored") / "x.safetensors"
    save_file({"x": values, "flags": torch.tensor([True, False])}, path)
    return open_checkpoint(path), values


@given(
    begin=st.integers(0, 91),
    length=st.integers(0, 91),
    rows=st.none() | st.lists(st.integers(-1, 12), min_size=13, max_size=13),
)
@example(begin=0, length=8, rows=[-1, *range(12)])  # a missing row is no neighbour of row 0
@settings(deadline=None)
def test_any_slice_of_any_rows_is_what_indexing_gives(
    begin: int, length: int, rows: list[int] | None, stored: tuple[Checkpoint, torch.Tensor]
) -> None:
    checkpoint, values = stored
    end = min(91, begin + length)
    wanted = values
    if rows is not None:
        wanted = torch.stack([values[row] if row >= 0 else torch.zeros_like(values[0]) for row in rows])
    source = TensorInput(checkpoint.tensors["x"], None if rows is None else np.array(rows))
    with SourceFiles(checkpoint.files) as files:
        assert torch.equal(TensorReader(files).values(source, begin, end, "slot"), wanted.flatten()[begin:end])


@given(
    begin=st.integers(0, 77),
    length=st.integers(0, 77),
    rows=st.lists(st.lists(st.integers(-1, 12), min_size=11, max_size=11), min_size=1, max_size=3),
    constant=st.none() | st.sets(st.integers(0, 10)),
)
@settings(deadline=None)
def test_rows_of_several_tensors_are_averaged(
    begin: int,
    length: int,
    rows: list[list[int]],
    constant: set[int] | None,
    stored: tuple[Checkpoint, torch.Tensor],
) -> None:
    checkpoint, values = stored
    tensor, end = checkpoint.tensors["x"], min(77, begin + length)
    fixed = np.arange(7, dtype=np.float64)
    wanted = torch.zeros(11, 7)
    for at in range(11):
        given = [values[each[at]].float() for each in rows if each[at] >= 0]
        wanted[at] = torch.stack(given).mean(dim=0) if given else 0
        if constant is not None and at in constant:
            wanted[at] = torch.from_numpy(fixed)
    source = TensorInput(
        tensor,
        np.array(rows[0]),
        tuple((tensor, np.array(each)) for each in rows[1:]),
        None if constant is None else (np.array(sorted(constant), np.int64), fixed),
    )
    with SourceFiles(checkpoint.files) as files:
        found = TensorReader(files).values(source, begin, end, "slot").float()
    torch.testing.assert_close(found, wanted.flatten()[begin:end], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_values_that_are_not_finite_are_counted(dtype: str) -> None:
    values = torch.tensor([0.0, -1.0, math.nan, math.inf, -math.inf, 1e-3]).to(TORCH_DTYPES[dtype])
    finite = torch.isfinite(values.double())
    assert count_nonfinite(values.view(torch.uint8), dtype) == int((~finite).sum()) > 0
    assert count_nonfinite(values[finite].view(torch.uint8), dtype) == 0
    assert count_nonfinite(values[:0].view(torch.uint8), dtype) == 0


def test_segments_cover_a_tensor_once() -> None:
    bounds = list(segments(5 * (1 << 20) + 3))
    assert bounds[0][0] == 0 and bounds[-1][1] == 5 * (1 << 20) + 3
    assert all(a[1] == b[0] for a, b in pairwise(bounds))
    assert list(segments(0)) == []


def test_hashes_are_xxh3_over_the_digests_of_segments(
    stored: tuple[Checkpoint, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.checkpoint.reader.SEGMENT", 40)
    checkpoint, values = stored
    octets = values.view(torch.uint8).numpy().tobytes()
    parts = [xxh3_128(octets[i : i + 80]).digest() for i in range(0, len(octets), 80)]
    with SourceFiles(checkpoint.files) as files:
        assert hash_tensor(TensorReader(files), checkpoint.tensors["x"]) == xxh3_128(b"".join(parts)).hexdigest()
    assert digest(values[:0]) == xxh3_128().digest()


def test_float64_is_computed_in_float64_and_the_rest_in_float32() -> None:
    assert compute_dtype(["BF16", "F64"]) == torch.float64
    assert compute_dtype(["BF16", "F8_E4M3"]) == torch.float32


def test_a_file_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1000)}, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    with SourceFiles(checkpoint.files) as files:
        with (tmp_path / "x.safetensors").open("r+b") as file:
            file.truncate(2000)
        with pytest.raises(SurgeryError, match='the file ends at byte 2,000, inside "x"'):
            TensorReader(files).whole(TensorInput(checkpoint.tensors["x"]), "slot")
        with pytest.raises(SurgeryError, match="changed while it was being read"):
            files.check_unchanged()


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"gone.safetensors: cannot be read \(No such file"):
        SourceFiles([tmp_path / "gone.safetensors"])
