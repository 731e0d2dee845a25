"""run.json, damaged at every place: what is left is read, or the file is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.audit import watch_files
from support.damage import failures_of
from support.recipe_texts import RECIPE, read_text

from surgery.errors import SurgeryError
from surgery.io.json_io import to_json
from surgery.recipes.run.content_hashes import FileHashCache
from surgery.recipes.run.state import RunRecord, StepRecord, read_record


def test_damaged_records_of_a_run_are_named(tmp_path: Path) -> None:
    pipeline = read_text(tmp_path, RECIPE)
    lines = {node.name: "surgery" for node in pipeline.nodes}
    record = StepRecord("vector", "surgery", "done", "k", 1.5, "h", {"a": "b"}, None)
    run = tmp_path / "run"
    run.mkdir()
    RunRecord(pipeline, run, dict.fromkeys(lines, record), {"old": record}).write()
    path = run / "run.json"

    def use() -> None:
        for each in read_record(pipeline, run, lines).steps.values():
            assert {*map(type, each.files.values())} <= {str}
            assert each.state in ("waiting", "running", "done", "failed")
            assert each.seconds is None or each.seconds < 10**20

    assert failures_of(path, use) == []
    path.write_text(path.read_text().replace('"seconds": 1.5', '"seconds": "long"', 1))
    with pytest.raises(SurgeryError, match=r'run\.json: "seconds": got \'long\', expected a finite number\. Remove it'):
        use()


def test_a_damaged_cache_of_hashes_is_made_again(tmp_path: Path) -> None:
    file, path = tmp_path / "a.txt", tmp_path / "hashes.json"
    file.write_text("a")
    cache = FileHashCache(path)
    expected = cache.hash_file(file)
    cache.save()

    def use() -> None:
        found = FileHashCache(path).hash_file(file)
        assert isinstance(found, str)

    assert failures_of(path, use) == []
    for entries in ("x", [], {str(file): 3}, {str(file): [1]}, {str(file): "abcd"}):
        path.write_text(to_json({"schema": 1, "files": entries}))
        assert FileHashCache(path).hash_file(file) == expected


def test_a_link_or_a_pipe_in_the_place_of_an_output_is_not_read(tmp_path: Path) -> None:
    step, secret = tmp_path / "step", tmp_path / "secret.txt"
    step.mkdir()
    secret.write_text("secret")
    (step / "output.txt").write_text("secret")
    cache = FileHashCache()
    found = cache.hash_files(step)
    assert cache.is_intact(step, found)
    for place in (secret, Path("/dev/zero")):
        (step / "output.txt").unlink()
        (step / "output.txt").symlink_to(place)
        with watch_files() as watched:
            assert not FileHashCache().is_intact(step, found)
        assert watched.read == set()
    (step / "output.txt").unlink()
    os.mkfifo(step / "output.txt")
    assert not FileHashCache().is_intact(step, found)
    with pytest.raises(SurgeryError, match="is a pipe"):
        FileHashCache().hash_file(step / "output.txt")
