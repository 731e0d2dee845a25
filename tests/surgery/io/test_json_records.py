"""Records are read whole and valid, or refused with the key that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.errors import SurgeryError
from surgery.io.json_records import LARGEST_NUMBER, Strict, read_record, record_text


class Inner(Strict):
    values: tuple[float, ...]


class Outer(Strict):
    inner: Inner
    count: int = 0


def read(path: Path) -> Outer:
    return read_record(path, "test", 1, Outer, again="Make it again")


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record = Outer(inner=Inner(values=(1.5, -LARGEST_NUMBER)), count=3)
    path.write_text(record_text("test", 1, record), encoding="utf-8")
    assert read(path) == record


@pytest.mark.parametrize("number", ["1e101", "-1e300", "NaN", "Infinity", "1" + "0" * 101])
def test_numbers_of_which_sums_would_not_be_finite_are_refused_with_their_key(tmp_path: Path, number: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(f'{{"schema": 1, "kind": "test", "inner": {{"values": [1, {number}]}}}}', encoding="utf-8")
    with pytest.raises(SurgeryError, match=r"inner\.values\.1: got .*expected a number of at most 1e\+100"):
        read(path)
