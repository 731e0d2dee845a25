"""Heads by name, and how strongly each is to be scaled."""

from __future__ import annotations

import pytest

from surgery.checkpoint.selectors import Head, by_layer, parse_head_scales
from surgery.errors import SurgeryError


def test_heads_are_written_as_they_are_read() -> None:
    assert Head.parse("L12H7") == Head(12, 7) and str(Head(12, 7)) == "L12H7"
    assert sorted([Head(2, 0), Head(0, 10), Head(0, 9)]) == [Head(0, 9), Head(0, 10), Head(2, 0)]
    assert by_layer([Head(2, 1), Head(0, 3), Head(2, 0), Head(2, 1)]) == {0: (3,), 2: (0, 1)}


@pytest.mark.parametrize("text", ["", "12H7", "L12", "l12h7", "L-1H0", "L1H2 ", "L1H٣", "L1234567H0"])
def test_what_is_no_head_is_refused(text: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        Head.parse(text)
    assert str(caught.value) == f"head: got {text!r}, expected LAYER and HEAD such as L12H7"
    assert caught.value.exit_code == 2


def test_scales_stand_behind_heads_or_apply_to_all() -> None:
    assert parse_head_scales(["L1H2", "L0H3=0.5", "L1H2"], scale=-1.0) == {Head(1, 2): -1.0, Head(0, 3): 0.5}
    assert parse_head_scales(["L1H2"]) == {Head(1, 2): 0.0}
    with pytest.raises(SurgeryError) as caught:
        parse_head_scales(["L1H2", "L1H2=0.5", "L1", "L0H0=x", "L0H0="])
    assert str(caught.value).split("\n  ") == [
        "--head: L1H2 is given twice, with γ 0 and 0.5",
        "got 'L1', expected LAYER and HEAD such as L12H7 or L12H7=0.5",
        "got 'L0H0=x', expected LAYER and HEAD such as L12H7 or L12H7=0.5",
        "got 'L0H0=', expected LAYER and HEAD such as L12H7 or L12H7=0.5",
    ]
