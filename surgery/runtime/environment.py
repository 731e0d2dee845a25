"""What this process is: a program of ours, which may be forked and keeps what it frees; or one of a launcher's."""

from __future__ import annotations

import ctypes
import os

_LIBC = ctypes.CDLL(None)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

_state = {"claimed": False}


def configure_cli_process() -> None:
    """Says that this process does nothing beside our jobs. Only programs call this, not the library.

    Kernels allocate and free the same few hundred kilobytes thousands of times; handing these back to the system each
    time costs a quarter of a job in page faults.
    """
    _state["claimed"] = True
    if hasattr(_LIBC, "mallopt"):
        _LIBC.mallopt(_M_MMAP_THRESHOLD, 64 << 20)
        _LIBC.mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def is_cli_process() -> bool:
    """Whether `configure_cli_process` was called."""
    return _state["claimed"]


def n_processes() -> int:
    """How many processes share the work; 1 unless a launcher says otherwise."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def n_local_processes() -> int:
    """How many of them run on this machine, this one included; all of them where the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", n_processes()))


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process is the one that writes and talks."""
    return rank() == 0
