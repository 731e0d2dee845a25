"""Views: any slice of a view is that slice of the whole, whatever the source, the strides and the dtype."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from surgery.checkpoint.adapters.low_rank import LowRank
from surgery.checkpoint.checkpoint import read_file
from surgery.checkpoint.layouts import tensor_views
from surgery.checkpoint.layouts.tensor_views import concatenated, strided, zeros_like
from surgery.checkpoint.reader import SourceFiles, TensorReader
from surgery.checkpoint.stored_tensor import StoredTensor


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, StoredTensor], dict[str, torch.Tensor]]:
    """A file with a tensor of 3·4·10 numbers as BF16 and F32, and factors of rank 2 for an update of (12, 10)."""
    values = {
        "bf16": torch.arange(120.0).view(3, 4, 10).bfloat16(),
        "f32": torch.arange(120.0).view(3, 4, 10) / 7,
        "matrix": torch.arange(120.0).view(12, 10),
        "a": torch.arange(20.0).view(2, 10),
        "b": torch.arange(24.0).view(12, 2),
    }
    path = tmp_path_factory.mktemp("views") / "x.safetensors"
    save_file(values, path)
    return dict(read_file(path).tensors), values


def read(tensor: StoredTensor, begin: int, end: int) -> torch.Tensor:
    with SourceFiles(tensor.files) as files:
        return TensorReader(files).tensor(tensor, begin, end, "x").clone()


SIZES_AND_STRIDES = st.sampled_from(
    [
        ((3, 10, 4), (40, 1, 10)),  # each matrix transposed
        ((10, 3, 4), (1, 40, 10)),
        ((4, 10), (10, 1)),  # one expert
        ((5, 4), (1, 10)),  # half of one, transposed
        ((5, 4), (2, 10)),  # every second column, transposed
        ((3, 2, 10), (40, 20, 1)),  # every second row
        ((3, 10, 2, 2), (40, 1, 10, 20)),  # interleaved
        ((120,), (1,)),
        ((4, 3), (1, 40)),
    ]
)


@given(
    SIZES_AND_STRIDES,
    st.sampled_from(["bf16", "f32"]),
    st.integers(0, 5),
    st.data(),
    st.sampled_from([1, 4, 1000]),
)
def test_any_slice_of_a_strided_view_is_the_slice_of_the_whole(
    stored: tuple[dict[str, StoredTensor], dict[str, torch.Tensor]],
    view: tuple[tuple[int, ...], tuple[int, ...]],
    name: str,
    offset: int,
    data: st.DataObject,
    sparsest: int,
) -> None:
    """In one block, or axis by axis where few of its elements are wanted."""
    tensors, values = stored
    sizes, strides = view
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    offset = min(offset, 119 - last)
    expected = values[name].reshape(-1).as_strided(sizes, strides, offset).reshape(-1)
    begin = data.draw(st.integers(0, expected.numel()))
    end = data.draw(st.integers(begin, expected.numel()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_views, "SPARSEST", sparsest)
        got = read(strided(tensors[name], offset, sizes, strides), begin, end)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected[begin:end])


@given(st.lists(st.sampled_from(["bf16", "zeros", "transposed"]), min_size=1, max_size=4), st.data())
def test_any_slice_of_a_concatenation_is_the_slice_of_the_whole(
    stored: tuple[dict[str, StoredTensor], dict[str, torch.Tensor]], kinds: list[str], data: st.DataObject
) -> None:
    """Of stored tensors, of views and of zeros; and as the source of a view in turn."""
    tensors, values = stored
    x, tensor = values["bf16"], tensors["bf16"]
    pieces = {
        "bf16": (tensor, x),
        "zeros": (zeros_like(tensor, (3, 4, 10)), torch.zeros_like(x)),
        "transposed": (strided(tensor, 0, (3, 10, 4), (40, 1, 10)), x.transpose(1, 2).contiguous()),
    }
    joined = concatenated([pieces[kind][0] for kind in kinds], (len(kinds), 120))
    assert joined is not None
    whole = torch.cat([pieces[kind][1].reshape(-1) for kind in kinds])
    begin = data.draw(st.integers(0, whole.numel()))
    end = data.draw(st.integers(begin, whole.numel()))
    assert torch.equal(read(joined, begin, end), whole[begin:end])
    turned = strided(joined, 0, (120, len(kinds)), (1, 120))
    expected = whole.view(len(kinds), 120).T.reshape(-1)
    assert torch.equal(read(turned, begin, end), expected[begin:end])


@given(st.data())
def test_views_on_an_adapters_update_are_views_on_the_sum(
    stored: tuple[dict[str, StoredTensor], dict[str, torch.Tensor]], data: st.DataObject
) -> None:
    """W + B·A is computed in fp32, and the views keep that."""
    tensors, values = stored
    updated = replace(tensors["matrix"], derivation=LowRank(tensors["matrix"], tensors["a"], tensors["b"], 0.5))
    expected = (values["matrix"] + 0.5 * values["b"] @ values["a"]).T.reshape(-1)
    begin = data.draw(st.integers(0, 120))
    end = data.draw(st.integers(begin, 120))
    assert torch.equal(read(strided(updated, 0, (10, 12), (1, 10)), begin, end), expected[begin:end])


def test_what_is_read_is_bounded_by_the_slice(
    stored: tuple[dict[str, StoredTensor], dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of a transposed matrix never reads the whole matrix in one go, beyond what the limits allow."""
    tensors, _ = stored
    sizes: list[int] = []
    raw = TensorReader.raw

    def counting(self: TensorReader, tensor: StoredTensor, begin: int, end: int, slot: object) -> torch.Tensor:
        sizes.append(end - begin)
        return raw(self, tensor, begin, end, slot)

    monkeypatch.setattr(TensorReader, "raw", counting)
    monkeypatch.setattr(tensor_views, "LARGEST_BLOCK", 20)
    read(strided(tensors["f32"], 0, (3, 10, 4), (40, 1, 10)), 0, 120)
    assert max(sizes) <= 20


def test_pieces_of_several_dtypes_join_in_the_widest_and_others_not_at_all(
    stored: tuple[dict[str, StoredTensor], dict[str, torch.Tensor]],
) -> None:
    """BF16 and F32 give F32; codes, which have scales beside them, are never joined."""
    tensors, values = stored
    joined = concatenated([tensors["bf16"], tensors["f32"]], (6, 4, 10))
    assert joined is not None
    assert (joined.dtype, joined.n_bytes) == ("F32", 960)
    expected = torch.cat([values["bf16"].float(), values["f32"]]).reshape(-1)
    assert torch.equal(read(joined, 0, 240), expected)
    assert math.prod(joined.shape) == 240
    codes = replace(tensors["bf16"], dtype="U16")
    assert concatenated([tensors["bf16"], codes], (6, 4, 10)) is None
    assert concatenated([codes, codes], (6, 4, 10)) is None
