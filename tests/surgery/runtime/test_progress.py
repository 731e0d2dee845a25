"""Progress bars: on stderr, with rate and time left, and only where somebody looks."""

from __future__ import annotations

import pytest

from surgery.runtime.progress import Unit, silent, terminal
from surgery.runtime.progress_lines import short


@pytest.mark.parametrize(("unit", "shown"), [("bytes", "3.0/3.0 MiB"), ("steps", "3145728/3145728")])
def test_the_bar_is_drawn_on_stderr_alone(
    unit: Unit, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with terminal("Writing", 3 << 20, unit) as advance:
        for _ in range(3):
            advance(1 << 20)
    out, err = capsys.readouterr()
    assert out == "" and "Writing" in err
    assert "100%" in err or shown in err.replace("\x1b[0m", "").replace("\x1b[32m", "")
    assert "/s" in err


def test_a_bar_inside_another_is_drawn_below_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with terminal("Scoring", 2, "steps") as outer:
        with terminal("m: text", 4, "steps") as inner:
            inner(4)
        outer(1)
        with terminal("n: text", 4 << 20) as inner:
            inner(4 << 20)
        outer(1)
    err = capsys.readouterr().err.replace("\x1b[0m", "").replace("\x1b[32m", "")
    assert "Scoring" in err and "2/2" in err and "m: text" in err and "n: text" in err


def test_tokens_are_counted_as_people_say_them_and_a_note_stands_beside_the_label(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with terminal("Stage 2", 4_500_000, "tokens") as advance:
        advance(2_000_000, "loss 3.214")
        advance(2_000_000)
        advance(500_000, "loss 3.125")
    err = capsys.readouterr().err.replace("\x1b[0m", "").replace("\x1b[32m", "")
    assert "Stage 2  loss 3.125" in err and "4.5M/4.5M" in err and "tokens/s" in err


def test_short_numbers() -> None:
    assert [short(n) for n in (0, 999, 1000, 12_345, 4_500_000, 1.2e9)] == ["0", "999", "1.0k", "12.3k", "4.5M", "1.2B"]


def test_nothing_is_drawn_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal("Writing", 10) as advance:
        advance(10, "a note")
    with silent("Writing", 10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")
