"""Experts by name, and how strongly each is to be scaled."""

from __future__ import annotations

import pytest

from surgery.checkpoint.selectors import Expert, Head, by_layer, parse_expert_scales
from surgery.errors import SurgeryError


def test_experts_are_written_as_they_are_read() -> None:
    assert Expert.parse("L12E45") == Expert(12, 45) and str(Expert(12, 45)) == "L12E45"
    assert sorted([Expert(2, 0), Expert(0, 10), Expert(0, 9)]) == [Expert(0, 9), Expert(0, 10), Expert(2, 0)]
    assert by_layer([Expert(2, 1), Expert(0, 3), Expert(2, 0), Expert(2, 1)]) == {0: (3,), 2: (0, 1)}


def test_an_expert_is_no_head() -> None:
    assert Expert(1, 2) != Head(1, 2)
    assert {Expert(1, 2): 0, Head(1, 2): 1}[Head(1, 2)] == 1


@pytest.mark.parametrize("text", ["", "12E45", "L12", "l12e45", "L12H4", "L-1E0", "L1E2 ", "L1E٣", "L1234567E0"])
def test_what_is_no_expert_is_refused(text: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        Expert.parse(text)
    assert str(caught.value) == f"expert: got {text!r}, expected LAYER and EXPERT such as L12E45"
    assert caught.value.exit_code == 2


def test_scales_stand_behind_experts_or_apply_to_all() -> None:
    assert parse_expert_scales(["L1E2", "L0E3=0.5", "L1E2"], scale=64) == {Expert(1, 2): 64, Expert(0, 3): 0.5}
    with pytest.raises(SurgeryError) as caught:
        parse_expert_scales(["L1E2", "L1E2=0.5", "L1", "L0H0", "L0E0=x", "L0E0="], scale=64)
    assert str(caught.value).split("\n  ") == [
        "--expert: L1E2 is given twice, with β 64 and 0.5",
        "got 'L1', expected LAYER and EXPERT such as L12E45 or L12E45=0.5",
        "got 'L0H0', expected LAYER and EXPERT such as L12E45 or L12E45=0.5",
        "got 'L0E0=x', expected LAYER and EXPERT such as L12E45 or L12E45=0.5",
        "got 'L0E0=', expected LAYER and EXPERT such as L12E45 or L12E45=0.5",
    ]
