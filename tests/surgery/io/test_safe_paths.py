"""Names from files become paths of their folder, or an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from surgery.errors import SurgeryError
from surgery.io.safe_paths import (
    check_contained,
    contained_file,
    output_path,
    safe_name,
    safe_relative_path,
    unique_names,
)

HOSTILE = {
    "..": "leads to another folder",
    ".": "leads to another folder",
    "": "is no name",
    "a/b": "leads to another folder",
    "/etc": "leads to another folder",
    "a\\b": "leads to another folder",
    ".bashrc": "is hidden",
    "a\nb": "not printable",
    "a\x1b[31m": "not printable",
    "a\u202eb": "not printable",
    "a\x00b": "not printable",
    "\ud800": "not printable",
    "é" * 200: "is longer than 255 bytes",
}


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_hostile_name_is_refused_with_the_file_that_says_it(name: str) -> None:
    with pytest.raises(SurgeryError, match=HOSTILE[name]) as caught:
        safe_name(name, where="members/0.json", what="member")
    assert caught.value.where == "members/0.json"
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", [None, 3, ["a"], {"a": 1}])
def test_a_name_that_is_no_text_is_refused(name: object) -> None:
    with pytest.raises(SurgeryError, match="is no name"):
        safe_name(name, where="x")
    with pytest.raises(SurgeryError, match="is no path"):
        safe_relative_path(name, where="x")


@pytest.mark.parametrize("name", ["model.safetensors", "Qwen3-0.6B+x", "模型", "a b", "-o", "~x"])
def test_usual_names_stay_as_they_are(name: str) -> None:
    assert safe_name(name, where="x") == name


@pytest.mark.parametrize("name", ["/a", "a//b", "a/../b", "./a", "a/", "a/.git/config", "a/" * 600 + "b"])
def test_a_hostile_relative_path_is_refused(name: str) -> None:
    with pytest.raises(SurgeryError):
        safe_relative_path(name, where="x")
    assert safe_relative_path("members/0/tokenizer.json", where="x") == "members/0/tokenizer.json"


@pytest.mark.parametrize("names", [["a", "a"], ["Model", "model"], ["caf\u00e9", "cafe\u0301"]])
def test_two_names_of_one_file_are_refused(names: list[str]) -> None:
    with pytest.raises(SurgeryError, match="there twice"):
        unique_names(names, where="x")


def test_a_link_may_end_inside_its_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "real.txt").write_text("inside")
    (tmp_path / "secret").write_text("outside")
    (folder / "inside.txt").symlink_to("sub/real.txt")
    (folder / "outside.txt").symlink_to(tmp_path / "secret")
    (folder / "way").symlink_to(tmp_path)
    (folder / "circle").symlink_to("circle")
    (folder / "nowhere").symlink_to("gone")
    assert contained_file(folder, "inside.txt").read_text() == "inside"
    for name, reason in {
        "outside.txt": "leads out of its folder",
        "way/secret": "leads out of its folder",
        "circle": "cannot be read",
        "nowhere": "cannot be read",
        "sub": "is a folder",
    }.items():
        with pytest.raises(SurgeryError, match=reason):
            contained_file(folder, name)


def test_a_folder_that_is_a_link_itself_is_the_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_text("x")
    (tmp_path / "link").symlink_to("real")
    assert contained_file(tmp_path / "link", "a").read_text() == "x"


def test_links_of_the_hubs_cache_end_in_its_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123"
    (snapshot / "members" / "0").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "abc").write_text("x")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "members" / "0" / "config.json").symlink_to("../../../../blobs/abc")
    (repository / "refs").write_text("not a blob")
    (snapshot / "other").symlink_to("../../refs")
    assert contained_file(snapshot, "config.json").read_text() == "x"
    assert contained_file(snapshot / "members" / "0", "config.json").read_text() == "x"
    with pytest.raises(SurgeryError, match="leads out of its folder"):
        contained_file(snapshot, "other")


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SurgeryError, match="is a pipe"):
        contained_file(tmp_path, "pipe")


def test_outputs_go_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "way").symlink_to(tmp_path)
    assert output_path(tmp_path / "out", "a/b.safetensors") == tmp_path / "out" / "a" / "b.safetensors"
    for name in ("way/b", "../b", "/b"):
        with pytest.raises(SurgeryError):
            output_path(tmp_path / "out", name)


@pytest.mark.parametrize("name", ["a\0b", "sub/a\0b", "\0"])
def test_a_name_with_a_zero_byte_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(SurgeryError, match="no file has such a name"):
        check_contained(tmp_path, tmp_path / name)
