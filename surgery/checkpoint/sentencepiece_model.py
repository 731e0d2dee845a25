"""Read the pieces of a sentencepiece model (`tokenizer.model`) without the sentencepiece library.

The file is a protobuf message, of which two fields matter: `ModelProto { repeated SentencePiece pieces = 1 }` and
`SentencePiece { string piece = 1 }`. The wire format is that of https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator

# Of a message. The largest models have a million pieces, each of which is a field and a message of three.
MAX_FIELDS = 1_100_000
_PIECES, _PIECE = 1, 1  # field numbers
# Wire types; 3 and 4, groups, are deprecated and refused here.
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


def read_pieces(data: bytes) -> list[str]:
    """Return the pieces of a model in the order of their ids. Raises ValueError if `data` is not a whole model."""
    # A piece without text still takes an id: left out, it would shift all ids after it.
    pieces = [
        next((text.decode() for number, text in _fields(piece) if number == _PIECE), "")
        for number, piece in _fields(data)
        if number == _PIECES
    ]
    if not pieces:
        raise ValueError("no piece in it")
    return pieces


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the fields of a message: number, and the bytes of a length-delimited one (b"" for all others)."""
    at = count = 0
    while at < len(message):
        count += 1
        if count > MAX_FIELDS:
            raise ValueError(f"more than {MAX_FIELDS:,} fields")
        key, at = _varint(message, at)
        wire_type = key & 7  # the low three bits; the rest is the field's number
        start = at
        if wire_type == _VARINT:
            _, at = _varint(message, at)
        elif wire_type == _LENGTH_DELIMITED:
            length, start = _varint(message, at)
            at = start + length
        elif wire_type in (_FIXED64, _FIXED32):
            at += 8 if wire_type == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {start}")
        if at > len(message):
            raise ValueError(f"a field ends at byte {at} of {len(message)}")
        yield key >> 3, message[start:at] if wire_type == _LENGTH_DELIMITED else b""


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the number at byte `at`, and the position after it: 7 bits per byte, the lowest first."""
    value = 0
    # Ten bytes hold 64 bits; without the bound a damaged file would give numbers of any length.
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError(f"it breaks off at byte {at}")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number of more than 10 bytes before byte {at}")
