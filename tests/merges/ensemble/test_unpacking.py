"""A stranger's ensemble is unpacked into OUT or not at all, whatever its names and links say."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from support import architectures
from support.audit import tree, watch_files
from torch import zeros

from merges.ensemble.average import average_logits
from merges.ensemble.unpacking import unpack
from surgery.engine.options import ExecutionOptions
from surgery.errors import SurgeryError


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an ensemble of two siblings with tokenizers."""
    root = tmp_path_factory.mktemp("ensemble")
    a = architectures.add_tokenizer(architectures.build("llama", root / "a"))
    b = architectures.sibling(a, root / "b", seed=1)
    average_logits([str(a), str(b)], root / "out")
    return root / "out"


@pytest.fixture
def place(ensemble: Path, tmp_path: Path) -> Path:
    """Return a folder with a copy of the ensemble in `stranger`, and a file outside of it that must stay as it is."""
    shutil.copytree(ensemble, tmp_path / "stranger")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".bashrc").write_text("mine")
    (tmp_path / "home" / "private.json").write_text('{"secret": 1}')
    return tmp_path


def change_record(stranger: Path, i: int, **changes: object) -> None:
    path = stranger / "members" / f"{i}.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**record, **changes}), encoding="utf-8")


def files_of(stranger: Path, i: int = 1) -> list[dict[str, Any]]:
    files: list[dict[str, Any]] = json.loads((stranger / "members" / f"{i}.json").read_text(encoding="utf-8"))["files"]
    return files


def refuse(place: Path, message: str) -> None:
    """Assert that unpacking fails with `message`, reads nothing outside of the ensemble, and changes nothing."""
    before = tree(place)
    with watch_files() as watched, pytest.raises(SurgeryError, match=message) as caught:
        unpack(str(place / "stranger"), place / "work" / "out")
    watched.check(reads=[place / "stranger"], writes=[place / "work"])
    assert {name: content for name, content in tree(place).items() if not name.startswith("work")} == before
    assert not (place / "work" / "out").exists()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "",
        "../up",
        "/etc",
        "a/b",
        "a\\b",
        ".ssh",
        "a\nb",
        "a\x1b[31mb",
        "a\x00b",
        "\ud800",
        "n" * 300,
        3,
        None,
        ["a"],
        {"a": 1},
    ],
    ids=ascii,
)
def test_a_member_cannot_name_another_folder(place: Path, name: object) -> None:
    change_record(place / "stranger", 1, name=name)
    refuse(place, "1.json: (the member .* (leads|is no name|is hidden|holds|is longer)|holds .* half of a character)")


@pytest.mark.parametrize("name", ["a", "A"])
def test_two_members_of_one_name_are_refused(place: Path, name: str) -> None:
    change_record(place / "stranger", 0, name="a")
    change_record(place / "stranger", 1, name=name)
    refuse(place, "the member .* is there twice")


@pytest.mark.parametrize(
    "name",
    [
        "../up.safetensors",
        "/abs.safetensors",
        "home/../../x.safetensors",
        "./a.safetensors",
        "a//b.safetensors",
        ".bashrc",
        "a/.git/config",
        "",
        "a\x1b]0;x\x07.safetensors",
        "a" * 300 + ".safetensors",
        "x/" * 600 + "y.safetensors",
    ],
    ids=lambda name: ascii(name)[:30],
)
def test_a_file_of_a_member_cannot_leave_its_folder(place: Path, name: str) -> None:
    (file,) = files_of(place / "stranger")
    change_record(place / "stranger", 1, files=[{**file, "name": name}])
    refuse(place, "1.json: the file .* (leads|is no|is hidden|holds|is longer)")


def test_an_empty_member_name_with_a_file_below_the_root_writes_nothing(place: Path) -> None:
    # "" + "/" + "home/x/.bashrc" was an absolute path.
    (file,) = files_of(place / "stranger")
    change_record(place / "stranger", 1, name="", files=[{**file, "name": f"{place}/home/.bashrc".lstrip("/")}])
    refuse(place, "is no name|is hidden")


@pytest.mark.parametrize("names", [("a.safetensors", "a.safetensors"), ("a.safetensors", "A.safetensors")])
def test_two_files_of_one_path_are_refused(place: Path, names: tuple[str, str]) -> None:
    (file,) = files_of(place / "stranger")
    change_record(place / "stranger", 1, files=[{**file, "name": name} for name in names])
    refuse(place, "the file .* is there twice")


def test_a_file_in_a_folder_of_another_files_name_is_refused(place: Path) -> None:
    (file,) = files_of(place / "stranger")
    names = ("a.safetensors", "a.safetensors/b.safetensors")
    change_record(place / "stranger", 1, files=[{**file, "name": name} for name in names])
    refuse(place, "lies in a folder of another file's name")


def test_a_tensor_in_two_files_of_a_member_is_refused(place: Path) -> None:
    # Repeated a thousand times, a small ensemble would fill the disk.
    (file,) = files_of(place / "stranger")
    change_record(place / "stranger", 1, files=[{**file, "name": f"{i}.safetensors"} for i in range(3)])
    refuse(place, "has a tensor in two files")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.bin"])
def test_weights_cannot_take_the_place_of_another_file(place: Path, name: str) -> None:
    (file,) = files_of(place / "stranger")
    change_record(place / "stranger", 1, files=[{**file, "name": name}])
    refuse(place, r"is there twice|is no \.safetensors file")


