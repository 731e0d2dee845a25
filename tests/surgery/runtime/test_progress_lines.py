"""Progress where stderr is no terminal: a line for each stage, and one every half minute."""

from __future__ import annotations

import io
import itertools
import os
import signal
import sys
import time

import pytest

from surgery.runtime import progress
from surgery.runtime.progress import Unit, terminal
from surgery.runtime.progress_lines import EVERY, LineReporter, binary, duration


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Log:
    """A reporter without a thread, its clock, and its lines."""

    def __init__(self) -> None:
        self.clock, self.lines = Clock(), list[str]()
        self.reporter = LineReporter(self.lines.append, clock=self.clock, beat=None)

    def wait(self, seconds: float) -> list[str]:
        """Let time go by in steps of a second; return the lines of it."""
        before = len(self.lines)
        for _ in range(round(seconds)):
            self.clock.now += 1
            self.reporter.tick()
        return self.lines[before:]


def test_a_stage_is_told_of_soon_every_half_minute_and_at_its_end() -> None:
    log = Log()
    with log.reporter.stage("lab:base", 400, "steps") as advance:
        assert log.wait(1) == []
        assert log.wait(1) == ["lab:base: 0 of 400 steps (0 %)"]
        advance(60, "")
        assert log.wait(29) == []
        assert log.wait(1) == ["lab:base: 60 of 400 steps (15 %), 2.0 steps/s, 2 min 50 s left"]
        advance(30, "loss 3.2")
        assert log.wait(30) == ["lab:base: 90 of 400 steps (22 %), 1.0 steps/s, 5 min 10 s left, loss 3.2"]
        assert log.wait(60) == ["lab:base: 90 of 400 steps (22 %), loss 3.2"] * 2
        advance(310, "")
        assert log.wait(29) == []
    assert log.lines[5:] == ["lab:base: done, 400 steps in 2 min 31 s, loss 3.2"]


def test_short_work_stays_quiet() -> None:
    log = Log()
    with log.reporter.stage("Writing", 10, "bytes") as advance:
        log.wait(1)
        advance(10, "")
    assert log.lines == []


def test_slow_steps_are_told_by_the_time_that_one_takes() -> None:
    log = Log()
    with log.reporter.stage("Completing", 80, "steps") as advance:
        log.wait(2)
        advance(3, "")
        assert log.wait(30) == ["Completing: 3 of 80 steps (3 %), 10 s each, 12 min 50 s left"]


@pytest.mark.parametrize(
    ("unit", "total", "done", "line"),
    [
        ("bytes", 10 << 30, 4 << 30, "x: 4.0 GiB of 10.0 GiB (40 %), 2.0 GiB/s, 3 s left"),
        ("tokens", 4_500_000, 1_500_000, "x: 1.5M of 4.5M tokens (33 %), 750.0k tokens/s, 4 s left"),
        ("steps", 0, 20_000, "x: 20,000 steps, 10000.0 steps/s"),
        ("steps", 5, 5, "x: 5 of 5 steps (100 %), 2.5 steps/s"),
        ("steps", 5, 9, "x: 9 of 5 steps (100 %), 4.5 steps/s"),
    ],
)
def test_units(unit: Unit, total: int, done: int, line: str) -> None:
    log = Log()
    with log.reporter.stage("x", total, unit) as advance:
        advance(done, "")
        assert log.wait(2) == [line]


def test_stages_inside_another_are_told_of_only_where_they_are_long() -> None:
    log = Log()
    with log.reporter.stage("Scoring", 2, "steps") as outer:
        with log.reporter.stage("m: text", 8, "steps") as inner:
            assert log.wait(29) == ["Scoring: 0 of 2 steps (0 %)"]
            inner(4, "")
            assert log.wait(3) == ["m: text: 4 of 8 steps (50 %), 8 s each, 30 s left", "Scoring: 0 of 2 steps (0 %)"]
        outer(1, "")
        with log.reporter.stage("n: text", 8, "steps"):
            assert log.wait(20) == []
        outer(1, "")
    assert log.lines[3:] == ["m: text: done, 4 steps in 32 s", "Scoring: done, 2 steps in 52 s"]


def test_a_failure_says_where_it_stopped() -> None:
    log = Log()
    with pytest.raises(KeyError), log.reporter.stage("Writing", 100, "steps") as advance:
        advance(40, "")
        log.wait(5)
        raise KeyError
    assert log.lines[1:] == ["Writing: stopped at 40 of 100 steps (40 %) after 5 s"]


