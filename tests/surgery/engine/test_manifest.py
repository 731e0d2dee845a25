"""Manifests: what was made of what, by which command, in words that a shell understands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from support.architectures import build, sibling

from surgery.engine.manifest import command_record, read_manifest
from surgery.engine.verification import verify
from surgery.errors import SurgeryError
from surgery.vectors.application import transfer


def test_the_command_line_in_the_manifest_can_be_typed() -> None:
    record = command_record(
        "vector apply", ["v", "my model"], scale=-0.5, include=["*.mlp.*"], scale_for={"a*": 2.0}, dtype=None
    )
    assert shlex.split(record["line"]) == [
        "surgery",
        "vector",
        "apply",
        "v",
        "my model",
        "-o",
        "OUT",
        "--scale",
        "-0.5",
        "--include",
        "*.mlp.*",
        "--scale-for",
        "a*=2.0",
    ]


def test_the_hashes_of_shards_do_not_depend_on_the_sharding(tmp_path: Path) -> None:
    one = build("llama", tmp_path / "one")
    many = build("llama", tmp_path / "many", max_shard_size="10KB")
    tuned = sibling(one, tmp_path / "tuned", seed=1)
    for name, base in (("a", one), ("b", many)):
        transfer(str(tuned), str(base), str(base), tmp_path / name)
    a, b = (read_manifest(tmp_path / name) for name in "ab")
    assert a["inputs"]["base"]["xxh3"] == b["inputs"]["base"]["xxh3"]
    assert a["tensors"] == b["tensors"]


def test_a_manifest_of_another_version_is_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "surgery.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(SurgeryError, match="has schema 99, this version reads 1"):
        read_manifest(tmp_path)
    with pytest.raises(SurgeryError, match=r"has no surgery.json"):
        read_manifest(tmp_path / "nowhere")


def test_verify_notices_missing_and_added_tensors(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    tuned = sibling(base, tmp_path / "tuned", seed=1)
    transfer(str(tuned), str(base), str(base), tmp_path / "out")
    manifest = json.loads((tmp_path / "out/surgery.json").read_text())
    manifest["tensors"]["ghost"] = manifest["tensors"].pop("lm_head.weight")
    (tmp_path / "out/surgery.json").write_text(json.dumps(manifest))
    report = verify(str(tmp_path / "out"))
    assert (report.missing, report.unlisted, report.ok) == (["ghost"], ["lm_head.weight"], False)
    assert "ghost" in report.sentence() and "lm_head.weight" in report.sentence()


def test_a_model_without_manifest_is_verified_and_said_to_have_none(tmp_path: Path) -> None:
    report = verify(str(build("llama", tmp_path / "m")))
    assert report.ok and "no manifest, so hashes were not compared" in report.sentence()
