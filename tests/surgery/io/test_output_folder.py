"""Folders appear whole or not at all, written by one process at a time, and take the place of our own outputs only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.io.atomic import JOURNAL, MANIFEST, partial_path, write_file
from surgery.io.output_folder import (
    COMPLETE,
    REPLACED,
    SIDE_FILES,
    atomic_folder,
    check_free,
    create_partial_folder,
    extended_output,
    output_lock,
)


def files(folder: Path, prefix: str = "") -> dict[str, str]:
    """Relative path, after `prefix` → content."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {prefix + path.relative_to(folder).as_posix(): path.read_text() for path in found}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_output(out: Path, text: str, *, overwrite: bool = False) -> Path:
    """An output of ours, by its manifest."""
    with atomic_folder(out, overwrite=overwrite) as folder:
        write_file(folder / "a.txt", text)
        write_file(folder / "sub/b.txt", text)
        write_file(folder / MANIFEST, "{}")
    return out


def test_a_folder_appears_when_its_block_ends_and_not_before(tmp_path: Path) -> None:
    out = tmp_path / "deep/out"
    with atomic_folder(out) as partial:
        write_file(partial / "a/b.txt", "1")
        assert not out.exists()
    assert files(out) == {"a/b.txt": "1"}
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_after_an_error_the_earlier_folder_is_unchanged_and_the_next_run_starts_clean(tmp_path: Path) -> None:
    out = make_output(tmp_path / "out", "old")
    before = files(out)
    with pytest.raises(KeyboardInterrupt), atomic_folder(out, overwrite=True) as partial:
        write_file(partial / "half.txt", "half")
        raise KeyboardInterrupt
    assert files(out) == before
    with atomic_folder(out, overwrite=True) as partial:
        assert files(partial) == {}
        write_file(partial / "new.txt", "new")
    assert files(tmp_path) == {"out/new.txt": "new"} and names(tmp_path) == ["out"]


def test_files_to_keep_survive_a_kill_and_are_not_in_the_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_file(tmp_path / ".out.lock", "1")
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
    with atomic_folder(tmp_path / "out", suffix=".copying") as partial:
        assert partial == tmp_path / "out.copying" and files(partial) == {}
    assert names(tmp_path) == ["out"]
    treasure = write_file(tmp_path / "elsewhere/treasure.txt", "")
    (tmp_path / "new.copying").symlink_to(treasure.parent)
    with pytest.raises(SurgeryError, match="is a link, in the way"), atomic_folder(tmp_path / "new", suffix=".copying"):
        pass
    assert treasure.exists()


def test_a_folder_that_cannot_take_its_place_is_said(tmp_path: Path) -> None:
    write_file(tmp_path / "out/a", "")
    with pytest.raises(SurgeryError, match="exists already"), atomic_folder(tmp_path / "out"):
        pass
    write_file(tmp_path / "file", "")
    with pytest.raises(SurgeryError, match="cannot be written"), atomic_folder(tmp_path / "file/out"):
        pass


def test_an_earlier_output_is_replaced_only_when_all_of_it_is_ours(tmp_path: Path) -> None:
    out = make_output(tmp_path / "out", "old")
    assert json.loads((out / MANIFEST).read_text())[SIDE_FILES] == ["a.txt", "sub/b.txt"]
    with pytest.raises(SurgeryError, match="exists already"):
        check_free(out, overwrite=False)
    # What `surgery eval` adds, and a file that was being written when it was killed.
    for ours in ("README.md", "scores.json", ".scores.json.abcd0123"):
        write_file(out / ours, "")
    make_output(out, "new", overwrite=True)
    assert files(tmp_path) == files(out, "out/") and (out / "a.txt").read_text() == "new"


def test_what_a_later_command_adds_is_ours_and_a_users_file_beside_it_is_not(tmp_path: Path) -> None:
    out = make_output(tmp_path / "out", "old")
    write_file(out / "notes.txt", "mine")
    with extended_output(out):
        write_file(out / "proof.png", "")
        write_file(out / MANIFEST, "{}")  # written anew, without the list
    with pytest.raises(SurgeryError, match=r"will not remove it: notes\.txt\."):
        check_free(out, overwrite=True)
    (out / "notes.txt").unlink()
    check_free(out, overwrite=True)


@pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt", "undo/x", ".hidden", ".notes.abcdef01"])
def test_a_users_own_file_in_an_output_is_never_deleted(tmp_path: Path, name: str) -> None:
    out = make_output(tmp_path / "out", "old")
    write_file(out / name, "mine")
    with pytest.raises(SurgeryError, match=f"did not write there, so --overwrite will not remove it: {name}") as caught:
        check_free(out, overwrite=True)
    assert caught.value.exit_code == WRONG_USAGE
    with pytest.raises(SurgeryError, match="did not write"), atomic_folder(out, overwrite=True):
        pass
    assert (out / name).read_text() == "mine" and names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "manifest", ["", "[]", '{"files": 3, "side_files": "a.txt"}', '{"side_files": [["a.txt"], {}, null]}', "\x00"]
)
def test_a_manifest_that_lists_nothing_gives_nothing_up(tmp_path: Path, manifest: str) -> None:
    out = make_output(tmp_path / "out", "old")
    (out / MANIFEST).write_text(manifest)
    with pytest.raises(SurgeryError):
        check_free(out, overwrite=True)
    assert (out / "a.txt").exists()


def test_a_link_in_an_output_is_not_followed_when_it_is_replaced(tmp_path: Path) -> None:
    out = make_output(tmp_path / "out", "old")
    treasure = write_file(tmp_path / "elsewhere/treasure.txt", "")
    (out / "link").symlink_to(treasure.parent)
    with pytest.raises(SurgeryError, match="did not write there"):
        check_free(out, overwrite=True)
    manifest = json.loads((out / MANIFEST).read_text())
    write_file(out / MANIFEST, json.dumps(manifest | {SIDE_FILES: [*manifest[SIDE_FILES], "link"]}))
    make_output(out, "new", overwrite=True)
    assert treasure.exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("target", ["nowhere", "folder", "ours", "file", "out"])
def test_a_link_is_no_place_for_an_output_and_is_found_out_before_the_work(
    tmp_path: Path, target: str, overwrite: bool
) -> None:
    (tmp_path / "folder").mkdir()
    make_output(tmp_path / "ours", "old")
    write_file(tmp_path / "file", "")
    out = tmp_path / "out"
    out.symlink_to(tmp_path / target)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SurgeryError, match=r"is a link to .*Give the folder itself") as caught:
        check_free(out, overwrite=overwrite)
    assert caught.value.exit_code == WRONG_USAGE
    with pytest.raises(SurgeryError, match="is a link to"), atomic_folder(out, overwrite=overwrite):
        pass
    assert sorted(tmp_path.rglob("*")) == before and out.is_symlink()


def test_a_place_that_cannot_be_a_folder_is_found_out_before_the_work(tmp_path: Path) -> None:
    write_file(tmp_path / "file", "")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for out, reason in {
        Path("/"): "is no name of a new folder",
        Path(): "is no name of a new folder",
        Path(".."): "is no name of a new folder",
        tmp_path / "a/..": "is no name of a new folder",
        tmp_path / "a\0b": "is no name of a new folder",
        tmp_path / ("a" * 250): "has a name of 250 bytes, expected at most 246",
        tmp_path / ("é" * 124): "has a name of 248 bytes",
        tmp_path / "file": "exists already",
        tmp_path / "file/out": "lies in .*file, which is no regular file|cannot be written|which is a file",
        tmp_path / "file/a/b/out": "lies in|cannot be written",
        tmp_path / "dangling/out": "lies in .*dangling, which is a link to nothing",
        tmp_path / "/".join(["long" * 50] * 30) / "out": "cannot be written .File name too long",
    }.items():
        with pytest.raises(SurgeryError, match=reason) as caught:
            check_free(out, overwrite=False)
        assert caught.value.exit_code == WRONG_USAGE
    for name in ("file", "tmp"):
        (tmp_path / "tmp").mkdir(exist_ok=True)
        with pytest.raises(SurgeryError, match="was not written by this tool"):
            check_free(tmp_path / name, overwrite=True)
    assert names(tmp_path) == ["dangling", "file", "tmp"]
    # A trailing slash says the same.
    check_free(Path(f"{tmp_path}/new/"), overwrite=False)


