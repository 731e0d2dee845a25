"""Results become JSON that every parser reads."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from surgery.io.json_io import to_json


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
