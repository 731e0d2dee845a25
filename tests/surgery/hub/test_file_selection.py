"""Promises of surgery.hub.file_selection: weights and what they need are fetched, pickles and code never."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.hub_models import FETCHED, LEFT_ALONE, REPO, content, failure, folder_of
from support.hub_server import HubServer

from surgery.hub import download as hub


def test_fetch_gets_exactly_the_files_that_weights_need(server: HubServer, model: Path) -> None:
    server.add(REPO, model)
    snapshot = hub.fetch(REPO, progress=False)
    assert content(snapshot.folder) == FETCHED
    for name in LEFT_ALONE:
        assert not server.asked(f"/resolve/{snapshot.revision}/{name}"), name


def test_consolidated_weights_are_fetched_where_there_are_no_others(server: HubServer, tmp_path: Path) -> None:
    files = {"consolidated.safetensors": b"weights", "params.json": b"{}"}
    server.add(REPO, folder_of(tmp_path / "model", files))
    assert content(hub.fetch(REPO, progress=False).folder) == files


def test_file_names_are_never_read_as_patterns(server: HubServer, tmp_path: Path) -> None:
    files = {"model[1].safetensors": b"weights"}
    server.add(REPO, folder_of(tmp_path / "model", files | {"model1.safetensors.py": b""}))
    assert content(hub.fetch(REPO, progress=False).folder) == files


def test_pickles_are_refused_before_any_file_is_asked_for(server: HubServer, tmp_path: Path) -> None:
    files = {"pytorch_model.bin": b"pickle", "config.json": b"{}", "original/x.safetensors": b""}
    server.add(REPO, folder_of(tmp_path / "model", files))
    assert failure() == (
        "lab/tiny: holds weights only as Python pickles (pytorch_model.bin), which can run code when opened. "
        "Look on its page for a pull request that adds safetensors, and give lab/tiny@refs/pr/N; "
        "or convert it in a throw-away environment, "
        'AutoModelForCausalLM.from_pretrained("lab/tiny").save_pretrained("DIR"), and give DIR.'
    )
    assert not server.asked("/resolve/")


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"original/x.safetensors": b""}, "only in subfolders (original/x.safetensors)"),
        ({"README.md": b""}, "has no .safetensors file among its 1 files (README.md)"),
        ({}, "has no .safetensors file among its 0 files"),
    ],
)
def test_no_weights(server: HubServer, tmp_path: Path, files: dict[str, bytes], text: str) -> None:
    (tmp_path / "model").mkdir()
    server.add(REPO, folder_of(tmp_path / "model", files))
    assert text in failure()
