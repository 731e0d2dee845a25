"""The hash of bytes, of tensors, of sets of tensors: values that manifests already out there rely on."""

from __future__ import annotations

from xxhash import xxh3_128

from surgery.io.hashing import hash_bytes, hash_parts, hash_tensors, hash_text


def test_the_hash_is_xxh3_with_128_bits() -> None:
    assert hash_bytes(b"").hex() == "99aa06d3014798d86001c324468d497f"  # the published test vector
    assert hash_text("α") == xxh3_128("α".encode()).hexdigest()


def test_a_tensors_hash_is_that_of_its_segments_hashes() -> None:
    assert hash_parts([b"a" * 16, b"b" * 16]) == xxh3_128(b"a" * 16 + b"b" * 16).hexdigest()


def test_a_checkpoints_hash_is_that_of_its_sorted_tensors() -> None:
    expected = xxh3_128(b"a 11\nb 22\n").hexdigest()
    assert hash_tensors({"b": "22", "a": "11"}) == hash_tensors({"a": "11", "b": "22"}) == expected