@pytest.mark.parametrize("name", ["journal.jsonl", "Journal-1.jsonl", "model.safetensors.index.json"])
def test_a_member_cannot_take_the_place_of_what_is_written_beside_it(place: Path, name: str) -> None:
    change_record(place / "stranger", 1, name=name)
    refuse(place, "journal|another output file's name")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "run.sh", "notes"]
)
def test_a_member_keeps_no_file_of_another_kind(place: Path, name: str) -> None:
    save_file({"x": zeros(2)}, place / "stranger" / "members" / "1" / name)
    refuse(place, f"{name}: is no file that `surgery merge logits` keeps of a member")


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


SPECIAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "relative link": (link("../../../home/private.json"), "is a link that leads out of its folder, to .*private.json"),
    "broken link": (link("nowhere.json"), "cannot be read"),
    "circle": (link("notes.json"), "cannot be read"),
    "pipe": (os.mkfifo, "is a pipe, expected a file"),
    "folder": (Path.mkdir, "is a folder, expected a file"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_members_files_are_regular_and_its_own(place: Path, kind: str) -> None:
    make, message = SPECIAL[kind]
    make(place / "stranger" / "members" / "1" / "vocab.json")
    refuse(place, f"vocab.json: {message}")


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_members_record_is_regular_and_the_ensembles_own(place: Path, kind: str) -> None:
    path = place / "stranger" / "members" / "1.json"
    path.unlink()
    make, message = SPECIAL[kind]
    (place / "stranger" / "members" / "up").symlink_to("../../home")
    make(path) if kind != "relative link" else path.symlink_to("up/private.json")
    refuse(place, f"1.json: {message}" if kind != "circle" else "cannot be read")


def test_a_members_folder_that_leads_elsewhere_is_not_followed(place: Path) -> None:
    shutil.rmtree(place / "stranger" / "members" / "1")
    (place / "stranger" / "members" / "1").symlink_to(place / "home")
    refuse(place, "members/1: is a link that leads out of its folder, to .*home")


def test_a_link_inside_of_the_ensemble_is_followed(place: Path) -> None:
    inside = place / "stranger" / "members" / "1"
    (inside / "config.json").unlink()
    (inside / "config.json").symlink_to("../0/config.json")
    unpack(str(place / "stranger"), place / "out")
    assert not (place / "out" / "b" / "config.json").is_symlink()
    assert (place / "out" / "b" / "config.json").read_bytes() == (inside / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": []}, "is damaged"),
        ({"files": {}}, "is damaged"),
        ({"files": [3]}, "is damaged"),
        ({"files": [{"name": "model.safetensors", "size": True, "header": "{}"}]}, "is damaged"),
        ({"files": [{"name": "model.safetensors", "size": 2, "header": "\ud800"}]}, "half of a character"),
        ({"files": [{"name": "model.safetensors", "size": 3, "header": "{"}]}, "the header is not JSON"),
        ({"files": [{"name": "model.safetensors", "size": -1, "header": "{}"}]}, "belong to none"),
        ({"files": [{"name": "model.safetensors", "size": 1 << 62, "header": "{}"}]}, "belong to none"),
    ],
)
def test_a_damaged_record_is_refused(place: Path, change: dict[str, object], message: str) -> None:
    change_record(place / "stranger", 1, **change)
    refuse(place, message)


@pytest.mark.parametrize("members", [None, [], {}, 3, "ab", [{}] * 5])
def test_a_config_without_its_members_is_refused(place: Path, members: object) -> None:
    path = place / "stranger" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "members": members}))
    refuse(place, 'has no list of "members"|2.json: is missing')


@pytest.mark.parametrize("aliases", [None, [], {"members.1.lm_head.weight": ["x"]}, {"members.1.lm_head.weight": {}}])
def test_damaged_aliases_are_refused(place: Path, aliases: object) -> None:
    path = place / "stranger" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "aliases": aliases}))
    if aliases is not None:
        refuse(place, '"aliases": got .*, expected a table of texts')
    else:  # nothing is shared in it: no alias is needed
        unpack(str(place / "stranger"), place / "out")


def test_a_staging_folder_that_leads_elsewhere_is_not_written_into(place: Path) -> None:
    (place / "out.partial").symlink_to(place / "home")
    before = tree(place / "home")
    with pytest.raises(SurgeryError, match="is a link"):
        unpack(str(place / "stranger"), place / "out")
    assert tree(place / "home") == before


def test_a_planted_link_in_the_staging_folder_is_not_written_through(place: Path) -> None:
    staging = place / "out.partial"
    (staging / "a").mkdir(parents=True)
    (staging / "a" / "model.safetensors").symlink_to(place / "home" / ".bashrc")
    (staging / "journal.jsonl").symlink_to(place / "home" / ".bashrc")
    for overwrite in (False, True):
        with pytest.raises(SurgeryError):
            unpack(str(place / "stranger"), place / "out", options=ExecutionOptions(overwrite=overwrite))
    assert (place / "home" / ".bashrc").read_text() == "mine"


@pytest.mark.parametrize("umask", [0o077, 0o002, 0o022])
def test_files_have_the_modes_that_the_umask_allows(place: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        unpack(str(place / "stranger"), place / "out")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (place / "out").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}
