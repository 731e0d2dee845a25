"""What leaves a folder, and what never does: only whole results of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.hub_server import HubServer
from support.publish import REPO, commits, edit_manifest, failure, folder_with

from surgery.publish.package import check_hashes, collect_files
from surgery.publish.upload import preview_push, push

pytestmark = pytest.mark.usefixtures("writable")


def test_only_finished_results_of_ours_are_pushed(server: HubServer, out: Path, tmp_path: Path) -> None:
    assert "no such folder. Give the folder that surgery wrote." in failure(tmp_path / "none")
    partial = out.rename(tmp_path / "x.partial")
    assert "is unfinished: it is what a job has done so far" in failure(partial)
    assert "x: is not there yet" in failure(tmp_path / "x")
    assert "has no surgery.json" in failure(folder_with(tmp_path / "bare", {"config.json": b"{}"}))
    run = folder_with(tmp_path / "run", {"surgery.json": b'{"schema": 1, "kind": "sweep"}'})
    assert "holds a sweep, expected weights that surgery wrote" in failure(run)
    assert not server.requests


def damage_size(out: Path) -> str:
    path = max(out.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    return "surgery.json says"


def damage_lost(out: Path) -> str:
    max(out.glob("*.safetensors")).unlink()
    return "surgery.json lists it, but it is not there"


def damage_table(out: Path) -> str:
    edit_manifest(out, lambda found: found["tensors"].popitem())
    return "1 tensor(s) are missing, unlisted, or of another dtype or shape than surgery.json says"


def damage_link(out: Path) -> str:
    (out / "LICENSE").symlink_to("/etc/passwd")
    return "only regular files are pushed"


@pytest.mark.parametrize("damage", [damage_size, damage_lost, damage_table, damage_link])
def test_damage_that_shows_is_refused_before_the_hub_is_asked(server: HubServer, out: Path, damage: Any) -> None:
    assert damage(out) in failure(out)
    assert not server.requests


def test_one_changed_bit_is_found_by_its_hash_and_nothing_is_made(server: HubServer, out: Path) -> None:
    path = max(out.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "1 tensor(s) are not what surgery.json says" in failure(out)
    assert not server.repos
    push(out, REPO, verify=False)
    assert server.repos


def test_an_output_that_changes_meanwhile_is_not_committed(server: HubServer, out: Path) -> None:
    config = out / "config.json"
    server.before("/preupload/", lambda: config.write_text("{}"))
    assert f"{config}: changed while it was being pushed, so nothing was committed" in failure(out)
    assert not commits(server)


def test_every_kind_of_result_is_whole(results: Path, tmp_path: Path) -> None:
    from surgery.vectors.extraction import extract
    from surgery.vectors.to_lora import extract_adapter

    tuned, base = str(results / "tuned"), str(results / "base")
    extract(tuned, base, tmp_path / "vector")
    extract_adapter(tuned, base, tmp_path / "adapter", rank=2)
    for kind in ("vector", "adapter"):
        package = collect_files(tmp_path / kind)
        assert package.kind == kind
        check_hashes(package)
        assert package.local_refs == [tuned, base]
        assert preview_push(tmp_path / kind, REPO).card.metadata["tags"][0] == "model-surgery"
