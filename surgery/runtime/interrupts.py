"""Handle Ctrl-C and SIGTERM: defer them to a safe point, and deliver them again where Python would drop them."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

# Seconds until a dropped Ctrl-C is delivered again: time for the callback that dropped it to return.
REDELIVERY_DELAY = 0.02

_stopped_by = signal.SIGINT


class DeferredInterrupt:
    """Defer Ctrl-C while the block runs: the first one only sets `asked`, the next one raises KeyboardInterrupt.

    Code in the block polls `asked` and raises KeyboardInterrupt itself once its work is saved. Where it does not, the
    interrupt is delivered when the block ends without an exception: to an enclosing `DeferredInterrupt`, or as a
    KeyboardInterrupt. Outside the main thread, which alone handles signals, this does nothing.
    """

    asked = False

    def __enter__(self) -> DeferredInterrupt:
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._previous = signal.signal(signal.SIGINT, self._defer)
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if self._installed:
            # Runs the handler of a signal that is still pending first, so that `asked` is final from here on.
            signal.signal(signal.SIGINT, self._previous)
            if self.asked and exc_type is None:
                signal.raise_signal(signal.SIGINT)

    def _defer(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def stop_at_termination() -> None:
    """Let SIGTERM stop this process as Ctrl-C does, for the rest of it; only programs call this.

    `kill`, `timeout`, container engines and batch systems send it, some a while before they send SIGKILL.
    """
    signal.signal(signal.SIGTERM, _interrupt)


def stopped_exit_code() -> int:
    """Return the exit code of a process that was stopped, as shells count: 128 + the signal, SIGINT or SIGTERM."""
    return 128 + _stopped_by


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _stopped_by
    _stopped_by = signal.Signals(number)
    # By the handler of Ctrl-C that is installed now, which may defer it.
    signal.raise_signal(signal.SIGINT)


def redeliver_dropped_interrupts() -> None:
    """Deliver a Ctrl-C again when Python drops it, for the rest of this process; only programs call this.

    A KeyboardInterrupt that is raised in a finalizer, a weak reference's callback or a callback of `os.fork` cannot
    leave it: Python prints "Exception ignored in …" and goes on as if nobody had pressed Ctrl-C. SIGALRM then raises
    SIGINT once more, a moment later and outside that callback. A thread could do so too, but would be in the way of
    processes that fork.
    """
    signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    sys.unraisablehook = _redeliver


def _redeliver(unraisable: sys.UnraisableHookArgs) -> None:
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        # Not raised here: this hook runs inside the callback, where it would be dropped again.
        signal.setitimer(signal.ITIMER_REAL, REDELIVERY_DELAY)
    else:
        sys.__unraisablehook__(unraisable)
