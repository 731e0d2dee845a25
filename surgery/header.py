"""The header of a safetensors file: read without trust, written to the byte.

A file is: 8 bytes, the header's length N as little-endian u64; N bytes of JSON, `{name: {dtype, shape,
data_offsets: [begin, end]}, "__metadata__": {str: str}}`, padded with spaces; then the tensors' bytes, each at
[begin, end) counted from the end of the header, without gaps and without overlaps.
"""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.dtypes import DTYPES, n_bytes
from surgery.errors import SurgeryError

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
ALIGNMENT = 8  # data begins at a multiple of this, so that 64-bit tensors are aligned when mapped
REFETCH = "The download is incomplete or the file is damaged: fetch it again."


@dataclass(frozen=True)
class Entry:
    """One tensor as its header describes it; `begin` and `end` are bytes from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header. `entries` are in the order of their bytes; `raw` is the first 8 + N bytes of the file."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    raw: bytes

    @property
    def data_start(self) -> int:
        """Where the first tensor's bytes begin in the file."""
        return len(self.raw)


def read_header(path: Path) -> Header:
    """Reads and checks the header of `path`; tensor bytes are not touched.

    Raises:
        SurgeryError: the file cannot be read, is cut short, or its header contradicts itself or the file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise SurgeryError(
                    f"the file has {size} bytes, too few for a safetensors header", where=path, hint=REFETCH
                )
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                raise SurgeryError(
                    f"the header claims {length:,} bytes, more than the format's limit of {MAX_HEADER_BYTES:,}",
                    where=path,
                    hint="This is not a safetensors file, or it is damaged.",
                )
            if 8 + length > size:
                raise SurgeryError(
                    f"the header ends at byte {8 + length:,} of {size:,}", where=path, hint=REFETCH
                )
            body = file.read(length)
    except OSError as error:
        raise SurgeryError(f"cannot be read ({error.strerror})", where=path) from error
    return parse_header(prefix + body, size, path)


def parse_header(raw: bytes, file_size: int, path: Path) -> Header:
    """Checks `raw` (length prefix and JSON) against a file of `file_size` bytes. Raises SurgeryError."""

    def bad(what: str, hint: str = "The file is damaged: fetch or write it again.") -> SurgeryError:
        return SurgeryError(what, where=path, hint=hint)

    try:
        table = json.loads(raw[8:].decode("utf-8"), object_pairs_hook=_unique_keys)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise bad("the header is not JSON", "This is not a safetensors file, or it is damaged.") from error
    except ValueError as error:
        raise bad(str(error)) from error
    if not isinstance(table, dict):
        raise bad("the header is not a JSON object")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise bad('"__metadata__" is not a table of strings')

    entries = sorted(
        (_entry(name, fields, bad) for name, fields in table.items()), key=lambda e: (e.begin, e.end)
    )
    position = 0
    data_size = file_size - len(raw)
    for entry in entries:
        if entry.end > data_size:
            raise bad(f'"{entry.name}" ends at byte {entry.end:,} of {data_size:,}', REFETCH)
        if entry.begin != position:
            kind = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise bad(f'"{entry.name}" {kind}: it begins at byte {entry.begin:,}, expected {position:,}')
        position = entry.end
    if position != data_size:
        raise bad(f"{data_size - position:,} bytes after the last tensor belong to none")
    return Header(tuple(entries), metadata, raw)


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> Header:
    """A header for tensors (name, dtype, shape) laid out one after the other in the order given."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    entries = []
    position = 0
    for name, dtype, shape in tensors:
        end = position + n_bytes(dtype, shape)
        entries.append(Entry(name, dtype, shape, position, end))
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    body = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-(8 + len(body)) % ALIGNMENT)
    return Header(tuple(entries), dict(metadata), struct.pack("<Q", len(body)) + body)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f'the header names "{twice}" twice')
    return table


def _entry(name: str, fields: Any, bad: Any) -> Entry:
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise bad(f'"{name}" lacks dtype, shape or data_offsets')
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f'"{name}" has dtype {dtype!r}, which is not a safetensors dtype')
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise bad(f'"{name}" has shape {shape!r} and data_offsets {offsets!r}, expected whole numbers')
    begin, end = offsets
    try:
        expected = n_bytes(dtype, shape)
    except ValueError as error:
        raise bad(f'"{name}": {error}') from error
    if end - begin != expected:
        raise bad(f'"{name}" takes {end - begin:,} bytes, but {dtype} {list(shape)} takes {expected:,}')
    return Entry(name, dtype, tuple(shape), begin, end)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
