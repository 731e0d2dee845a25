"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from surgery.errors import SurgeryError
from surgery.io.atomic import atomic_replace, disk_error, write_file


def test_text_and_bytes_are_written_with_their_folder(tmp_path: Path) -> None:
    path = tmp_path / "a/b.txt"
    assert write_file(path, "é") == path and path.read_bytes() == "é".encode()
    write_file(path, b"\0")
    assert path.read_bytes() == b"\0"
    assert [entry.name for entry in path.parent.iterdir()] == ["b.txt"]


def test_a_new_file_may_be_read_by_all_and_an_old_one_keeps_its_mode(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a", "1")
    assert path.stat().st_mode & 0o777 == 0o644
    path.chmod(0o600)
    write_file(path, "2")
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o022, 0o002, 0])
def test_new_files_and_folders_have_the_modes_that_the_umask_allows(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_file(tmp_path / "new" / "text", "1")
        with atomic_replace(tmp_path / "new" / "tensors") as temporary:
            assert temporary.stat().st_mode & 0o777 == 0o666 & ~umask  # at no time more than at the end
            temporary.unlink()
            temporary.touch(0o600)  # as safetensors does
        write_file(tmp_path / "new" / "text", "2")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"new": 0o777 & ~umask, "text": 0o666 & ~umask, "tensors": 0o666 & ~umask}


@pytest.mark.parametrize("fault", [ValueError("bug"), KeyboardInterrupt()])
def test_an_error_in_the_block_leaves_what_was_there(tmp_path: Path, fault: BaseException) -> None:
    path = write_file(tmp_path / "a", "old")
    with pytest.raises(type(fault)), atomic_replace(path) as temporary:
        temporary.write_text("half")
        raise fault
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    write_file(tmp_path / "file", "")
    with pytest.raises(SurgeryError, match="cannot be written"):
        write_file(tmp_path / "file/inside", "")


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a", "old")
    write_file(tmp_path / ".a.0123456", "too short a name: a user's own")
    with atomic_replace(path) as temporary:
        (tmp_path / ".a.01234567").touch()
        write_file(path, "new")
        assert temporary.exists() and not (tmp_path / ".a.01234567").exists()
        temporary.write_text("newest")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".a.0123456", "a"] and path.read_text() == "newest"


def test_only_files_are_replaced_and_links_themselves(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SurgeryError, match="is a pipe, expected a file"):
        write_file(tmp_path / "pipe", "")
    with pytest.raises(SurgeryError, match="is a folder, expected a file"):
        write_file(tmp_path, "")
    outside = write_file(tmp_path / "outside", "kept")
    (tmp_path / "link").symlink_to(outside)
    write_file(tmp_path / "link", "own")
    assert outside.read_text() == "kept" and not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        ValueError("Disk quota exceeded (os error 122)"),
    ],
)
def test_a_full_disk_is_one_whoever_finds_it(error: Exception, tmp_path: Path) -> None:
    found = disk_error(error, tmp_path)
    assert found.what == "the disk is full" and "goes on where it stopped" in (found.hint or "")


def test_what_a_library_says_of_a_failed_write_is_one_line(tmp_path: Path) -> None:
    assert disk_error(RuntimeError("File too large (os error 27)\nmore"), tmp_path).what == (
        "cannot be written (File too large (os error 27) more)"
    )
