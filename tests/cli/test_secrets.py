"""The user's token is nowhere: not on the terminal, not in a traceback, not in a file, whatever a server quotes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.hub_models import REPO
from support.hub_server import HubServer
from support.publish import REPO as PUSHED

SECRET = "hf_aVerySecretTokenOf34Characters42"
SCRIPT = "from cli.main import run; run()"
QUOTED = f"what of {SECRET}?"
STATUSES = (400, 401, 403, 404, 410, 418, 429, 451, 500)
RECIPE = """
recipes:
  move:
    about: Moves a vector and pushes it
    steps:
      vector:
        run: vector extract
        with: {{tuned: {tuned}, base: {base}}}
      moved:
        run: vector apply
        with: {{vector: $vector, target: {target}}}
    push: {{from: $moved, to: lab/reasoner, private: true, message: made with {secret}}}
"""

Run = Callable[..., str]


@pytest.fixture
def server_with_secret(server: HubServer, model: Path) -> HubServer:
    server.token = SECRET
    server.add(REPO, model)
    return server


@pytest.fixture
def surgery(server_with_secret: HubServer, tmp_path: Path) -> Iterator[Run]:
    """Runs a command in a process of its own; what it prints. At the end, what all of them wrote is searched."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": server_with_secret.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": SECRET,
        "SURGERY_CACHE": str(tmp_path / "own"),
        "COLUMNS": "80",
    }

    def run(*arguments: str | Path, **more: str) -> str:
        command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment | more, timeout=600, check=False
        )
        printed = done.stdout + done.stderr
        assert SECRET not in printed and "Secret" not in printed, printed
        return f"{done.returncode}\n{printed}"

    yield run
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub-model")
    (folder / "model.safetensors").write_bytes(b"no weights")
    (folder / "config.json").write_text("{}")
    return folder


def fail_all(server: HubServer, match: str, status: int, *methods: str) -> None:
    body, headers = json.dumps({"error": QUOTED}).encode(), {"X-Error-Message": QUOTED, "X-HF-Warning": f"x; {QUOTED}"}
    for method in methods:
        server.fail(match, status, body=body, method=method, times=99, headers=headers)


@pytest.mark.parametrize("status", STATUSES)
def test_a_failing_fetch_in_a_traceback(server_with_secret: HubServer, surgery: Run, status: int) -> None:
    fail_all(server_with_secret, "/api/models", status, "GET")
    printed = surgery("--debug", "inspect", REPO)
    assert "Traceback" in printed and f"{REPO}: " in printed


def test_failing_downloads_and_warnings(server_with_secret: HubServer, surgery: Run) -> None:
    fail_all(server_with_secret, "/config.json", 403, "HEAD")
    assert "HTTP 403" in surgery("--debug", "inspect", REPO)
    assert "HTTP 403" in surgery("inspect", REPO, "--json")
    server_with_secret._faults.clear()
    warning = {"X-HF-Warning": f"x; {QUOTED}"}
    server_with_secret.fail("/api/models", 200, body=QUOTED.encode(), times=9, headers=warning)
    assert "not a Hub's" in surgery("--debug", "eval", REPO, "--task", "lab_sums")


def test_passwords_of_an_address(server_with_secret: HubServer, surgery: Run) -> None:
    address = server_with_secret.url.replace("http://", "http://ann:hf_Secret-word@")
    fail_all(server_with_secret, "/api/models", 503, "GET")
    printed = surgery("--debug", "inspect", REPO, HF_ENDPOINT=address)
    assert "…@127.0.0.1" in printed


def test_words_of_a_command_that_hold_it(server_with_secret: HubServer, surgery: Run, tmp_path: Path) -> None:
    assert "hf_…" in surgery("inspect", f"no/such/{SECRET}")
    assert "hf_…" in surgery("--debug", "inspect", f"no/such/{SECRET}")
    assert "hf_…" in surgery("inspect", REPO, f"--{SECRET}")


@pytest.mark.parametrize("status", [400, 403, 500])
def test_a_failing_push(server_with_secret: HubServer, surgery: Run, out: Path, status: int) -> None:
    fail_all(server_with_secret, "/create", status, "POST")
    printed = surgery("--debug", "push", out, PUSHED, "--private")
    assert "Traceback" in printed and f"HTTP {status}" in printed


def test_a_recipe_that_names_it(server_with_secret: HubServer, surgery: Run, results: Path, tmp_path: Path) -> None:
    names = {name: str(results / name) for name in ("tuned", "base", "target")}
    # The user's own file may say it, who wrote it there; nothing that is made of it may.
    recipe = tmp_path.with_name(f"{tmp_path.name}-recipe.yaml")
    recipe.write_text(RECIPE.format(secret=SECRET, **names))
    printed = surgery("run", "move", "--file", recipe, "--out", tmp_path / "run", "--allow-push", PUSHED)
    assert printed.startswith("0\n"), printed
    assert [path for path, body in server_with_secret.bodies.items() if SECRET.encode() in body] == []
    commit = next(body for path, body in server_with_secret.bodies.items() if "/commit/" in path)
    assert b"made with hf_" in commit
