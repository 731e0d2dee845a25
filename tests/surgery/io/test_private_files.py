"""Promises of surgery.io.private_files: a cache is its owner's alone, whatever the umask and whoever made it before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from surgery.io.private_files import make_private_folder


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_only_the_owner_may_enter(tmp_path: Path) -> None:
    make_private_folder(tmp_path / "a" / "cache")
    assert (mode(tmp_path / "a" / "cache"), mode(tmp_path / "a")) == (0o700, 0o777)


def test_an_open_folder_of_an_earlier_version_is_closed(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o755)
    make_private_folder(tmp_path / "cache")
    assert mode(tmp_path / "cache") == 0o700


def test_a_file_in_its_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(OSError):
        make_private_folder(tmp_path / "cache")
