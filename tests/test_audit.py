"""The audit of dependencies says honestly when it could not be done."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

AUDIT = Path(__file__).parents[1] / ".ci" / "audit.py"


@pytest.fixture
def audit(tmp_path: Path) -> dict[str, Any]:
    """The script's functions, which ask the file `answer` in place of PyPI."""
    functions: dict[str, Any] = runpy.run_path(str(AUDIT))["main"].__globals__
    functions["PROBE"] = (tmp_path / "answer").as_uri()
    return functions


def test_without_the_database_it_says_that_nothing_was_audited(
    audit: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit["main"](Path("constraints.txt"), tmp_path / "venv") == 0
    assert "SKIPPED, nothing was audited" in capsys.readouterr().out
    for answer in ("<html>", "{}", "[]"):
        (tmp_path / "answer").write_text(answer)
        assert audit["why_unreachable"]() is not None
    assert not (tmp_path / "venv").exists()


def test_with_the_database_every_pinned_version_is_audited(audit: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "answer").write_text(json.dumps({"vulnerabilities": []}))
    program = tmp_path / "venv" / "audit" / "bin" / "pip-audit"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\necho "$@" > "$0.arguments"\nexit 1\n')
    program.chmod(0o755)
    assert audit["main"](Path("constraints.txt"), tmp_path / "venv") == 1, "a vulnerability fails the run"
    assert "--requirement constraints.txt" in program.with_name("pip-audit.arguments").read_text()
