"""Commands without a terminal: progress in lines on stderr, and nothing of it on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.architectures import build
from support.cli import run_command

from surgery.runtime import progress_lines


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines come at once, as if every stage had run for its first seconds."""
    monkeypatch.setattr(progress_lines, "FIRST_AFTER", 0.0)


@pytest.mark.usefixtures("at_once")
def test_lines_go_to_stderr_and_the_result_alone_to_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build("llama", tmp_path / "model")
    assert (
        run_command(monkeypatch, "merge", "passthrough", model, "--scale", "2", "-o", tmp_path / "out", "--json") == 0
    )
    out, err = capsys.readouterr()
    json.loads(out)
    lines = [line for line in err.splitlines() if line.startswith("Writing: ")]
    assert lines and lines[-1].startswith("Writing: done, "), err


@pytest.mark.usefixtures("at_once")
def test_only_the_first_process_of_a_launcher_writes_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from surgery.runtime.progress import terminal

    assert run_command(monkeypatch, "--version") == 0  # lets lines be printed, as every command does
    for rank, shown in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        capsys.readouterr()
        with terminal("Writing", 2, "steps") as advance:
            advance(2)
        out, err = capsys.readouterr()
        assert out == "" and ("Writing: done, 2 steps" in err) == shown


def test_short_commands_say_nothing_of_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_lines, "FIRST_AFTER", 600.0)  # this machine may be busy
    model = build("llama", tmp_path / "model")
    assert run_command(monkeypatch, "merge", "passthrough", model, "--scale", "2", "-o", tmp_path / "out") == 0
    assert "Writing" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_log_has_the_lines_of_a_real_process(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model")
    program = (
        "from surgery.runtime import progress_lines; progress_lines.FIRST_AFTER = 0.0; from cli.main import program;"
        "program()"
    )
    words = ["merge", "passthrough", str(model), "--scale", "2", "-o", str(tmp_path / "out")]
    with (tmp_path / "log").open("wb") as log:
        subprocess.run(  # ours
            [sys.executable, "-c", program, *words], stderr=log, stdout=subprocess.PIPE, env=os.environ, check=True
        )
    text = (tmp_path / "log").read_text()
    assert "Writing: done, " in text and "\x1b" not in text and "\r" not in text
