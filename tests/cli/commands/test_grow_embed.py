"""`surgery grow tokenizer` and `grow embed` as a user types them: the line in the manifest makes the same again."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from support.cli import Surgery, commands_in

from surgery.engine.manifest import read_manifest
from surgery.growth.embedding.embedding_folder import open_embedding


@pytest.fixture
def surgery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Surgery:
    """Runs a command in this process, in a folder with a text of chats."""
    lines = [json.dumps({"content": f"the {animal} sat on the mat"}) for animal in ("cat", "dog", "cow")]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines * 5))
    return commands_in(tmp_path, monkeypatch, capsys)


def test_the_recorded_lines_make_the_same_again(surgery: Surgery, tmp_path: Path) -> None:
    special = ("--special", "<end>", "--special", "<user>")
    made = surgery("grow", "tokenizer", "chats.jsonl", "--vocab", "300", *special, "--field", "content", "-o", "tok")
    assert made.code == 0, made.err
    settings = json.loads((tmp_path / "tok" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<end>" and "<user>" in json.dumps(settings)
    made = surgery("grow", "embed", "tok", "--width", "16", "--rows", "320", "--no-normalise", "-o", "emb")
    assert made.code == 0, made.err
    assert open_embedding(tmp_path / "emb").vocab_size == 320
    assert read_manifest(tmp_path / "emb")["report"]["normalised"] is False
    for name in ("tok", "emb"):
        _, *words = shlex.split(read_manifest(tmp_path / name)["command"]["line"].replace("OUT", f"{name}-again"))
        assert surgery(*words).code == 0
        for path in sorted((tmp_path / name).iterdir()):
            assert path.read_bytes() == (tmp_path / f"{name}-again" / path.name).read_bytes(), path
