"""What the tests of pushing share: results of real commands, and what the Hub was sent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.architectures import add_tokenizer, build, sibling
from support.hub_server import HubServer, Request

from surgery.checkpoint.checkpoint import read_folder
from surgery.checkpoint.reader import SourceFiles, TensorReader, hash_tensor
from surgery.errors import SurgeryError
from surgery.publish.upload import push
from surgery.vectors import application as vectors

REPO = "lab/reasoner"
TOKEN = "hf_accepted"


def make_results(folder: Path) -> Path:
    """`base`, `tuned`, `target`, tiny Llamas in shards; `model` = target + (tuned − base), `vector` = tuned − base."""
    base = build("llama", folder / "base", max_shard_size="5KB")
    for number, name in enumerate(("tuned", "target")):
        add_tokenizer(sibling(base, folder / name, seed=number))
    add_tokenizer(base)
    tuned, target = (str(folder / name) for name in ("tuned", "target"))
    vectors.transfer(tuned, str(base), target, folder / "model")
    return folder


def copy_of(result: Path, to: Path, **manifest: Any) -> Path:
    """`result` in a folder of its own, with the entries `manifest` in its surgery.json."""
    shutil.copytree(result, to)
    edit_manifest(to, lambda found: found.update(manifest))
    return to


def edit_manifest(out: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Changes a result's surgery.json by `edit`."""
    path = out / "surgery.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def hashes_of(folder: Path) -> dict[str, str]:
    """The hash of every tensor of the model in `folder`."""
    checkpoint = read_folder(folder)
    with SourceFiles(checkpoint.files) as files:
        reader = TensorReader(files)
        return {name: hash_tensor(reader, tensor) for name, tensor in checkpoint.tensors.items()}


def uploads(server: HubServer) -> list[Request]:
    """The requests so far that sent a large file's bytes."""
    return server.asked("/uploads/", method="PUT")


def commits(server: HubServer) -> list[Request]:
    """The requests so far to commit."""
    return server.asked("/commit/", method="POST")


def files_at(server: HubServer, revision: str = "main") -> dict[str, bytes]:
    """The files of `REPO` at the head of a branch, or a pull request."""
    repo = server.repos[REPO]
    return repo.commits[repo.revisions[revision]]


def failure(out: Path, repo_id: str = REPO, **options: Any) -> str:
    """What `push` says when it fails."""
    with pytest.raises(SurgeryError) as caught:
        push(out, repo_id, **options)
    assert "\n" not in str(caught.value)
    error: BaseException | None = caught.value
    while error is not None:  # as a traceback shows them
        assert TOKEN not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return f"{caught.value.where}: {caught.value.what}. {caught.value.hint}"


def folder_with(folder: Path, files: dict[str, bytes]) -> Path:
    """`folder` with `files`, by their paths in it."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder
