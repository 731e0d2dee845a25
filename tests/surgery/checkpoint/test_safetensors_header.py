"""The header: what safetensors writes we read, what we write it reads, and no bytes get past the checks."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import load_file, save_file

from surgery.checkpoint.dtypes import DTYPES, n_bytes
from surgery.checkpoint.safetensors_header import MAX_HEADER_BYTES, Header, build_header, parse_header, read_header
from surgery.errors import SurgeryError

WHERE = Path("model.safetensors")
TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SHAPES = ((), (3,), (2, 5), (0,), (4, 0, 2), (1, 1, 1, 2))


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Bytes 1, 0, 1, 0, …: valid, and different from their neighbours, in every dtype."""
    count = torch.empty(shape, dtype=dtype).numel()
    size = count * dtype.itemsize
    return (torch.arange(1, size + 1, dtype=torch.uint8) % 2).view(dtype).reshape(shape)


def file_of(table: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with `table` (JSON text, or what becomes it) as its header, however wrong."""
    body = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(body) if length is None else length) + body + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def parse(content: bytes) -> Header:
    (length,) = struct.unpack("<Q", content[:8])
    return parse_header(content[: 8 + length], len(content), WHERE)


def failure(content: bytes, folder: Path) -> str:
    """What reading a file of `content` says; always with the file's path in front."""
    path = folder / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(SurgeryError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("dtype", TORCH)
def test_every_dtype_and_shape_is_read_as_safetensors_wrote_it(dtype: str, tmp_path: Path) -> None:
    tensors = {f"t{i}": tensor_of(TORCH[dtype], shape) for i, shape in enumerate(SHAPES)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "ключ": "значение"})
    header, content = read_header(path), path.read_bytes()
    assert header.metadata == {"format": "pt", "ключ": "значение"}
    assert {e.name: (e.dtype, e.shape) for e in header.entries} == {
        name: (dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    for held in header.entries:
        stored = content[header.data_start + held.begin : header.data_start + held.end]
        assert stored == tensors[held.name].reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", TORCH)
def test_safetensors_reads_what_we_write(dtype: str, tmp_path: Path) -> None:
    tensors = {f"模型.{i}": tensor_of(TORCH[dtype], shape) for i, shape in enumerate(SHAPES)}
    header = build_header(((n, dtype, tuple(t.shape)) for n, t in tensors.items()), {"format": "pt"})
    data = b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values())
    path = tmp_path / "x.safetensors"
    path.write_bytes(header.raw + data)
    assert read_header(path) == header
    assert header.data_start % 8 == 0
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_building_again_gives_the_bytes_that_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2), "s": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    again = build_header(((e.name, e.dtype, e.shape) for e in header.entries), header.metadata)
    assert again == header


@pytest.mark.parametrize("dtype", sorted(set(DTYPES) - set(TORCH)))
def test_packed_dtypes_that_torch_lacks_are_laid_out_as_safetensors_does(dtype: str) -> None:
    header = build_header([("a", dtype, (4, 2)), ("b", "U8", (1,))], {})
    content = header.raw + bytes(header.entries[-1].end)
    assert parse(content) == header
    assert {name: len(held["data"]) for name, held in deserialize(content)} == {
        "a": DTYPES[dtype].bits,
        "b": 1,
    }


def test_file_without_tensors_or_metadata_is_read() -> None:
    assert parse(file_of({})) == Header((), {}, file_of({}))


def test_tensors_come_in_the_order_of_their_bytes() -> None:
    table = {"late": entry("U8", [1], [2, 3]), "none": entry("U8", [0], [2, 2]), "early": entry("U8", [2], [0, 2])}
    assert [held.name for held in parse(file_of(table, bytes(3))).entries] == ["early", "none", "late"]


LIES: dict[str, tuple[bytes, str]] = {
    "offsets outside the file": (file_of({"a": entry()}, bytes(5)), '"a" ends at byte 8 of 5. The download is incomp'),
    "overlap": (
        file_of({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
        '"b" overlaps the tensor before it: it begins at byte 4, expected 8. The file is damaged',
    ),
    "gap": (
        file_of({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
        '"b" leaves a gap before it: it begins at byte 12, expected 8. The file is damaged',
    ),
    "gap at the start": (file_of({"a": entry(offsets=[4, 12])}, bytes(12)), '"a" leaves a gap before it'),
    "bytes of nobody": (file_of({"a": entry()}, bytes(1008)), "1,000 bytes after the last tensor belong to none"),
    "wrong length": (
        file_of({"a": entry(shape=[3, 1000], offsets=[0, 8])}, bytes(8)),
        '"a" takes 8 bytes, but F32 [3, 1000] takes 12,000',
    ),
    "end before begin": (file_of({"a": entry(offsets=[8, 0])}, bytes(8)), '"a" takes -8 bytes, but F32 [2] takes 8'),
    "same name twice": (
        file_of(b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": {}}'),
        "the header names 'a' twice",
    ),
    "negative shape": (file_of({"a": entry(shape=[-2])}, bytes(8)), '"a" has shape [-2] and data_offsets [0, 8], expe'),
    "float shape": (file_of({"a": entry(shape=[2.0])}, bytes(8)), '"a" has shape [2.0]'),
    "bool shape": (file_of({"a": entry("U8", [True], [0, 1])}, bytes(1)), '"a" has shape [True]'),
    "negative offset": (file_of({"a": entry(offsets=[-8, 0])}, bytes(8)), "data_offsets [-8, 0], expected whole"),
    "negative zero": (
        file_of(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[-0,0]}}'),
        "the header says -0, which is no number here",
    ),
    "shape is no list": (file_of({"a": entry(shape=2)}, bytes(8)), '"a" has shape 2 and'),
    "three offsets": (file_of({"a": entry(offsets=[0, 4, 8])}, bytes(8)), "data_offsets [0, 4, 8], expected whole"),
    "number beyond 64 bits": (file_of({"a": entry(shape=[2**64])}, bytes(8)), "expected whole numbers"),
    "number of 5,000 digits": (file_of(b'{"a":' + b"9" * 5000 + b"}"), "Exceeds the limit"),
    "product beyond 64 bits": (
        file_of({"a": entry(shape=[2**40] * 64)}, bytes(8)),
        "…, more elements than a file can hold. The file is damaged",
    ),
    "unknown dtype": (
        file_of({"a": entry("F33")}, bytes(8)),
        "\"a\" has dtype 'F33', which is not a safetensors dtype",
    ),
    "dtype is no text": (file_of({"a": entry(["F32"])}, bytes(8)), "\"a\" has dtype ['F32'], which is not"),
    "half a byte": (file_of({"a": entry("F4", [3], [0, 1])}, bytes(1)), '"a": 3 values of F4 do not fill whole bytes'),
    "missing field": (file_of({"a": {"dtype": "F32"}}), '"a" is not described by dtype, shape and data_offsets'),
    "unknown field": (file_of({"a": entry(more=1)}, bytes(8)), '"a" is not described by dtype, shape and data_offsets'),
    "entry is no table": (file_of({"a": 3}), '"a" is not described by'),
    "metadata of numbers": (file_of({"__metadata__": {"n": 1}}), '"__metadata__" is not a table of strings'),
    "metadata is no table": (file_of({"__metadata__": "pt"}), '"__metadata__" is not a table of strings'),
    "metadata names a key twice": (file_of(b'{"__metadata__":{"x":"1","x":"2"}}'), "the header names 'x' twice"),
    "control characters in a name": (
        file_of({"a\x1b[2J\n": entry()}, bytes(8)),
        r"the name 'a\x1b[2J\n' holds control characters",
    ),
    "NaN": (file_of(b'{"a": NaN}'), "the header says NaN, which is no number here"),
    "half a character": (file_of({"\ud800": entry()}, bytes(8)), "the header says '\\ud800', half of a character"),
    "half a character in metadata": (file_of({"__metadata__": {"a": "\udc00"}}), "half of a character"),
    "not an object": (file_of([]), "the header is not a JSON object"),
    "not JSON": (file_of(b"{"), "the header is not JSON. This is not a safetensors file, or it is damaged."),
    "not UTF-8": (file_of(b'{"\xff":0}'), "the header is not JSON"),
    "no header": (file_of(b""), "the header is not JSON"),
    "nested a million times": (file_of(b"[" * 1_000_000), "the header is not JSON"),
    "header longer than the file": (
        file_of({"a": entry()}, length=1000),
        "the header ends at byte 1,008 of 69. The download is incomplete or the file is damaged: fetch it again.",
    ),
    "header over the limit": (
        file_of({}, length=2**63),
        "the header claims 9,223,372,036,854,775,808 bytes, more than the 32,000,000 that one may have",
    ),
    "header just over the limit": (file_of({}, length=MAX_HEADER_BYTES + 1), "the header claims 32,000,001 bytes"),
    "empty file": (b"", "the file has 0 bytes, too few for a safetensors header. The download is incomplete"),
    "seven bytes": (bytes(7), "the file has 7 bytes, too few"),
    "a pickle": (b"PK\x03\x04" + bytes(100), "the header claims 67,324,752 bytes, more than"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_header_is_refused_with_what_is_wrong(lie: str, tmp_path: Path) -> None:
    content, message = LIES[lie]
    assert message in failure(content, tmp_path)


def test_truncated_shard_names_the_tensor_that_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "whole.safetensors"
    save_file({"a": torch.zeros(1000), "b": torch.zeros(1250)}, path)
    content = path.read_bytes()
    assert failure(content[:-1], tmp_path) == (
        '"b" ends at byte 9,000 of 8,999. The download is incomplete or the file is damaged: fetch it again.'
    )
    assert '"a" ends at byte 4,000 of 3,000' in failure(content[:-6000], tmp_path)


def test_unreadable_paths_are_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"none\.safetensors: cannot be read \(No such file or directory\)"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(SurgeryError, match="is a folder, expected a file"):
        read_header(tmp_path)


def test_long_values_of_a_damaged_header_are_cut_in_the_message(tmp_path: Path) -> None:
    message = failure(file_of({"a": entry(shape=list(range(100_000)), offsets=["x"])}), tmp_path)
    assert len(message) < 300


def test_claimed_sizes_are_never_allocated(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    table = {"a": entry("F64", [2**50], [0, 2**53])}
    lies = [file_of(table), file_of({}, length=MAX_HEADER_BYTES), file_of({"a": entry(shape=[2**63, 0, 2])})]
    for lie in lies:
        path.write_bytes(lie)
        tracemalloc.start()
        with pytest.raises(SurgeryError):
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20


def check_consistent(content: bytes) -> Header | None:
    """Parses, or is refused by a SurgeryError; what parses covers the file exactly, and safetensors takes it too."""
    try:
        header = parse(content)
    except SurgeryError as error:
        assert "\n" not in str(error)
        str(error).encode()
        return None
    position = 0
    for held in header.entries:
        assert held.begin == position
        assert held.end - held.begin == n_bytes(held.dtype, held.shape)
        position = held.end
    assert header.data_start + position == len(content)
    theirs = {name: (held["dtype"], tuple(held["shape"])) for name, held in deserialize(content)}
    assert theirs == {held.name: (held.dtype, held.shape) for held in header.entries}
    return header


names = st.text(max_size=8).filter(lambda name: name.isprintable() and name != "__metadata__")
any_name = st.text(max_size=8).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
tables = st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=5)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(sorted(DTYPES)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=12,
)


def valid_file(table: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    whole = {name: (d, s) for name, (d, s) in table.items() if DTYPES[d].bits * torch.Size(s).numel() % 8 == 0}
    header = build_header(((name, d, s) for name, (d, s) in whole.items()), metadata)
    return header.raw + bytes(header.entries[-1].end if header.entries else 0)


@given(table=tables, metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
@settings(max_examples=150, deadline=None)
def test_what_is_built_is_read_by_both(table: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> None:
    header = check_consistent(valid_file(table, metadata))
    assert header is not None and header.metadata == metadata


@given(table=tables, data=st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_mutated_files_are_read_consistently_or_refused(
    table: dict[str, tuple[str, tuple[int, ...]]], data: st.DataObject
) -> None:
    content = bytearray(valid_file(table, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(8, len(content) - 1))
        kind = data.draw(st.sampled_from(["set", "digit", "delete", "insert"]))
        if kind == "set":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "digit":
            content[at] = data.draw(st.sampled_from(b'0123456789-.,:"[]{}eE \\u'))
        elif kind == "delete" and len(content) > 9:
            del content[at]
        else:
            content.insert(at, data.draw(st.sampled_from(b"0123456789,[]{}\\ \n")))
    check_consistent(_with_length(bytes(content), data))


def _with_length(content: bytes, data: st.DataObject) -> bytes:
    """The length is mutated too, within the file: outside it is refused before anything is parsed."""
    (length,) = struct.unpack("<Q", content[:8])
    length = data.draw(st.sampled_from([min(length, len(content) - 8), max(0, len(content) - 8)]))
    return struct.pack("<Q", length) + content[8:]


@given(
    table=st.dictionaries(
        any_name,
        st.fixed_dictionaries({"dtype": anything, "shape": anything, "data_offsets": anything}) | anything,
        max_size=3,
    ),
    size=st.integers(0, 16),
)
@settings(max_examples=300, deadline=None)
def test_any_json_is_read_consistently_or_refused(table: dict[str, object], size: int) -> None:
    check_consistent(file_of(table, bytes(size)))


@given(content=st.binary(max_size=200), length=st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 200))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused_by_an_error_of_ours(content: bytes, length: int | None, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content if length is None else struct.pack("<Q", length) + content)
    try:
        header = read_header(path)
    except SurgeryError:
        return
    assert header.data_start <= path.stat().st_size


def test_safetensors_refuses_the_lies_too() -> None:
    """Ours are stricter where readers could disagree on what is meant, and where names carry a terminal's commands."""
    stricter = {"control characters in a name", "same name twice", "metadata names a key twice", "unknown field"}
    for lie, (content, _) in LIES.items():
        if lie in stricter:
            continue
        with pytest.raises((SafetensorError, TypeError, ValueError)):
            deserialize(content)
