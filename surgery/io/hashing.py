"""The one hash of this project: XXH3 with 128 bits, as fast as memory.

It finds damage, mix-ups and results that differ. It is no defence against somebody who means to deceive: whoever can
change weights can change the manifest beside them. What pins a model against that is its commit on the Hub.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from xxhash import xxh3_128

KEY = "xxh3"  # what a hash is called in manifests


def hash_bytes(data: bytes | memoryview) -> bytes:
    """The hash of `data`, 16 bytes long."""
    return xxh3_128(data).digest()


def hash_parts(digests: Iterable[bytes]) -> str:
    """The hash of a tensor: that of its segments' hashes one after the other, as hex."""
    return xxh3_128(b"".join(digests)).hexdigest()


def hash_text(text: str) -> str:
    """The hash of a text's UTF-8 bytes, as hex."""
    return xxh3_128(text.encode()).hexdigest()


def hash_tensors(hashes: Mapping[str, str]) -> str:
    """The hash of a set of tensors: that of the lines "name hash", sorted by name, as hex."""
    return hash_text("".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)))
