"""Which process does which piece of a job's work: files are dealt out over machines, and their pieces over processes.

No two machines write into one file: each keeps pages of it in a memory of its own, and on a network disk the last one
to write a page back wins, also over what the other one wrote beside it. Processes of one machine share these pages.
"""

from __future__ import annotations

import platform
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class WorkItem:
    """What one process does as a whole. file: the number of the output file that it goes to. weight: what it takes,
    in bytes that are read and written."""

    file: int
    weight: int


def this_machine() -> str:
    """What the system that this process runs under is known by among those of a network."""
    if _BOOT.is_file():
        return _BOOT.read_text().strip()
    return f"{platform.node()} {uuid.getnode()}"


def partition(pieces: Sequence[WorkItem], machines: Sequence[str]) -> list[list[int]]:
    """The numbers of the pieces that each process does, ascending; every piece is dealt out once.

    Args:
        pieces: in the order of their bytes, so that a process gets neighbours.
        machines: per process, the machine that it runs on.
    """
    processes: dict[str, list[int]] = {}
    for process, machine in enumerate(machines):
        processes.setdefault(machine, []).append(process)
    weights: dict[int, int] = {}
    for piece in pieces:
        weights[piece.file] = weights.get(piece.file, 0) + piece.weight
    loads = dict.fromkeys(processes, 0)
    place: dict[int, str] = {}
    for file in sorted(weights, key=lambda file: (-weights[file], file)):  # the largest first: what is left is small
        machine = min(loads, key=lambda one: (loads[one] + weights[file]) / len(processes[one]))
        loads[machine] += weights[file]
        place[file] = machine
    dealt: list[list[int]] = [[] for _ in machines]
    before = dict.fromkeys(processes, 0)
    for number, piece in enumerate(pieces):
        machine = place[piece.file]
        held = processes[machine]
        # Where the middle of the piece lies in all that the machine does.
        middle, whole = 2 * before[machine] + piece.weight, 2 * max(loads[machine], 1)
        dealt[held[min(middle * len(held) // whole, len(held) - 1)]].append(number)
        before[machine] += piece.weight
    return dealt
