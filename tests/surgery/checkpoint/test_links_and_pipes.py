"""What lies in a model's folder is read where it is a file of that folder, and nothing else of this machine is."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import architectures
from support.audit import tree, watch_files
from support.hub_server import HubServer

from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.tokenizer_files import list_tokenizer_files
from surgery.checkpoint.vocabulary import read_vocabulary
from surgery.errors import SurgeryError
from surgery.vectors.application import transfer


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "model"
    return architectures.add_tokenizer(architectures.build("llama", folder, max_shard_size="10KB"))


@pytest.fixture
def place(sharded: Path, tmp_path: Path) -> Path:
    """Return a folder with a model in `stranger`, and another one, which it has no business with, in `private`."""
    shutil.copytree(sharded, tmp_path / "stranger")
    shutil.copytree(sharded, tmp_path / "private")
    return tmp_path


def refuse(place: Path, message: str) -> None:
    """Assert that the model is not opened, and that nothing outside of its folder is read or written."""
    before = tree(place)
    with watch_files() as watched, pytest.raises(SurgeryError, match=message) as caught:
        open_checkpoint(place / "stranger")
    watched.check(reads=[place / "stranger"])
    assert tree(place) == before
    assert caught.value.hint or "link" not in message


def shard(folder: Path) -> str:
    return min(path.name for path in folder.glob("*.safetensors"))


def unix_socket(path: Path) -> None:
    # By a short name: the path of a socket has at most 107 bytes.
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


SPECIAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (os.mkfifo, "is a pipe, expected a file"),
    "socket": (unix_socket, "is a socket, expected a file"),
    "folder": (Path.mkdir, "is a folder, expected a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, expected a file"),
    "link to nowhere": (lambda path: path.symlink_to("nowhere"), "cannot be read"),
    "link to itself": (lambda path: path.symlink_to(path.name), "cannot be read"),
    "link to another model": (
        lambda path: path.symlink_to(f"../private/{path.name}"),
        "is a link that leads out of its folder, to .*private",
    ),
    "absolute link": (
        lambda path: path.symlink_to(path.parent.parent / "private" / path.name),
        "is a link that leads out of its folder, to .*private",
    ),
}
NEEDED = ["config.json", "model.safetensors.index.json", "SHARD", "model.safetensors"]


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", NEEDED)
def test_what_a_model_needs_is_a_file_of_its_folder(place: Path, name: str, kind: str) -> None:
    name = shard(place / "stranger") if name == "SHARD" else name
    if name == "model.safetensors":
        save_file({"x": torch.zeros(2)}, place / "private" / name)
    path = place / "stranger" / name
    path.unlink(missing_ok=True)
    make, message = SPECIAL[kind]
    make(path)
    refuse(place, f"{name}: {message}")


@pytest.mark.parametrize("kind", [kind for kind in SPECIAL if kind != "folder"])
@pytest.mark.parametrize("name", ["notes.txt", "LICENSE", "tokenizer.json", "generation_config.json", "run.py"])
def test_what_a_model_does_not_need_is_a_file_of_its_folder_too(place: Path, name: str, kind: str) -> None:
    (place / "private" / name).write_text("mine")
    path = place / "stranger" / name
    path.unlink(missing_ok=True)
    make, message = SPECIAL[kind]
    make(path)
    refuse(place, f"{name}: {message}")


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_is_of_its_folder(place: Path, name: str, kind: str) -> None:
    path = place / "stranger" / name
    path.unlink()
    make, message = SPECIAL[kind]
    make(path)
    with watch_files() as watched, pytest.raises(SurgeryError, match=f"{name}: {message}"):
        read_vocabulary(place / "stranger")
    watched.check(reads=[place / "stranger"])


def test_a_folder_of_chat_templates_that_leads_elsewhere_is_not_followed(place: Path) -> None:
    (place / "private" / "secret.jinja").write_text("mine")
    (place / "stranger" / "additional_chat_templates").symlink_to("../private")
    with pytest.raises(SurgeryError, match=r"secret.jinja: is a link that leads out of its folder"):
        list_tokenizer_files(place / "stranger")


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_is_of_its_folder(place: Path, name: str, kind: str) -> None:
    adapter = place / "adapter"
    adapter.mkdir()
    for folder in (adapter, place / "private"):
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "../stranger"}')
        save_file({"x": torch.zeros(2)}, folder / "adapter_model.safetensors")
    (adapter / name).unlink()
    make, message = SPECIAL[kind]
    make(adapter / name)
    for ref in (adapter, f"{place / 'stranger'}+{adapter}"):
        with watch_files() as watched, pytest.raises(SurgeryError, match=f"{name}: {message}"):
            open_checkpoint(ref)
        watched.check(reads=[adapter, place / "stranger"])


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_a_model_that_is_no_file_is_called_what_it_is(tmp_path: Path, kind: str) -> None:
    make, message = SPECIAL[kind]
    make(tmp_path / "model.safetensors")
    with pytest.raises(SurgeryError, match=message.replace("a file", "a file or a folder")):
        open_checkpoint(tmp_path / "model.safetensors")


def index(folder: Path, file: str) -> None:
    path = folder / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": {**weight_map, min(weight_map): file}}))


@pytest.mark.parametrize(
    "file",
    [
        "../private/{}",
        "sub/../../private/{}",
        "{}/../../private/{}",
        ".hidden/{}",
        "sub\\{}",
        "a\nb.safetensors",
        "/" + "{}",
        "sub//{}",
        "./{}",
        "x" * 300 + ".safetensors",
        "config.json",
    ],
    ids=ascii,
)
def test_an_index_names_shards_of_its_folder(place: Path, file: str) -> None:
    index(place / "stranger", file.replace("{}", shard(place / "private")))
    refuse(place, "index.json: ")


def test_a_shard_in_a_folder_that_leads_elsewhere_is_not_read(place: Path) -> None:
    (place / "stranger" / "sub").symlink_to("../private")
    index(place / "stranger", f"sub/{shard(place / 'private')}")
    refuse(place, "is a link that leads out of its folder, to .*private")


def test_links_that_stay_inside_are_followed(place: Path) -> None:
    folder, name = place / "stranger", shard(place / "stranger")
    expected = open_checkpoint(folder).tensors
    (folder / "sub").mkdir()
    (folder / name).rename(folder / "sub" / name)
    (folder / name).symlink_to(f"sub/{name}")
    (folder / "way").symlink_to("sub")
    (folder / "config.json").rename(folder / "sub" / "config.json")
    (folder / "config.json").symlink_to(folder / "way" / "config.json")
    found = open_checkpoint(folder)
    assert found.config["model_type"] == "llama"
    assert found.tensors.keys() == expected.keys()


def test_the_folder_itself_may_be_a_link(place: Path) -> None:
    (place / "link").symlink_to("stranger")
    with watch_files() as watched:
        assert open_checkpoint(place / "link").config["model_type"] == "llama"
    watched.check(reads=[place / "stranger"])


def test_hidden_files_do_not_count(place: Path) -> None:
    # As tar of macOS leaves them beside every file.
    for name in ("._config.json", "._model.safetensors.index.json", "._x.safetensors", ".notes.txt"):
        (place / "stranger" / name).symlink_to(place / "private" / "config.json")
    assert not [name for name in open_checkpoint(place / "stranger").side_files if name.startswith(".")]


def test_a_snapshot_of_the_hub_is_links_to_its_blobs(server: HubServer, sharded: Path, place: Path) -> None:
    server.add("org/model", sharded)
    opened = open_checkpoint("org/model")
    assert opened.folder is not None
    assert (opened.folder / "config.json").is_symlink()
    assert read_vocabulary(opened.folder) is not None
    # In its cache, too, a link may end in the blobs only.
    (opened.folder / "config.json").unlink()
    (opened.folder / "config.json").symlink_to(place / "private" / "config.json")
    with pytest.raises(SurgeryError, match="leads out of its folder"):
        open_checkpoint(opened.folder)


def test_blobs_of_one_repository_are_not_anothers(server: HubServer, sharded: Path, place: Path) -> None:
    server.add("me/private", place / "private")
    server.add("org/model", sharded)
    folder, mine = open_checkpoint("org/model").folder, open_checkpoint("me/private").folder
    assert folder is not None and mine is not None
    (folder / "notes.txt").symlink_to((mine / "config.json").resolve())
    with pytest.raises(SurgeryError, match=r"notes.txt: is a link that leads out of its folder"):
        open_checkpoint(folder)


def test_an_adapter_from_the_hub_cannot_choose_a_folder_of_this_machine(server: HubServer, place: Path) -> None:
    for base in (str(place / "private"), os.path.relpath(place / "private"), "../../../private", "~/private", "."):
        adapter = place / "adapter"
        adapter.mkdir(exist_ok=True)
        (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
        save_file({"x": torch.zeros(2)}, adapter / "adapter_model.safetensors")
        server.add("org/adapter", adapter)
        with watch_files() as watched, pytest.raises(SurgeryError, match=r"which of your folders|is an adapter"):
            open_checkpoint("org/adapter")
        assert not [path for path in watched.read if place / "private" in path.parents]


def test_the_base_that_an_adapter_names_is_told(place: Path) -> None:
    adapter, base = place / "adapter", place / "private"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "../private"})
    )
    checkpoint = open_checkpoint(base)
    module = next(name for name in checkpoint.tensors if "q_proj" in name).removesuffix(".weight")
    out, width = checkpoint.tensors[f"{module}.weight"].shape
    factors = {"A": torch.ones(1, width), "B": torch.ones(out, 1)}
    save_file(
        {f"base_model.model.{module}.lora_{key}.weight": value for key, value in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    assert open_checkpoint(f"{base}+{adapter}").named_base is None
    assert open_checkpoint(adapter).named_base == f"{adapter}/../private"
    planned = transfer(str(adapter), str(base), str(base), place / "out", dry_run=True)
    assert planned.preflight[f"base of {adapter}"] == f"{adapter}/../private, which the adapter names"
    transfer(str(adapter), str(base), str(base), place / "out")
    inputs = json.loads((place / "out" / "surgery.json").read_text())["inputs"]
    assert inputs["tuned"]["named_base"] == f"{adapter}/../private"
    assert "named_base" not in inputs["target"]
