"""Files written past the page cache hold what files written through it hold."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.engine.storage.direct_io import BLOCK, DirectFile, open_direct


@contextmanager
def opened(path: Path, size: int) -> Iterator[DirectFile]:
    """A file of `size` zeros; skips where the disk knows no direct writes."""
    path.write_bytes(bytes(size))
    direct = open_direct(path)
    if direct is None:
        pytest.skip("direct writes are not supported here")
    buffered = os.open(path, os.O_RDWR)
    try:
        yield DirectFile(direct, buffered)
    finally:
        os.close(direct)
        os.close(buffered)


def put(file: DirectFile, position: int, data: memoryview) -> None:
    for edge in file.write(position, data):
        file.complete(edge)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 6 * BLOCK), cuts=st.lists(st.integers(1, 6 * BLOCK), max_size=12), seed=st.integers(0, 9))
def test_pieces_in_any_order_make_the_whole_file(
    tmp_path_factory: pytest.TempPathFactory, size: int, cuts: list[int], seed: int
) -> None:
    data = random.Random(seed).randbytes(size)
    bounds = sorted({0, size, *(cut for cut in cuts if cut < size)})
    pieces = list(itertools.pairwise(bounds))
    random.Random(seed).shuffle(pieces)
    path = tmp_path_factory.mktemp("direct") / "file"
    with opened(path, size) as file:
        with ThreadPoolExecutor(3) as pool:
            for left in pool.map(lambda piece: file.write(piece[0], memoryview(data)[piece[0] : piece[1]]), pieces):
                for edge in left:
                    file.complete(edge)
        file.flush()
    assert path.read_bytes() == data


def test_a_block_is_written_as_soon_as_it_is_whole(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(2 * BLOCK)
    with opened(tmp_path / "file", len(data)) as file:
        put(file, 100, memoryview(data)[100:])
        assert (tmp_path / "file").read_bytes() == bytes(BLOCK) + data[BLOCK:]
        put(file, 0, memoryview(data)[:100])
        assert (tmp_path / "file").read_bytes() == data


def test_what_an_earlier_run_wrote_of_a_block_stays(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(BLOCK)
    with opened(tmp_path / "file", BLOCK) as file:
        put(file, 0, memoryview(data)[:1000])
        file.flush()
    descriptors = open_direct(tmp_path / "file"), os.open(tmp_path / "file", os.O_RDWR)
    assert descriptors[0] is not None
    again = DirectFile(descriptors[0], descriptors[1])
    put(again, 1000, memoryview(data)[1000:])
    again.flush()
    for descriptor in descriptors:
        os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == data


def test_a_system_without_direct_writes_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    assert open_direct(tmp_path / "file") is None
