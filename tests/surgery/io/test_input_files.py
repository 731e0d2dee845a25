"""Files of strangers are opened only if they are files, and read only if they are small enough."""

from __future__ import annotations

import os
import socket
import tracemalloc
from pathlib import Path

import pytest

from surgery.errors import SurgeryError
from surgery.io.input_files import open_regular, read_bytes, read_utf8


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(SurgeryError, match="is a pipe, expected a file"):
        open_regular(tmp_path / "model.safetensors")


def test_devices_folders_and_sockets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets may have about 100 characters
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for path, reason in {"/dev/zero": "is a device", ".": "is a folder", "socket": "cannot be read"}.items():
            with pytest.raises(SurgeryError, match=reason):
                read_bytes(Path(path))


def test_the_limit_is_the_largest_size_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_bytes(path, limit=5) == b"12345"
    with pytest.raises(SurgeryError, match="has 5 bytes, more than the 4 that"):
        read_bytes(path, limit=4)


def test_a_large_file_is_refused_before_its_content_is_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(SurgeryError, match="has 1,099,511,627,776 bytes"):
        read_bytes(path)


def test_text_is_utf_8_without_its_mark(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\xef\xbb\xbfa\r\n")
    assert read_utf8(path) == "a\r\n"
    path.write_bytes(b"ab\xff")
    with pytest.raises(SurgeryError, match=r"is not UTF-8 text \(byte 2\)"):
        read_utf8(path)


def test_a_name_with_a_zero_byte_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="cannot be read"):
        open_regular(tmp_path / "a\0b")


def test_memory_is_taken_for_what_a_file_has_and_not_for_what_it_may_have(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"{}\n")
    tracemalloc.start()
    assert read_bytes(path, limit=1 << 30) == b"{}\n"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_file_without_a_size_of_its_own_is_read_to_its_end() -> None:
    path = Path("/proc/self/status")
    assert path.stat().st_size == 0 and len(read_bytes(path, limit=100_000)) > 100
    with pytest.raises(SurgeryError, match="more than the 100"):
        read_bytes(path, limit=100)