def test_work_without_parts_that_are_counted_has_its_time() -> None:
    log = Log()
    with log.reporter.stage("Loading model", 0, "steps"):
        assert log.wait(40) == ["Loading model: running for 2 s", "Loading model: running for 32 s"]
    assert log.lines[2:] == ["Loading model: done after 40 s"]


def test_lines_come_from_advance_too() -> None:
    log = Log()
    with log.reporter.stage("x", 10, "steps") as advance:
        log.clock.now += EVERY
        advance(1, "")
        assert len(log.lines) == 1


def test_a_thread_writes_the_lines_of_a_stage_that_does_not_move() -> None:
    clock, lines = Clock(), list[str]()
    reporter = LineReporter(lines.append, clock=clock, beat=0.001)
    with reporter.stage("x", 10, "steps"):
        clock.now += EVERY
        end = time.monotonic() + 30
        while not lines and time.monotonic() < end:
            time.sleep(0.001)
    assert lines[0] == "x: 0 of 10 steps (0 %)"


def test_numbers() -> None:
    assert [binary(n) for n in (0, 1023, 1536, 5 << 20, 3 << 40)] == [
        "0 bytes",
        "1023 bytes",
        "1.5 KiB",
        "5.0 MiB",
        "3.0 TiB",
    ]
    assert [duration(s) for s in (0.4, 59.4, 65, 3599, 7800)] == [
        "0 s",
        "59 s",
        "1 min 05 s",
        "59 min 59 s",
        "2 h 10 min",
    ]


# -- through `terminal` -----------------------------------------------------------------------------------------------


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """What is printed, with its stream; lines come at once, as if every stage had run for its first seconds."""
    lines: list[tuple[str, object]] = []
    monkeypatch.setattr(progress, "_print_line", lambda text, stream: lines.append((text, stream)))
    monkeypatch.setattr("surgery.runtime.progress_lines.FIRST_AFTER", 0.0)
    return lines


def test_terminal_writes_lines_to_the_stderr_of_its_beginning(
    printed: list[tuple[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with terminal("a\x1b[31m", 3, "steps") as advance:
        monkeypatch.setattr(sys, "stderr", io.StringIO())  # as a library is silenced
        advance(3, "no\nte")
    assert [text.split(",")[0] for text, _ in printed] == ["a\\x1b[31m: 3 of 3 steps (100 %)", "a\\x1b[31m: done"]
    assert "no te" in printed[1][0] or "no\\nte" in printed[1][0]
    assert {id(one) for _, one in printed} == {id(stream)}


def test_other_ranks_write_none(printed: list[tuple[str, object]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with terminal("x", 3, "steps") as advance, terminal("y", 3, "steps"):
        advance(3)
    assert printed == []


def test_a_library_s_process_prints_nothing(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_print_line", None)
    monkeypatch.setattr("surgery.runtime.progress_lines.FIRST_AFTER", 0.0)
    with terminal("x", 3, "steps") as advance:
        advance(3)
    assert capfd.readouterr() == ("", "")


def test_a_terminal_has_bars_and_no_lines(
    printed: list[tuple[str, object]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with terminal("Bar", 3, "steps") as advance:
        advance(3)
    assert printed == [] and "Bar" in capsys.readouterr().err


def test_work_that_has_other_bars_has_lines_only(
    printed: list[tuple[str, object]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress.lines("Loading \x1bm"):
        progress._open_reporters[-1].tick()
    with terminal("Scoring", 2, "steps"), progress.lines("Uploading", 8, "bytes") as advance:
        advance(8)
        assert len(progress._open_reporters) == 1
    texts = [text for text, _ in printed]
    assert texts[:2] == ["Loading \\x1bm: running for 0 s", "Loading \\x1bm: done after 0 s"]
    assert all(text.startswith("Scoring: ") for text in texts[2:]), "of what lies inside only after half a minute"
    printed.clear()
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.lines("Loading"), terminal("Scoring", 2, "steps"), progress.lines("Loading") as advance:
        advance(1)
    assert printed == [] and "Loading" not in capsys.readouterr().err


def test_a_process_that_forks_while_a_line_is_written_has_children_that_go_on() -> None:
    def write(text: str) -> None:
        time.sleep(0.002)  # the thread holds the reporter's lock meanwhile

    clock = itertools.count(0, 100).__next__  # a line is due at each look
    reporter = LineReporter(write, clock=clock, beat=0.0001)
    with reporter.stage("outer", 10, "steps"):
        for _ in range(30):
            child = os.fork()
            if not child:
                signal.alarm(10)  # ends a child that waits for a lock that nobody holds
                with reporter.stage("inner", 1, "steps") as advance:
                    advance(1, "")
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
