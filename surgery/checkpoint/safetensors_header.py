"""Read and write headers of safetensors files; what is read is fully validated.

A file is: 8 bytes, the header's length N as little-endian u64; N bytes of JSON, `{name: {dtype, shape,
data_offsets: [begin, end]}, "__metadata__": {str: str}}`, padded with spaces; then the tensors' bytes, each at
[begin, end) counted from the end of the header, without gaps and without overlaps.
"""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from surgery.checkpoint.dtypes import DTYPES, n_bytes
from surgery.errors import SurgeryError
from surgery.io.input_files import MB, open_regular
from surgery.io.json_io import check_depth, check_json_size

# The format's own reader takes 100 MB, which would be parsed to gigabytes. The largest in use have a few MB: many
# experts in one file, or the captions of a LoRA's training in its metadata.
MAX_HEADER_BYTES = 32 * MB
MAX_HEADER_VALUES = 3_000_000  # numbers, names and lists: a tensor has about 10
MAX_TENSORS = 100_000  # of one file; the largest checkpoints have 1,000 or 2,000 in each of their files
MAX_NAME = 1_000  # characters of a tensor's name; the longest in use have about 150
MAX_RANK = 64  # dimensions of a tensor: torch's limit
MAX_EMPTY_DIMENSION = 1 << 24  # of a tensor without elements: no bytes of the file vouch for its other dimensions
MAX_NUMBER = (1 << 64) - 1  # what the format's own reader counts with
ALIGNMENT = 8  # data begins at a multiple of this, so that 64-bit tensors are aligned when mapped
SHOWN = 80  # characters of a damaged value that a message repeats
_FIELDS = {"dtype", "shape", "data_offsets"}
REFETCH = "The download is incomplete or the file is damaged: fetch it again."


class Entry(NamedTuple):
    """One tensor as its header describes it; `begin` and `end` are bytes from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A validated header. `entries` are in the order of their bytes; `raw` is the first 8 + N bytes of the file."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    raw: bytes

    @property
    def data_start(self) -> int:
        """The position of the first tensor's bytes in the file."""
        return len(self.raw)


