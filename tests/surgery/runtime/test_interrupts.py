"""Promises of runtime.interrupts: Ctrl-C waits for a safe point, and is never lost."""

from __future__ import annotations

import signal
import sys
import weakref
from collections.abc import Callable, Iterator

import pytest

from surgery.runtime.interrupts import (
    DeferredInterrupt,
    redeliver_dropped_interrupts,
    stop_at_termination,
    stopped_exit_code,
)


def press() -> None:
    """Ctrl-C, as it arrives at this process."""
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def redelivering(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process is one in which a dropped Ctrl-C is delivered again."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = signal.getsignal(signal.SIGALRM)
    redeliver_dropped_interrupts()
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_the_first_is_deferred_and_the_second_raises() -> None:
    with pytest.raises(KeyboardInterrupt), DeferredInterrupt() as interrupts:
        assert not interrupts.asked
        press()
        assert interrupts.asked
        press()


def test_one_that_nobody_asked_for_is_raised_at_the_end() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt):
        with DeferredInterrupt():
            press()
            reached = True
        raise AssertionError("the block has ended")
    assert reached


def test_at_the_end_of_an_inner_block_it_is_deferred_by_the_outer_one() -> None:
    with pytest.raises(KeyboardInterrupt):
        with DeferredInterrupt() as outer:
            with DeferredInterrupt():
                press()
            assert outer.asked
        raise AssertionError("the block has ended")


def test_an_error_in_the_block_is_raised_as_it_is() -> None:
    with pytest.raises(ValueError, match="mine"), DeferredInterrupt():
        press()
        raise ValueError("mine")


def test_the_handler_before_it_is_back_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT)
    with DeferredInterrupt():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


class Finalized:
    """Something during whose end Ctrl-C is pressed."""

    def __del__(self) -> None:
        press()


class Plain:
    """Something that can be referred to weakly."""


def in_a_finalizer() -> None:
    Finalized()


def in_a_weak_references_callback() -> None:
    something = Plain()
    reference = weakref.ref(something, lambda _: press())
    del something
    assert reference() is None


@pytest.mark.usefixtures("redelivering")
@pytest.mark.parametrize("where", [in_a_finalizer, in_a_weak_references_callback])
def test_one_that_python_drops_is_delivered_again(where: Callable[[], None], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        where()
        signal.pause()
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("redelivering")
def test_other_errors_that_python_drops_are_printed_as_ever(capfd: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def __del__(self) -> None:
            raise ValueError("broken")

    Broken()
    assert "Exception ignored in" in (err := capfd.readouterr().err)
    assert "ValueError: broken" in err


def test_termination_is_deferred_as_ctrl_c_is_and_has_its_own_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.runtime.interrupts._stopped_by", signal.SIGINT)
    assert stopped_exit_code() == 130
    before = signal.getsignal(signal.SIGTERM)
    stop_at_termination()
    try:
        with pytest.raises(KeyboardInterrupt), DeferredInterrupt() as deferred:
            signal.raise_signal(signal.SIGTERM)
            assert deferred.asked
        assert stopped_exit_code() == 143
    finally:
        signal.signal(signal.SIGTERM, before)
