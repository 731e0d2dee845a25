"""Promises of surgery.publish.upload, kept by the real huggingface_hub client against a server on 127.0.0.1."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from support.hub_server import HubServer
from support.publish import REPO, TOKEN, commits, failure, files_at, folder_with, hashes_of, uploads

from surgery.hub import download as hub
from surgery.publish import commit_plan
from surgery.publish.package import collect_files
from surgery.publish.upload import push
from surgery.publish.upload_session import PushResult

pytestmark = pytest.mark.usefixtures("writable")


def test_everything_arrives_in_one_commit_and_pulls_back_to_the_same_hashes(server: HubServer, out: Path) -> None:
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    pushed = push(out, REPO)
    assert pushed == PushResult(
        REPO,
        "main",
        server.repos[REPO].revisions["main"],
        f"{server.url}/{REPO}",
        True,
        len(before),
        sum(map(len, before.values())) + len(files_at(server)["README.md"]) - len(before["README.md"]),
        (),
    )
    assert len(commits(server)) == 1
    sent = files_at(server)
    assert set(sent) == {*before, ".gitattributes"}
    assert {name: data for name, data in sent.items() if name in before and name != "README.md"} == {
        name: data for name, data in before.items() if name != "README.md"
    }
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before, "OUT was written to"
    snapshot = hub.fetch(REPO, progress=False)
    assert snapshot.revision == pushed.commit
    listed = json.loads((snapshot.folder / "surgery.json").read_text())["tensors"]
    assert hashes_of(snapshot.folder) == {name: entry["xxh3"] for name, entry in listed.items()}


def test_a_second_push_sends_no_weights_and_makes_no_commit(server: HubServer, out: Path) -> None:
    first = push(out, REPO)
    sent = len(uploads(server))
    assert sent == len(list(out.glob("*.safetensors"))) > 5
    second = push(out, REPO)
    assert len(uploads(server)) == sent and len(commits(server)) == 1
    assert (second.changed, second.commit) == (False, first.commit)


def test_only_what_changed_is_sent(server: HubServer, out: Path) -> None:
    push(out, REPO)
    sent = len(uploads(server))
    (out / "README.md").write_text("# New words\n")
    assert push(out, REPO).changed
    assert len(uploads(server)) == sent
    changed = [json.loads(line) for line in server.bodies[f"/api/models/{REPO}/commit/main"].splitlines()]
    assert [line["value"]["path"] for line in changed[1:]] == ["README.md"]


def test_weights_that_the_hub_knows_from_elsewhere_are_not_sent(server: HubServer, out: Path) -> None:
    push(out, REPO)
    sent = len(uploads(server))
    push(out, "lab/again")
    assert len(uploads(server)) == sent


def test_the_message_is_the_commit_s_and_names_the_command_by_itself(server: HubServer, out: Path) -> None:
    push(out, REPO)
    summary = json.loads(server.bodies[f"/api/models/{REPO}/commit/main"].splitlines()[0])["value"]["summary"]
    assert summary == "Push model made by vector transfer"
    (out / "README.md").write_text("# New words\n")
    push(out, REPO, message="A better card")
    summary = json.loads(server.bodies[f"/api/models/{REPO}/commit/main"].splitlines()[0])["value"]["summary"]
    assert summary == "A better card"


def test_private(server: HubServer, out: Path) -> None:
    push(out, REPO, private=True)
    assert server.repos[REPO].private
    push(out, REPO, private=True)
    push(out, "lab/open", public=True)
    assert not server.repos["lab/open"].private
    assert failure(out, "lab/open", private=True) == (
        "lab/open: is there already, and it is public. "
        f"Make it private at {server.url}/lab/open/settings, or push without --private."
    )


def test_a_branch_is_made_from_main_and_main_stays(server: HubServer, out: Path) -> None:
    pushed = push(out, REPO, revision="v1/rc")
    assert pushed.url == f"{server.url}/{REPO}/tree/v1%2Frc"
    assert set(files_at(server)) == {".gitattributes"}
    assert "surgery.json" in files_at(server, "v1/rc")
    again = push(out, REPO, revision="v1/rc")
    assert not again.changed


def test_a_pull_request_is_opened_by_the_commit_and_main_stays(server: HubServer, out: Path) -> None:
    server.add("elsewhere/model", folder_with(out.parent / "their", {"README.md": b"# theirs"}))
    server.repos[REPO] = server.repos.pop("elsewhere/model")
    server.namespaces = set()  # who may not write may propose
    pushed = push(out, REPO, pr=True, public=True)
    assert pushed.url == f"{server.url}/{REPO}/discussions/1"
    assert pushed.revision == "refs/pr/1"
    assert set(files_at(server)) == {"README.md"}
    server.namespaces = {"lab"}
    (out / "README.md").write_text("# New words\n")
    more = push(out, REPO, revision="refs/pr/1", public=True)
    assert (more.url, more.revision) == (pushed.url, "refs/pr/1")
    assert b"# New words" in files_at(server, "refs/pr/1")["README.md"]
    assert hub.fetch(REPO, "refs/pr/1", progress=False).revision == more.commit


def test_a_pull_request_needs_something_to_be_asked_of(server: HubServer, out: Path) -> None:
    assert "there is no such repository" in failure(out, pr=True)
    push(out, REPO)
    assert failure(out, revision="refs/pr/7") == f"{REPO}@refs/pr/7: has no such pull request. None"


@pytest.mark.parametrize("there", [True, False])
def test_gitattributes_are_written_where_there_are_none(server: HubServer, out: Path, there: bool) -> None:
    server.writes_attributes = there
    push(out, REPO)
    text = files_at(server)[".gitattributes"].decode()
    assert "*.safetensors filter=lfs diff=lfs merge=lfs -text\n" in text
    assert ("*.png filter=lfs" in text) is not there


def test_gitattributes_name_a_large_tokenizer(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tokenizer.json" not in commit_plan.gitattributes(collect_files(out))
    monkeypatch.setattr(commit_plan, "LFS_MIN_BYTES", 100)
    assert "tokenizer.json filter=lfs diff=lfs merge=lfs -text\n" in commit_plan.gitattributes(collect_files(out))


def test_hidden_files_and_caches_stay_here(server: HubServer, out: Path) -> None:
    names = {path.name for path in out.iterdir()}
    for name in (".env", ".cache/huggingface/x", "__pycache__/x.pyc"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")
    push(out, REPO)
    assert set(files_at(server)) == {*names, ".gitattributes"}


def test_what_an_earlier_push_left_for_loaders_goes_and_everything_else_stays(
    server: HubServer, results: Path, out: Path
) -> None:
    push(out, REPO)
    kept = {**files_at(server), "notes.md": b"by hand", "chat_template.jinja": b"{{ old }}"}
    server.commit(REPO, "main", {**kept, "model.safetensors": b"another layout"})
    pushed = push(out, REPO)
    assert pushed.removed == ("chat_template.jinja", "model.safetensors")
    assert "notes.md" in files_at(server)


def test_weights_of_another_origin_are_never_mixed_with_ours(server: HubServer, out: Path) -> None:
    server.add(REPO, folder_with(out.parent / "their", {"pytorch.safetensors": b"theirs", "README.md": b"x"}))
    assert failure(out) == (
        f"{REPO}: holds weights that surgery did not push, and OUT has no files of these names: pytorch.safetensors. "
        "Loaders would mix the two: push to another repository or --revision, or remove them there first."
    )
    assert not uploads(server)


def test_without_a_token_nothing_is_read(server: HubServer, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (out / "surgery.json").unlink()
    expected = f"{REPO}: pushing needs a token. To give one log in with `hf auth login`, or set HF_TOKEN."
    assert failure(out) == expected
    assert not server.requests


def test_a_token_that_only_reads_is_refused_before_weights_are_read(
    server: HubServer, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.role = "read"
    monkeypatch.setattr("surgery.publish.upload.check_hashes", lambda *_, **__: pytest.fail("weights were read"))
    assert "your token can only read" in failure(out)


def test_a_stale_token(server: HubServer, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    assert failure(out).startswith(f"{REPO}: the Hub does not accept your token. To replace it log in")


def test_the_token_goes_to_the_hub_alone(server: HubServer, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    messages: list[str] = []
    caplog.set_level(logging.DEBUG)
    server.fail("/uploads/", 500, method="PUT")
    push(out, REPO, notify=messages.append)
    assert all("authorization" not in request.headers for request in uploads(server))
    assert TOKEN.encode() not in b"".join(files_at(server).values())
    assert not any(TOKEN.encode() in body for body in server.bodies.values())
    assert TOKEN not in caplog.text + "".join(messages)
    shown = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "s3cret" not in "".join([*shown, *messages]), "addresses of uploads are signed"


def test_an_output_that_holds_the_token_is_not_sent(server: HubServer, out: Path) -> None:
    (out / "notes.txt").write_text(f"export HF_TOKEN={TOKEN}")
    assert "notes.txt: holds your Hub token, so nothing was sent" in failure(out)
    assert not server.requests


def test_a_hub_that_repeats_the_token_is_not_repeated(server: HubServer, out: Path) -> None:
    server.fail("/create", 403, method="POST", body=json.dumps({"error": f"{TOKEN} and hf_other may not"}).encode())
    assert "your token may not write here (HTTP 403: hf_… and hf_… may not)" in failure(out)
