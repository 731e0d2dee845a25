"""Hash bytes, texts and tensors with XXH3 (128 bits), the one hash of this project, as fast as memory.

It detects damage, mix-ups and differing results. It is no defence against deceit: whoever can change weights can also
change the manifest beside them. What pins a model against that is its commit on the Hub.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from xxhash import xxh3_128

DIGEST_BYTES = 16
KEY = "xxh3"  # the key of a hash in manifests


def hash_bytes(data: bytes | memoryview) -> bytes:
    """Return the hash of `data`, 16 bytes long."""
    return xxh3_128(data).digest()


def hash_parts(digests: Iterable[bytes]) -> str:
    """Return the hash of a tensor from its segments' hashes: the hash of their concatenation, as hex."""
    # Not the hash of all bytes in a row: segments are hashed by several workers at once, and in any order. The size of
    # a segment (`surgery.checkpoint.reader.SEGMENT`) is therefore part of every stored hash.
    return xxh3_128(b"".join(digests)).hexdigest()


def hash_text(text: str) -> str:
    """Return the hash of a text's UTF-8 bytes, as hex."""
    return xxh3_128(text.encode()).hexdigest()


def hash_tensors(hashes: Mapping[str, str]) -> str:
    """Return the hash of a set of tensors: that of the lines "name hash", sorted by name, as hex."""
    return hash_text("".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)))
