"""Results become JSON that every parser reads."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from surgery.errors import SurgeryError
from surgery.io.json_io import read_json, to_json


@dataclass(frozen=True)
class Result:
    name: str
    values: tuple[float, ...]
    by_pair: dict[tuple[int, int], float]
    where: Path


def test_results_become_plain_json() -> None:
    result = Result("α", (1.5, math.nan, -math.inf), {(0, 1): 0.5}, Path("a/b"))
    assert json.loads(to_json(result)) == {
        "name": "α",
        "values": [1.5, None, None],
        "by_pair": {"0/1": 0.5},
        "where": "a/b",
    }
    assert "α" in to_json(result)


def test_sets_have_one_order() -> None:
    assert to_json({"names": {"b", "a", "c"}}) == to_json({"names": frozenset("cab")})


def test_a_text_of_too_many_values_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [' + "[]," * 1000 + "[]]}")
    assert len(read_json(path, max_values=3000)["a"]) == 1001
    with pytest.raises(SurgeryError, match="has about 2,004 values, more than the 2,000"):
        read_json(path, max_values=2000)


def test_a_link_to_nowhere_is_not_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("gone")
    with pytest.raises(SurgeryError, match="cannot be read"):
        read_json(tmp_path / "config.json", missing={})


def test_whole_numbers_are_no_larger_than_floats_can_be(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"model_max_length": 1000000000000000019884624838656, "digits": "' + "9" * 400 + '"}')
    assert read_json(path)["model_max_length"] == int(1e30)
    path.write_text('{"loss": ' + "9" * 400 + "}")
    with pytest.raises(SurgeryError, match=r"holds a whole number that is larger than 1\.8e\+308"):
        read_json(path)
