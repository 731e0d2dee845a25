"""What is private stays private: repositories are made private, and nothing made from private inputs becomes public."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.hub_server import HubServer
from support.publish import REPO, copy_of, edit_manifest, failure, folder_with, uploads

from surgery.errors import SurgeryError
from surgery.hub.visibility import Visibility, visibility
from surgery.publish.privacy import check_may_be_public, input_privacy
from surgery.publish.upload import push

pytestmark = pytest.mark.usefixtures("writable")


def made_from(out: Path, *repos: str) -> Path:
    """`out` with a manifest that names inputs from the Hub alone."""
    inputs = {str(number): {"ref": repo, "repo_id": repo, "xxh3": ""} for number, repo in enumerate(repos)}
    edit_manifest(out, lambda manifest: manifest.update(inputs=inputs))
    return out


@pytest.fixture
def inputs(server: HubServer, tmp_path: Path) -> None:
    """`org/secret`, private, and `org/open`, public."""
    folder = folder_with(tmp_path / "input", {"config.json": b"{}"})
    server.add("org/secret", folder, private=True)
    server.add("org/open", folder)
    server.add("datasets/org/texts", folder)
    server.add("datasets/org/diary", folder, private=True)


def test_a_repository_is_made_private_and_the_push_says_so(server: HubServer, out: Path) -> None:
    told: list[str] = []
    push(out, REPO, notify=told.append)
    assert server.repos[REPO].private
    assert f"{REPO}: is new, and private." in told
    push(out, "lab/open", public=True)
    assert not server.repos["lab/open"].private


def test_what_is_there_keeps_its_visibility(server: HubServer, out: Path) -> None:
    server.add(REPO, folder_with(out.parent / "there", {"README.md": b"x"}), private=True)
    push(out, REPO, public=True)
    assert server.repos[REPO].private
    push(out, "lab/open", public=True)
    push(out, "lab/open", public=True)
    assert not server.repos["lab/open"].private


@pytest.mark.usefixtures("inputs")
def test_what_was_made_from_a_private_repository_never_becomes_public(server: HubServer, out: Path) -> None:
    made_from(out, "org/open", "org/secret")
    assert failure(out, public=True) == (
        f"{REPO}: would be public, but it was made from what is private, or not known to be public: org/secret. "
        "Push to a private repository."
    )
    assert REPO not in server.repos
    server.add(REPO, folder_with(out.parent / "there", {"README.md": b"x"}))
    for options in ({}, {"public": True}, {"pr": True}, {"pr": True, "public": True}, {"revision": "branch"}):
        assert "would be public, but it was made from what is private" in failure(out, **options)
    assert not uploads(server)
    push(out, "lab/private")
    assert server.repos["lab/private"].private


@pytest.mark.usefixtures("inputs")
def test_what_was_made_from_public_repositories_may_go_to_public_ones(server: HubServer, out: Path) -> None:
    made_from(out, "org/open")
    push(out, REPO, public=True)
    assert not server.repos[REPO].private
    assert not push(out, REPO).changed


def test_local_files_go_to_public_repositories_only_if_the_command_says_so(server: HubServer, out: Path) -> None:
    server.add(REPO, folder_with(out.parent / "there", {"README.md": b"x"}))
    assert "Give --public if everybody may have it" in failure(out)
    assert "Give --public if everybody may have it" in failure(out, pr=True)
    # As a recipe's file says it: it does not know.
    assert "Give --public if everybody may have it" in failure(out, public=True, vouched=False)
    assert "Give --public if everybody may have it" in failure(out, "lab/new", public=True, vouched=False)
    assert "lab/new" not in server.repos and not uploads(server)
    assert push(out, REPO, public=True).changed


def test_private_and_public_are_not_one(out: Path) -> None:
    assert "got private and public" in failure(out, private=True, public=True)


def test_a_repository_that_becomes_public_in_between_gets_nothing(server: HubServer, out: Path) -> None:
    """A Hub that makes it public whatever it was asked, or somebody who was quicker."""
    there = folder_with(out.parent / "there", {"README.md": b"x"})
    server.before("/api/repos/create", lambda: server.add(REPO, there))
    assert "would be public, but it was made from what nobody else has" in failure(out)
    assert not uploads(server)


@pytest.mark.usefixtures("inputs")
def test_visibility_is_what_the_hub_says_and_private_where_it_says_nothing(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert visibility("org/open") == "public" and visibility("org/secret") == "private"
    assert visibility("org/none") == "hidden"
    assert visibility("org/texts", "dataset") == "public" and visibility("org/diary", "dataset") == "private"
    server.fail("org/open", 500, times=20)
    assert visibility("org/open") == "unknown"
    server.fail("org/secret", 200, body=b'{"id": "org/secret", "private": "no"}')
    assert visibility("org/secret") == "private"
    server.fail("org/secret", 200, body=b"[]")
    assert visibility("org/secret") == "unknown"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert visibility("org/open") == "unknown"


PLAN = "embed: org/emb\ncorpus: [org/diary:train, texts.txt, lab:python/code]\nstages: [{tokens: 1}]\n"


@pytest.mark.parametrize(
    ("manifest", "private", "local"),
    [
        ({"inputs": {"a": {"ref": "lab:sft"}}}, (), ()),
        ({"inputs": {"a": {"ref": "/somewhere/else"}}}, (), ("/somewhere/else",)),
        ({"inputs": {"a": {"ref": "org/secret@x", "repo_id": "org/secret"}}}, ("org/secret",), ()),
        ({"inputs": {"a": {"ref": "org/open+adapter", "repo_id": "org/open"}}}, (), ("adapter",)),
        ({"inputs": {"a": {"ref": "org/open+org/secret", "repo_id": "org/open"}}}, ("org/secret",), ()),
        ({"inputs": {"a": {"ref": "lab:sft+org/secret"}}}, ("org/secret",), ()),
        ({"command": {"options": {"data": "org/diary:train[0:3]"}}}, ("org/diary",), ()),
        ({"command": {"options": {"data": "org/texts:train"}}}, (), ()),
        ({"command": {"options": {"tune": "diary.jsonl"}}}, (), ("diary.jsonl",)),
        ({"command": {"files": {"plan.yml": PLAN}}}, ("org/diary", "org/emb"), ("texts.txt",)),
        ({"inputs": ["no", "table"], "command": "none"}, (), ()),
    ],
)
def test_inputs_are_found_wherever_a_manifest_names_them(
    manifest: dict[str, Any], private: tuple[str, ...], local: tuple[str, ...]
) -> None:
    def ask(repo_id: str, kind: str) -> Visibility:
        return "public" if repo_id in ("org/open", "org/texts") else "hidden"

    found = input_privacy(manifests=[manifest], ask=ask)
    assert (found.private, found.local) == (private, local)


def test_a_result_counts_as_what_it_was_made_from(out: Path, tmp_path: Path) -> None:
    middle = copy_of(made_from(out, "org/secret"), tmp_path / "middle")
    last = copy_of(out, tmp_path / "last", inputs={"a": {"ref": str(middle)}, "b": {"ref": str(tmp_path / "last")}})
    found = input_privacy([str(last)], ask=lambda repo_id, kind: "private")
    assert found.private == ("org/secret",) and not found.local


def test_many_inputs_end_in_a_refusal_and_not_in_a_long_wait() -> None:
    asked: list[str] = []
    inputs = {str(n): {"ref": f"{n} gone"} for n in range(20_000)}
    found = input_privacy(manifests=[{"inputs": inputs}], ask=lambda repo, kind: asked.append(repo) or "public")
    assert len(found.local) == 10_001 and not asked
    with pytest.raises(SurgeryError, match="would be public"):
        check_may_be_public(REPO, found, vouched=False)
