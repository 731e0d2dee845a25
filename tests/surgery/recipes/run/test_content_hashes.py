"""Folders are hashed whole, or refused: never walked without an end."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.errors import SurgeryError
from surgery.recipes.run import content_hashes
from surgery.recipes.run.content_hashes import FileHashCache


def test_a_folder_of_too_many_files_is_refused_before_any_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content_hashes, "MOST_ENTRIES", 10)
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("x")
    hashes = FileHashCache(tmp_path / "none.json")
    assert len(hashes.hash_files(tmp_path)) == 10
    (tmp_path / "more").mkdir()
    with pytest.raises(SurgeryError, match="holds more than 10 files and folders"):
        hashes.hash_content(tmp_path)


def test_a_folder_that_cannot_be_walked_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "file").write_text("x")
    hashes = FileHashCache(tmp_path / "none.json")
    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(SurgeryError, match="cannot be read \\(Permission denied\\)"):
        hashes.hash_content(tmp_path)


def test_a_record_that_names_no_possible_file_is_of_an_output_that_changed(tmp_path: Path) -> None:
    assert not FileHashCache().is_intact(tmp_path, {"a\0b": "0" * 32})
