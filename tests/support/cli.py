"""Commands run in the test's own process: what they print, and how they leave."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cli import main


@dataclass(frozen=True)
class Result:
    """What a command printed, and how it left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Surgery = Callable[..., Result]


def run_command(patch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Runs a command in this process; its exit code."""
    patch.setattr(sys, "argv", ["surgery", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main.run()
    return int(left.value.code or 0)


def commands_in(
    folder: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, columns: int = 160
) -> Surgery:
    """What runs commands in this process, offline, in `folder`."""
    patch.setenv("COLUMNS", str(columns))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.chdir(folder)

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = run_command(patch, *arguments)
        said = capsys.readouterr()
        return Result(code, said.out, said.err)

    return run


def contents(folder: Path) -> dict[str, int]:
    """Every file in a folder, and when it was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
