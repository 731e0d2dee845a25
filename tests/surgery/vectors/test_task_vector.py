"""A vector folder is a stranger's: what its `donor/` holds is read where it lies in it, and nothing else is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.architectures import add_tokenizer, build, sibling
from support.audit import is_inside, tree, watch_files

from surgery.engine.options import ExecutionOptions
from surgery.errors import SurgeryError
from surgery.vectors.application import apply
from surgery.vectors.extraction import extract
from surgery.vectors.task_vector import DONOR, SKETCH, open_vector

ONE_THREAD = ExecutionOptions(threads=1)
LEADS_OUT = "is a link that leads out of its folder"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    base = add_tokenizer(build("llama", folder / "base"))
    tuned = add_tokenizer(sibling(base, folder / "tuned", seed=1))
    extract(str(tuned), str(base), folder / "vector", options=ONE_THREAD)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A folder with `vector`, its `base`, and `private/donor`, as good as the vector's own."""
    for name in ("base", "vector"):
        shutil.copytree(made / name, tmp_path / name)
    shutil.copytree(made / "vector" / DONOR, tmp_path / "private" / DONOR)
    return tmp_path


def refuse(place: Path, message: str, use: Callable[[], object]) -> None:
    """Assert that `use` raises a SurgeryError with `message`, having read nothing private and written nothing."""
    before = tree(place)
    with watch_files() as watched, pytest.raises(SurgeryError, match=message):
        use()
    watched.check(reads=[place / "vector", place / "base"])
    assert tree(place) == before


def apply_vector(place: Path) -> None:
    apply(str(place / "vector"), str(place / "base"), place / "out", options=ONE_THREAD)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", SKETCH])
def test_a_file_of_the_donor_that_leads_outside_is_not_followed(place: Path, name: str, absolute: bool) -> None:
    path = place / "vector" / DONOR / name
    path.unlink()
    path.symlink_to(place / "private" / DONOR / name if absolute else f"../../private/{DONOR}/{name}")
    assert path.is_file()  # it would be read, if links were followed
    refuse(place, f"{name}: {LEADS_OUT}", lambda: apply_vector(place))


@pytest.mark.parametrize("absolute", [False, True])
def test_a_donor_that_is_a_link_to_a_folder_outside_is_not_followed(place: Path, absolute: bool) -> None:
    path = place / "vector" / DONOR
    shutil.rmtree(path)
    path.symlink_to(place / "private" / DONOR if absolute else f"../private/{DONOR}")
    for use in (lambda: open_vector(place / "vector"), lambda: apply_vector(place)):
        refuse(place, f"{DONOR}: {LEADS_OUT}", use)


def test_a_folder_of_chat_templates_of_the_donor_that_leads_outside_is_not_followed(place: Path) -> None:
    (place / "private" / "templates").mkdir()
    (place / "private" / "templates" / "x.jinja").write_text("mine")
    (place / "vector" / DONOR / "additional_chat_templates").symlink_to("../../private/templates")
    before = tree(place)
    with watch_files() as watched:
        apply_vector(place)
    assert not any(is_inside(path, [place / "private"]) for path in watched.read | watched.written)
    assert {name: value for name, value in tree(place).items() if not name.startswith("out")} == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "is a pipe, expected a file"),
        (Path.mkdir, "is a folder, expected a file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, expected a file"),
        (lambda path: path.symlink_to("nowhere"), "cannot be read"),
        (lambda path: path.symlink_to(path.name), "cannot be read"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", SKETCH])
def test_what_is_no_file_of_the_donor_is_refused_and_waited_for_by_nobody(
    place: Path, name: str, make: Callable[[Path], None], message: str
) -> None:
    path = place / "vector" / DONOR / name
    path.unlink()
    make(path)
    refuse(place, f"{name}: {message}", lambda: apply_vector(place))


def test_links_inside_the_donor_are_followed(place: Path) -> None:
    apply_vector(place)
    expected = tree(place / "out")
    donor = place / "vector" / DONOR
    (donor / SKETCH).rename(donor / "kept.safetensors")
    (donor / SKETCH).symlink_to("kept.safetensors")
    apply(str(place / "vector"), str(place / "base"), place / "again", options=ONE_THREAD)
    assert tree(place / "again") == expected
