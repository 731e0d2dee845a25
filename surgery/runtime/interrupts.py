"""Handle Ctrl-C: defer it to a safe point, and deliver it again where Python would drop it."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

# Seconds until a dropped Ctrl-C is delivered again: time for the callback that dropped it to return.
REDELIVERY_DELAY = 0.02


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
