"""`surgery push` as a user meets it: what is on stdout, exit codes, and a command that was killed and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.hub_server import HubServer
from support.hub_uploads import sha256
from support.publish import REPO, TOKEN, commits, hashes_of, uploads

from surgery.hub import download as hub

SCRIPT = "from cli.main import run; run()"


class Command:
    """`surgery push` in a process of its own, against the test's Hub."""

    def __init__(self, server: HubServer, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "COLUMNS": "120",
        }
        self.environment.pop("HF_HUB_CACHE")

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SCRIPT, "push", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=self.environment,
        )

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        process = self.start(*arguments)
        stdout, stderr = process.communicate(timeout=600)
        return process.returncode, stdout, stderr


@pytest.fixture
def command(server: HubServer, tmp_path: Path) -> Command:
    return Command(server, tmp_path)


def test_the_page_is_all_there_is_on_stdout(server: HubServer, command: Command, out: Path) -> None:
    code, stdout, stderr = command(out, REPO, "--private", "--message", "First")
    assert (code, stdout) == (0, f"{server.url}/{REPO}\n")
    assert stderr.startswith("Nobody else has what it was made from") and stderr.count("\n") == 1
    assert server.repos[REPO].private
    code, stdout, stderr = command(out, REPO, "--json")
    assert code == 0
    assert f"{REPO} has all of it already: nothing was committed." in stderr
    found = json.loads(stdout)
    assert (found["changed"], found["commit"]) == (False, server.repos[REPO].revisions["main"])


def test_a_dry_run_lists_what_would_go_and_asks_nothing(server: HubServer, command: Command, out: Path) -> None:
    command.environment.pop("HF_TOKEN")
    code, stdout, stderr = command(out, REPO, "--dry-run")
    assert (code, stderr) == (0, "")
    assert all(path.name in stdout for path in out.iterdir())
    assert "pipeline_tag: text-generation" in stdout
    code, stdout, _ = command(out, REPO, "--dry-run", "--json")
    assert code == 0
    assert json.loads(stdout)["card"]["library_name"] == "transformers"
    assert server.requests == []


def test_faults_are_one_line_and_an_exit_code(server: HubServer, command: Command, out: Path) -> None:
    server.namespaces = set()
    code, stdout, stderr = command(out, REPO, "--no-verify")
    assert (code, stdout) == (1, "")
    assert stderr.splitlines()[-1].startswith(f"error: {REPO}: your token may not write here (HTTP 403")
    assert TOKEN not in stderr
    command.environment.pop("HF_TOKEN")
    code, stdout, stderr = command(out, REPO)
    assert (code, stdout) == (2, "")
    expected = f"error: {REPO}: pushing needs a token. To give one log in with `hf auth login`, or set HF_TOKEN.\n"
    assert stderr == expected


@pytest.mark.slow
def test_a_push_that_is_killed_goes_on_where_it_was(
    server: HubServer, command: Command, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = sorted(out.glob("*.safetensors"))
    before = {path: path.read_bytes() for path in sorted(out.rglob("*"))}
    last = sha256(shards[-1].read_bytes())
    reached = server.stall(last)
    process = command.start(out, REPO)
    assert reached.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    killed_out, killed_err = process.communicate(timeout=600)
    arrived = set(server.blobs)
    assert arrived and last not in arrived
    assert not commits(server), "readers would see half of it"
    assert {path: path.read_bytes() for path in sorted(out.rglob("*"))} == before

    server.requests.clear()
    code, stdout, stderr = command(out, REPO)
    assert (code, stdout) == (0, f"{server.url}/{REPO}\n")
    sent = {request.path.removeprefix("/uploads/") for request in uploads(server)}
    assert last in sent and not sent & arrived
    monkeypatch.setenv("HF_TOKEN", TOKEN)  # what is new is private
    assert hashes_of(hub.fetch(REPO, progress=False).folder) == hashes_of(out)
    assert TOKEN not in killed_out + killed_err + stdout + stderr
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in kept)
