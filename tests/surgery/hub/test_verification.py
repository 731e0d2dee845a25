"""Promises of surgery.hub.verification: a file with other bytes than the Hub lists is never used, online or offline."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest
from support.hub_models import FETCHED, REPO, WEIGHTS, content, failure
from support.hub_server import HubServer
from support.hub_uploads import git_hash

from surgery.errors import SurgeryError
from surgery.hub import download as hub
from surgery.hub import verification
from surgery.hub.listing import ListedFile
from surgery.runtime.cache_folder import cache_folder

SHARD = "model-00001-of-00002.safetensors"
SHA = hashlib.sha256(WEIGHTS).hexdigest()
OTHER = bytes(reversed(WEIGHTS))
ANEW = "What was wrong is removed: run the same command again to fetch it anew."


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "own"))
    return tmp_path / "own"


def test_weights_of_the_right_size_with_other_bytes_are_refused_and_fetched_anew(
    server: HubServer, model: Path
) -> None:
    server.add(REPO, model)
    server.blobs[SHA] = OTHER
    wrong = hashlib.sha256(OTHER).hexdigest()
    expected = (
        f"lab/tiny: the cache holds other bytes than the Hub lists: {SHARD} has SHA-256 {wrong}, expected {SHA}. {ANEW}"
    )
    assert failure() == expected
    assert failure() == expected, "the wrong bytes were kept"
    server.blobs[SHA] = WEIGHTS
    assert content(hub.fetch(REPO, progress=False).folder) == FETCHED


def test_small_files_are_checked_by_their_git_hash(server: HubServer, model: Path) -> None:
    server.add(REPO, model)
    wrong, listed = OTHER[:13], FETCHED["tokenizer.json"]
    server.fail("/tokenizer.json", 200, body=wrong, times=9)
    assert f"tokenizer.json has git SHA-1 {git_hash(wrong)}, expected {git_hash(listed)}" in failure()
    server._faults.clear()
    assert content(hub.fetch(REPO, progress=False).folder) == FETCHED


@pytest.mark.parametrize("recorded", [True, False])
def test_a_copy_that_changed_in_the_cache_is_refused_offline_too(
    server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path, recorded: bool
) -> None:
    commit = server.add(REPO, model)
    shard = (hub.fetch(REPO, progress=False).folder / SHARD).resolve()
    before = shard.stat()
    shard.chmod(0o600)
    shard.write_bytes(OTHER)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    if not recorded:
        next(own_cache.glob("hub/*")).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert f"{SHARD} has SHA-256" in failure()
    assert "no complete copy" in failure(), "the wrong copy is still there"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert content(hub.fetch(REPO, commit, progress=False).folder) == FETCHED


def test_what_other_programs_put_into_the_cache_is_checked(server: HubServer, model: Path, cache: Path) -> None:
    server.add(REPO, model)
    blobs = cache / "models--lab--tiny" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / SHA).write_bytes(OTHER)
    assert f"{SHARD} has SHA-256" in failure()


def test_a_hub_that_says_two_hashes_is_refused(server: HubServer, model: Path) -> None:
    server.add(REPO, model)
    other = hashlib.sha256(OTHER).hexdigest()
    size = {"X-Linked-Size": str(len(OTHER)), "X-Linked-ETag": f'"{other}"', "ETag": f'"{other}"'}
    commit = {"X-Repo-Commit": server.repos[REPO].revisions["main"], "Location": f"{server.blob_host}/blobs/{other}"}
    server.blobs[other] = OTHER
    server.fail(f"/{SHARD}", 302, method="HEAD", times=9, headers=size | commit)
    assert f"the Hub says two hashes of {SHARD}: {SHA} in its listing, and {other} with the file" in failure()
    server._faults.clear()
    assert content(hub.fetch(REPO, progress=False).folder) == FETCHED


def test_a_file_of_another_size_than_listed_is_refused(server: HubServer, model: Path) -> None:
    server.add(REPO, model)
    listed = FETCHED["tokenizer.json"]
    headers = {"ETag": f'"{git_hash(listed)}"', "X-Repo-Commit": server.repos[REPO].revisions["main"]}
    for method in ("HEAD", "GET"):
        server.fail("/tokenizer.json", 200, body=listed + b" ", method=method, headers=headers)
    assert failure() == f"lab/tiny: tokenizer.json has 14 bytes, expected 13. {ANEW}"
    assert content(hub.fetch(REPO, progress=False).folder) == FETCHED


def test_what_was_checked_is_not_hashed_again(
    server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    server.add(REPO, model)
    first = hub.fetch(REPO, progress=False)

    def refuse(*args: object) -> None:
        raise AssertionError("was hashed again")

    monkeypatch.setattr(verification, "_hashes", refuse)
    assert hub.fetch(REPO, progress=False) == first
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.fetch(REPO, progress=False) == first
    record = next(own_cache.glob("hub/*.json"))
    assert (stat.S_IMODE(record.stat().st_mode), stat.S_IMODE(record.parent.stat().st_mode)) == (0o600, 0o700)
    record.write_text("[damaged")
    with pytest.raises(AssertionError, match="was hashed again"):
        hub.fetch(REPO, progress=False)


def test_a_cache_of_ours_that_cannot_be_written_costs_only_time(
    server: HubServer, model: Path, own_cache: Path
) -> None:
    server.add(REPO, model)
    own_cache.write_text("a file in its place")
    assert content(hub.fetch(REPO, progress=False).folder) == FETCHED
    assert content(hub.fetch(REPO, progress=False).folder) == FETCHED


def test_a_link_out_of_the_cache_is_not_followed(server: HubServer, model: Path, tmp_path: Path) -> None:
    server.add(REPO, model)
    config = hub.fetch(REPO, progress=False).folder / "config.json"
    (tmp_path / "outside").write_bytes(b"{}")
    config.unlink()
    config.symlink_to(tmp_path / "outside")
    with pytest.raises(SurgeryError, match="leads out of its folder"):
        hub.fetch(REPO, progress=False)
    assert (tmp_path / "outside").exists()


def test_blobs_that_repositories_share_are_checked_by_the_name_of_the_first_link(
    server: HubServer, model: Path, cache: Path
) -> None:
    server.add(REPO, model)
    blob = (hub.fetch(REPO, progress=False).folder / SHARD).resolve()
    shared = cache / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(shared)
    assert content(hub.fetch(REPO, progress=False).folder) == FETCHED
    shared.write_bytes(OTHER)
    assert f"{SHARD} has SHA-256" in failure()
    assert not shared.exists(), "it would be linked again"


def test_a_file_of_which_no_hash_is_known_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "models--lab--tiny" / "snapshots" / "c" / ""
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    ref = hub._SnapshotRef(REPO, None)
    with pytest.raises(SurgeryError, match=r"no hash of config.json is known, so that it cannot be checked"):
        verification.verify_files(folder, [ListedFile("config.json", None, None, None)], ref)
    listed = ListedFile("config.json", 2, None, git_hash(b"{}"))
    verification.verify_files(folder, [listed], ref)
    # Checked once against a listing: known offline, where the file itself says nothing.
    verification.verify_files(folder, [ListedFile("config.json", None, None, None)], ref)


def test_the_record_is_in_our_cache(own_cache: Path) -> None:
    assert cache_folder("hub") == own_cache / "hub"
