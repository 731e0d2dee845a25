"""The chat templates that the fuzzer changes are rendered as they are, and the pieces that it puts in do no harm."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import fuzz_templates
from support.fuzz_templates import FILE, TEMPLATE_TARGETS, TEMPLATES, write_templates
from support.fuzzing import FuzzTarget, Workplace, run_input

from surgery.errors import SurgeryError
from surgery.models.chat_template import WORKER

TARGET = TEMPLATE_TARGETS[0]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workplace]:
    """A worker's folder in this process, with the templates as its corpus."""
    for name in ("HOME", "TMPDIR"):  # restored at the end
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path)
    write_templates(tmp_path / "corpus")
    place = Workplace(tmp_path / "worker", tmp_path / "corpus", seed=0)
    place.prepare()
    yield place


@pytest.mark.parametrize("name", TEMPLATES)
def test_unchanged_templates_are_rendered(name: str, tmp_path: Path) -> None:
    write_templates(tmp_path)
    TARGET.call(tmp_path / f"template-{name}", tmp_path / "out")


def test_every_light_piece_gives_a_text_or_a_refusal(tmp_path: Path) -> None:
    refused = 0
    for piece in fuzz_templates._LIGHT:
        (tmp_path / FILE).write_text(piece)
        try:
            TARGET.call(tmp_path, tmp_path / "out")
        except SurgeryError as error:
            assert "more than a second" not in str(error), piece  # it would not be light
            refused += 1
    assert 20 < refused < len(fuzz_templates._LIGHT)


def test_changed_templates_do_no_harm(place: Workplace) -> None:
    kinds = [run_input(TARGET, number, place).kind for number in range(60)]
    assert set(kinds) == {"result", "refused"}


def test_a_target_starts_its_program_and_no_other(place: Workplace) -> None:
    def start(*words: str) -> str:
        def call(folder: Path, out: Path) -> None:
            subprocess.run(words, check=True, capture_output=True, input=b"")

        return run_input(FuzzTarget("target", TARGET.seeds, (FILE,), call, program=WORKER), 0, place).why

    assert start(sys.executable, "-I", str(WORKER), "[]").startswith("CalledProcessError")
    assert "subprocess.Popen" in start(sys.executable, "-c", "", str(WORKER))
    assert "subprocess.Popen" in start("true")
