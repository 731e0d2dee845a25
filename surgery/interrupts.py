"""Ctrl-C heard at a place where work can be left: between two steps, instead of anywhere.

An exception that is raised anywhere may be lost: Python drops those of the functions that run around a fork.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupts:
    """Inside, the first Ctrl-C only sets `asked`, so that a step can end and be saved; the next one interrupts.

    Outside the main thread, where no signals are handled, it does nothing.
    """

    asked = False

    def __enter__(self) -> Interrupts:
        self._mine = threading.current_thread() is threading.main_thread()
        if self._mine:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._mine:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