@pytest.mark.parametrize("suffix", [".partial", COMPLETE, REPLACED])
def test_what_lies_beside_an_output_and_is_not_ours_is_never_written_to_or_deleted(tmp_path: Path, suffix: str) -> None:
    out = make_output(tmp_path / "out", "old")
    beside = partial_path(out, suffix)
    treasure = write_file(tmp_path / "elsewhere/treasure.txt", "")
    for make in (
        lambda: beside.symlink_to(treasure.parent),
        lambda: beside.symlink_to("nowhere"),
        lambda: beside.write_text("file"),
        lambda: os.mkfifo(beside),
        lambda: write_file(beside / "model.safetensors", "mine"),
    ):
        make()
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SurgeryError, match="in the way") as caught:
            check_free(out, overwrite=True)
        assert caught.value.exit_code == WRONG_USAGE and suffix in str(caught.value)
        with pytest.raises(SurgeryError, match="in the way"), atomic_folder(out, overwrite=True):
            pass
        assert sorted(tmp_path.rglob("*")) == before
        if beside.is_dir() and not beside.is_symlink():
            (beside / "model.safetensors").unlink()
            beside.rmdir()
        else:
            beside.unlink()


def test_a_kill_between_the_renames_is_mended_by_the_next_run(tmp_path: Path) -> None:
    out = make_output(tmp_path / "out", "old")
    expected = files(out)
    out.rename(partial_path(out, REPLACED))
    make_output(tmp_path / "new", "new").rename(partial_path(out, COMPLETE))
    write_file(tmp_path / ".out.lock", "1")
    with pytest.raises(SurgeryError, match=r"was being overwritten .* what was there before is in out.replaced"):
        check_free(out, overwrite=False)
    check_free(out, overwrite=True)
    with output_lock(out):
        assert files(out) == expected and names(tmp_path) == [".out.lock", "out"]
    assert names(tmp_path) == ["out"]


def test_an_error_between_the_renames_leaves_the_earlier_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make_output(tmp_path / "out", "old")
    expected, rename = files(out), Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.endswith(COMPLETE):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(SurgeryError, match=r"Input/output error.*run the same command again"):
        make_output(out, "new", overwrite=True)
    assert files(out) == expected
    monkeypatch.undo()
    make_output(out, "new", overwrite=True)
    assert (out / "a.txt").read_text() == "new" and names(tmp_path) == ["out"]


def test_a_half_deleted_earlier_output_is_deleted_by_the_next_run(tmp_path: Path) -> None:
    out = make_output(tmp_path / "out", "new")
    left = make_output(partial_path(out, REPLACED), "old")
    (left / "a.txt").unlink()
    make_output(out, "newest", overwrite=True)
    assert names(tmp_path) == ["out"]


def test_a_lock_file_that_a_kill_left_after_all_work_goes_with_the_next_look(tmp_path: Path) -> None:
    out = make_output(tmp_path / "out", "done")
    write_file(tmp_path / ".out.lock", "1")
    with pytest.raises(SurgeryError, match="exists already"):
        check_free(out, overwrite=False)
    assert names(tmp_path) == ["out"]


HOLDER = """
import sys
from pathlib import Path
from surgery.io.output_folder import atomic_folder
with atomic_folder(Path(sys.argv[1])) as partial:
    (partial / "a.txt").write_text("winner")
    print("ready", flush=True)
    input()
"""


def test_a_second_process_is_told_who_writes_and_harms_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        before = sorted(tmp_path.rglob("*"))
        busy = pytest.raises(SurgeryError, match=rf"another process is writing it .process {holder.pid}.")
        with busy as caught, atomic_folder(out):
            pass
        assert caught.value.exit_code == WRONG_USAGE and sorted(tmp_path.rglob("*")) == before
        holder.communicate("\n")
    assert holder.returncode == 0 and files(tmp_path) == {"out/a.txt": "winner"} and names(tmp_path) == ["out"]
    with pytest.raises(SurgeryError, match="exists already"), atomic_folder(out):
        pass


def test_after_a_kill_the_lock_is_free_and_the_folder_known_as_ours(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        holder.kill()
    assert names(tmp_path) == [".out.lock", "out.partial"]
    check_free(out, overwrite=False)
    with atomic_folder(out) as partial:
        assert files(partial) == {}
        write_file(partial / "b.txt", "second")
    assert files(tmp_path) == {"out/b.txt": "second"}


def test_threads_of_a_process_keep_each_other_out_and_one_may_ask_again(tmp_path: Path) -> None:
    out, errors = tmp_path / "out", list[SurgeryError]()

    def other() -> None:
        try:
            with output_lock(out):
                pass
        except SurgeryError as error:
            errors.append(error)

    with output_lock(out), output_lock(out):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert (tmp_path / ".out.lock").exists()
    assert "another process is writing it" in str(errors[0]) and names(tmp_path) == []
