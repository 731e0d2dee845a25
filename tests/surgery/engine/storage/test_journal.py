"""Journals that are damaged: named, and never taken for work that was done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surgery.engine.storage import journal as module
from surgery.engine.storage.journal import NAME, Journal, SegmentRecord
from surgery.errors import SurgeryError

DIGEST = "0" * 32


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    with Journal(tmp_path, "f") as journal:
        journal.append(SegmentRecord(0, 0, DIGEST, (DIGEST,), (0.5,)))
    return tmp_path


def append(partial: Path, line: str) -> None:
    with (partial / NAME).open("a") as file:
        file.write(f"{line}\n")


def test_a_journal_is_read_back(partial: Path) -> None:
    with Journal(partial, "f") as journal:
        assert journal.record(0, 0) == SegmentRecord(0, 0, DIGEST, (DIGEST,), (0.5,))


@pytest.mark.parametrize(
    "fields",
    [
        [0, 1, DIGEST, [], [10**400]],
        [0, 1, DIGEST, [], ["x"]],
        [0, 1, "0", [], []],
        [-1, 1, DIGEST, [], []],
        [0, 1, DIGEST],
        {"a": 1},
        None,
    ],
)
def test_a_damaged_line_is_named(partial: Path, fields: object) -> None:
    append(partial, json.dumps(fields))
    with pytest.raises(SurgeryError, match=r"journal.jsonl: is damaged"):
        Journal(partial, "f")


def test_a_journal_that_no_job_writes_is_not_read_into_memory(partial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 50)
    with pytest.raises(SurgeryError, match="more than the 50 that one may have"):
        Journal(partial, "f")
