"""Describe the current process: its rank among those of a launcher, and its setup as a command-line program."""

from __future__ import annotations

import ctypes
import os

_LIBC = ctypes.CDLL(None)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from malloc.h

_cli_process = False


def rank() -> int:
    """Return the rank of this process, from 0; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def n_processes() -> int:
    """Return how many processes a launcher (`accelerate launch`, torchrun) has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def n_local_processes() -> int:
    """Return how many of the launcher's processes run on this machine; all of them if it does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", n_processes()))


def is_main() -> bool:
    """Return whether this is rank 0, which alone writes files and prints."""
    return rank() == 0


def configure_cli_process() -> None:
    """Set up this process as a program that does nothing beside our jobs. For programs, never for the library.

    From then on workers may be forked, and the allocator keeps what it frees: kernels allocate and free the same few
    hundred kilobytes thousands of times, and returning these to the system each time costs a quarter of a job in page
    faults.
    """
    global _cli_process
    _cli_process = True
    # Up to 64 MiB a block comes from the heap, of which 256 MiB may lie idle: far more than kernels use at a time, and
    # still little beside torch. Larger buffers are mapped, and go back to the system at once.
    if hasattr(_LIBC, "mallopt"):  # glibc's own; macOS and musl have none
        _LIBC.mallopt(_M_MMAP_THRESHOLD, 64 << 20)
        _LIBC.mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def is_cli_process() -> bool:
    """Return whether `configure_cli_process` was called: whether nobody else's threads or locks are in this process."""
    return _cli_process