def read_header(path: Path) -> Header:
    """Read and validate the header of `path`; tensor bytes are not read.

    Raises:
        SurgeryError: the file cannot be read, is cut short, or its header contradicts itself or the file.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise SurgeryError(
                    f"the file has {size} bytes, too few for a safetensors header", where=path, hint=REFETCH
                )
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                raise SurgeryError(
                    f"the header claims {length:,} bytes, more than the {MAX_HEADER_BYTES:,} that one may have",
                    where=path,
                    hint="This is not a safetensors file, or it is damaged.",
                )
            if 8 + length > size:
                raise SurgeryError(f"the header ends at byte {8 + length:,} of {size:,}", where=path, hint=REFETCH)
            body = file.read(length)
    except OSError as error:
        raise SurgeryError(f"cannot be read ({error.strerror})", where=path) from error
    return parse_header(prefix + body, size, path)


def parse_header(raw: bytes, file_size: int, path: Path) -> Header:
    """Validate `raw` (length prefix and JSON) against a file of `file_size` bytes. Raises SurgeryError."""

    def bad(what: str, hint: str = "The file is damaged: fetch or write it again.") -> SurgeryError:
        return SurgeryError(what, where=path, hint=hint)

    check_json_size(raw, where=path, max_values=MAX_HEADER_VALUES)
    # By the key that each has: counted without parsing, which would take a second for every 200,000 of them.
    if (count := raw.count(b'"data_offsets"')) > MAX_TENSORS:
        raise bad(f"the header names {count:,} tensors, more than the {MAX_TENSORS:,} that a file may have")
    # Halves of characters can only be there as escapes, since the whole text is UTF-8.
    has_halves = b"\\ud" in raw or b"\\uD" in raw
    try:
        # Python takes NaN and Infinity for JSON numbers, and the last of two equal keys.
        table = json.loads(
            raw[8:].decode("utf-8"),
            object_pairs_hook=_whole_texts if has_halves else _unique_keys,
            parse_int=_integer if b"-0" in raw else None,
            parse_constant=_reject,
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise bad("the header is not JSON", "This is not a safetensors file, or it is damaged.") from error
    except ValueError as error:
        raise bad(str(error)) from error
    if not isinstance(table, dict):
        raise bad("the header is not a JSON object")
    check_depth(table, where=path)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise bad('"__metadata__" is not a table of strings')

    if len(table) > MAX_TENSORS:
        raise bad(f"the header names {len(table):,} tensors, more than the {MAX_TENSORS:,} that a file may have")
    # By end too: an empty tensor begins where the next one does.
    entries = sorted((_entry(name, fields, bad) for name, fields in table.items()), key=lambda e: (e.begin, e.end))
    position = 0
    data_size = file_size - len(raw)
    for entry in entries:
        if entry.end > data_size:
            raise bad(f'"{entry.name}" ends at byte {entry.end:,} of {data_size:,}', REFETCH)
        # The format forbids gaps: bytes that belong to no tensor could be anything, a second file included.
        if entry.begin != position:
            kind = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise bad(f'"{entry.name}" {kind}: it begins at byte {entry.begin:,}, expected {position:,}')
        position = entry.end
    if position != data_size:
        raise bad(f"{data_size - position:,} bytes after the last tensor belong to none")
    return Header(tuple(entries), metadata, raw)


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> Header:
    """Return the header of tensors (name, dtype, shape) stored one after the other in the given order."""
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


def _integer(text: str) -> int:
    # Python reads −0 as 0; to the format's own reader it is no unsigned number.
    return _reject(text) if text == "-0" else int(text)


def _reject(text: str) -> NoReturn:
    raise ValueError(f"the header says {text}, which is no number here")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    # Readers differ in which of two equal keys they take: one file would be two models.
    if len(table) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the header names {_short(twice)} twice")
    return table


def _whole_texts(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Half of a surrogate pair is no UTF-8: terminals, manifests and outputs could not take the name.
    for text in (text for pair in pairs for text in pair if isinstance(text, str)):
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"the header says {_short(text, ascii)}, half of a character")
    return _unique_keys(pairs)


def _entry(name: str, fields: Any, bad: Any) -> Entry:
    if not name.isprintable():  # it would end up in terminals and logs
        raise bad(f"the name {_short(name)} holds control characters")
    if len(name) > MAX_NAME:
        raise bad(f"the name {_short(name)} has {len(name):,} characters, more than {MAX_NAME:,}")
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        raise bad(f'"{name}" is not described by dtype, shape and data_offsets')
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f'"{name}" has dtype {_short(dtype)}, which is not a safetensors dtype')
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise bad(f'"{name}" has shape {_short(shape)} and data_offsets {_short(offsets)}, expected whole numbers')
    if len(shape) > MAX_RANK:
        raise bad(f'"{name}" has {len(shape):,} dimensions, more than {MAX_RANK}')
    if 0 in shape and max(shape) > MAX_EMPTY_DIMENSION:
        raise bad(f'"{name}" has shape {_short(shape)}, more than a tensor without elements may claim')
    begin, end = offsets
    if not _is_countable(shape):
        raise bad(f'"{name}" has shape {_short(shape)}, more elements than a file can hold')
    try:
        expected = n_bytes(dtype, shape)
    except ValueError as error:
        raise bad(f'"{name}": {error}') from error
    if end - begin != expected:
        raise bad(f'"{name}" takes {end - begin:,} bytes, but {dtype} {_short(shape)} takes {expected:,}')
    return Entry(name, dtype, tuple(shape), begin, end)


def _naturals(values: Any) -> bool:
    # `type … is`, since isinstance would accept true and false as numbers.
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= MAX_NUMBER for value in values)


def _is_countable(shape: list[int]) -> bool:
    # Not math.prod: the product of a damaged shape could have millions of digits.
    count = 1
    for length in shape:
        count *= length
        if count > MAX_NUMBER:
            return False
    return True


def _short(value: Any, written: Callable[[object], str] = repr) -> str:
    text = written(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


PYTORCH = {"format": "pt"}  # transformers refuses files whose metadata does not say so
