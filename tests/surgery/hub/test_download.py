"""Promises of surgery.hub.download, kept by the real huggingface_hub client against a server on 127.0.0.1."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from support.hub_models import FETCHED, REPO, WEIGHTS, content, failure, folder_of
from support.hub_server import HubServer

from surgery.errors import SurgeryError
from surgery.hub import download as hub
from surgery.hub.settings import cache_dir

tqdm_module = sys.modules["huggingface_hub.utils.tqdm"]  # the package has a class of the same name


TOKENIZER_FILES = ("tokenizer*", "config.json", "additional_chat_templates/*.jinja")


def test_only_some_files_are_fetched_where_no_weights_are_needed(
    server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = server.add(REPO, model)
    chosen = ("config.json", "tokenizer.json", "tokenizer.model", "additional_chat_templates/tools.jinja")
    snapshot = hub.fetch(REPO, patterns=TOKENIZER_FILES, progress=False)
    assert content(snapshot.folder) == {name: FETCHED[name] for name in chosen}
    assert not any(request.path.endswith(".safetensors") for request in server.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.fetch(REPO, patterns=TOKENIZER_FILES, progress=False) == snapshot
    assert "no complete copy" in failure()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    server.fail(f"/api/models/{REPO}", 503)
    assert hub.fetch(REPO, commit, patterns=TOKENIZER_FILES, progress=False) == snapshot
    assert content(hub.fetch(REPO, progress=False).folder) == FETCHED


def test_a_fetch_leaves_no_thread_behind(server: HubServer, tmp_path: Path) -> None:
    server.add(REPO, folder_of(tmp_path / "tokenizer", {"tokenizer.json": b"{}"}))
    before = set(threading.enumerate())
    hub.fetch(REPO, patterns=("*.json",), progress=False)
    assert not [thread for thread in set(threading.enumerate()) - before if "tqdm" in thread.name]


def test_files_without_weights_can_be_asked_for_and_must_be_there(server: HubServer, tmp_path: Path) -> None:
    server.add(REPO, folder_of(tmp_path / "tokenizer", {"tokenizer.json": b"{}", "old/tokenizer.json": b"old"}))
    assert content(hub.fetch(REPO, patterns=("*.json",), progress=False).folder) == {"tokenizer.json": b"{}"}
    with pytest.raises(SurgeryError, match=r"has none of the files that are needed among its 2 files"):
        hub.fetch(REPO, patterns=("vocab.txt",), progress=False)


def test_a_look_counts_weights_once_offline_too(
    server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(REPO, model)
    snapshot = hub.fetch(REPO, progress=False)
    online = hub.list_repository(REPO)
    (snapshot.folder / "consolidated.safetensors").write_bytes(b"the same weights, which another program fetched")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert (
        hub.list_repository(REPO)
        == online
        == hub.RepositoryListing(REPO, snapshot.revision, len(WEIGHTS) + len(b"second"), 0)
    )


@pytest.mark.parametrize("revision", [None, "main", "v1", "refs/pr/1", "commit"])
def test_every_revision_is_pinned_to_its_commit(
    server: HubServer, model: Path, tmp_path: Path, revision: str | None
) -> None:
    other = folder_of(tmp_path / "other", {"model.safetensors": b"other"})
    main = server.add(REPO, model, commits={"v1": other, "refs/pr/1": other})
    asked = main if revision == "commit" else revision
    snapshot = hub.fetch(REPO, asked, progress=False)
    assert snapshot.revision == server.repos[REPO].revisions.get(asked or "main", main)
    assert re.fullmatch("[0-9a-f]{40}", snapshot.revision)
    assert snapshot.folder.name == snapshot.revision
    assert snapshot.repo_id == REPO


def test_a_branch_that_moved_is_fetched_anew(server: HubServer, model: Path) -> None:
    first = server.add(REPO, model)
    assert hub.fetch(REPO, progress=False).revision == first
    (model / "config.json").write_bytes(b'{"new": 1}')
    second = server.add(REPO, model)
    snapshot = hub.fetch(REPO, progress=False)
    assert snapshot.revision == second != first
    assert (snapshot.folder / "config.json").read_bytes() == b'{"new": 1}'
    assert len(server.asked("/blobs/", method="GET")) == 2, "unchanged weights came twice"


def test_a_branch_that_moves_during_the_download_gives_the_commit_that_was_listed(
    server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = server.add(REPO, model)
    check_space = hub._check_space

    def move(*args: object) -> None:
        check_space(*args)  # type: ignore[arg-type]
        server.commit(REPO, "main", {"model.safetensors": b"new"})

    monkeypatch.setattr(hub, "_check_space", move)
    snapshot = hub.fetch(REPO, progress=False)
    assert (snapshot.revision, content(snapshot.folder)) == (listed, FETCHED)


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME"])
def test_offline_uses_the_cache_and_asks_nothing(
    server: HubServer, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv(variable, str(cache))
    server.add(REPO, model)
    online = hub.fetch(REPO, progress=False)
    server.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.fetch(REPO, progress=False) == online
    assert hub.fetch(REPO, online.revision, progress=False) == online
    assert cache in online.folder.parents
    assert server.requests == []


def test_offline_without_a_copy_says_how_to_get_one(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert failure() == (
        f"lab/tiny: no complete copy in the cache at {cache}, and offline mode is on. "
        "Unset HF_HUB_OFFLINE once, so that it can be downloaded."
    )
    assert server.requests == []


@pytest.mark.parametrize("lost", ["model-00002-of-00002.safetensors", "tokenizer.json"])
def test_offline_refuses_a_copy_that_lacks_a_file(
    server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    server.add(REPO, model)
    (hub.fetch(REPO, progress=False).folder / lost).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no complete copy" in failure()


def test_a_copy_without_weights_is_no_copy(server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add(REPO, model)
    huggingface_hub.hf_hub_download(REPO, "config.json", endpoint=server.url, cache_dir=cache_dir())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no complete copy" in failure()


def test_a_cut_connection_is_resumed_where_it_broke(
    server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what is lost when a connection breaks
    server.add(REPO, model)
    server.cut(hashlib.sha256(WEIGHTS).hexdigest(), 300_000)
    assert content(hub.fetch(REPO, progress=False).folder) == FETCHED
    ranges = [request.headers["range"] for request in server.requests if "range" in request.headers]
    assert len(ranges) == 1
    assert 0 < int(ranges[0].removeprefix("bytes=").removesuffix("-")) <= 300_000


def test_a_connection_that_keeps_breaking_is_an_error_that_the_next_run_mends(server: HubServer, model: Path) -> None:
    server.add(REPO, model)
    server.cut("/blobs/", 0, times=50)
    assert failure().startswith(f"lab/tiny: cannot reach the Hub at {server.url}")
    server._faults.clear()
    assert content(hub.fetch(REPO, progress=False).folder) == FETCHED


def test_an_old_copy_of_a_branch_is_offered_but_never_used_in_silence(server: HubServer, model: Path) -> None:
    commit = server.add(REPO, model)
    snapshot = hub.fetch(REPO, progress=False)
    server.fail("/api/models", 503, times=2)
    hint = f"Set HF_HUB_OFFLINE=1 to use the copy in your cache, of commit {commit}."
    assert failure() == f"lab/tiny: cannot reach the Hub at {server.url} (HTTP 503). {hint}"
    assert hub.fetch(REPO, commit, progress=False) == snapshot, "a commit never changes"


def test_too_little_space_is_seen_before_the_download(
    server: HubServer, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(REPO, model)
    needed = sum(len(data) for data in FETCHED.values())
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    assert failure() == (
        f"lab/tiny: needs {needed:,} bytes in the cache at {cache}, where {needed - 1:,} are free. "
        "Free some space, or set HF_HUB_CACHE to a folder on a larger disk."
    )
    assert not server.asked("/resolve/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    hub.fetch(REPO, progress=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    assert hub.fetch(REPO, progress=False), "what is cached needs no space"


@pytest.mark.parametrize("private", [True, False])
def test_a_cache_that_we_create_and_private_models_are_their_owners_alone(
    server: HubServer, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    monkeypatch.setenv("HF_TOKEN", server.token)
    server.add(REPO, model, private=private)
    hub.fetch(REPO, progress=False)
    assert cache.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(cache)
    cache.mkdir(mode=0o755)  # of somebody who shares it
    hub.fetch(REPO, progress=False)
    assert cache.stat().st_mode & 0o777 == 0o755
    assert (cache / "models--lab--tiny").stat().st_mode & 0o777 == (0o700 if private else 0o755)


def test_progress_can_be_silenced_and_stays_off_stdout(
    server: HubServer, model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(REPO, model)
    monkeypatch.setenv("TQDM_POSITION", "-1")  # bars without a terminal
    monkeypatch.setattr(tqdm_module, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    hub.fetch(REPO, progress=False)
    assert capfd.readouterr() == ("", "")
    hub.fetch(REPO, server.add(REPO, folder_of(model, {"new.json": b"{}"})))
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "Fetching" in shown.err


@pytest.mark.parametrize(
    ("text", "repo_id", "revision"),
    [
        ("org/name", "org/name", None),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", None),
        ("org/name@main", "org/name", "main"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        (f"org/name@{'a' * 40}", "org/name", "a" * 40),
    ],
)
def test_hub_ids_are_taken_apart(text: str, repo_id: str, revision: str | None) -> None:
    assert hub.is_repo_id(text)
    assert hub.parse_repo_ref(text) == (repo_id, revision)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "a/b/c",
        "./name",
        "../name",
        "/abs",
        "~/name",
        "org/",
        "/name",
        "org/na me",
        "org/name.git",
        "org/a--b",
        "org/a..b",
        "org/name@",
        "org/.name.",
        "lab:sft",
        "C:\\a/b",
        "org/é",
        f"org/{'x' * 97}",
    ],
)
def test_other_texts_are_not_hub_ids(text: str) -> None:
    assert not hub.is_repo_id(text)
    with pytest.raises(SurgeryError, match="expected org/name or org/name@revision") as caught:
        hub.parse_repo_ref(text)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("revision", ["../../x", "a/../b", "/abs", "a b", "a\\b", "a\nb", "~x", "a:b"])
def test_revisions_never_leave_the_cache(revision: str) -> None:
    for attempt in (lambda: hub.fetch(REPO, revision), lambda: hub.parse_repo_ref(f"{REPO}@{revision}")):
        with pytest.raises(SurgeryError, match="cannot be a branch, tag or commit"):
            attempt()
