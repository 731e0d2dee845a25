"""Files and folders appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.io.atomic import JOURNAL, atomic_folder, atomic_replace, create_partial_folder, partial_path, write_file


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


def files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_appears_when_its_block_ends_and_not_before(tmp_path: Path) -> None:
    out = tmp_path / "deep/out"
    with atomic_folder(out) as partial:
        write_file(partial / "a/b.txt", "1")
        assert not out.exists()
    assert files(out) == {"a/b.txt": "1"}
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_after_an_error_the_earlier_folder_is_unchanged_and_the_next_run_starts_clean(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_file(out / "old.txt", "old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(out, overwrite=True) as partial:
        write_file(partial / "half.txt", "half")
        raise KeyboardInterrupt
    assert files(out) == {"old.txt": "old"}
    with atomic_folder(out, overwrite=True) as partial:
        assert files(partial) == {}
        write_file(partial / "new.txt", "new")
    assert files(tmp_path) == {"out/new.txt": "new"}


def test_files_to_keep_survive_a_kill_and_are_not_in_the_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_file(partial_path(out) / "cache.jsonl", "work")
    write_file(partial_path(out) / "stray/x.txt", "stray")
    with atomic_folder(out, keep=["cache.jsonl", "never-written"]) as partial:
        assert files(partial) == {"cache.jsonl": "work"}
        write_file(partial / "result.txt", "done")
    assert files(tmp_path) == {"out/result.txt": "done"}


def test_a_job_that_can_be_resumed_is_discarded_only_with_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out"
    journal = write_file(partial_path(out) / JOURNAL, "")
    with pytest.raises(SurgeryError, match="another job's work") as caught, atomic_folder(out):
        pass
    assert caught.value.exit_code == WRONG_USAGE and journal.exists()
    assert files(create_partial_folder(out, overwrite=True)) == {}


def test_a_staging_folder_may_have_another_suffix_and_links_are_not_followed(tmp_path: Path) -> None:
    treasure = write_file(tmp_path / "elsewhere/treasure.txt", "")
    (tmp_path / "out.copying").symlink_to(treasure.parent)
    with atomic_folder(tmp_path / "out", suffix=".copying") as partial:
        assert partial == tmp_path / "out.copying" and files(partial) == {}
    assert treasure.exists() and (tmp_path / "out").is_dir()


def test_a_folder_that_cannot_take_its_place_is_said(tmp_path: Path) -> None:
    write_file(tmp_path / "out/a", "")
    with pytest.raises(SurgeryError, match="cannot be written"), atomic_folder(tmp_path / "out"):
        pass
    write_file(tmp_path / "file", "")
    with pytest.raises(SurgeryError, match="cannot be written"), atomic_folder(tmp_path / "file/out"):
        pass
