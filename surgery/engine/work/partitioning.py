"""Partition work items over machines and ranks, balanced by bytes: files over machines, their items over ranks.

No two machines write into one file: each has its own page cache, and on a network disk the machine that writes a page
back last overwrites what the other one wrote into the same page. Processes of one machine share the page cache.
"""

from __future__ import annotations

import platform
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# The same in all containers of a machine, which share its page cache; host names may repeat in a network.
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class WorkItem:
    """An indivisible part of the work. file: number of the output file. weight: bytes that are read and written."""

    file: int
    weight: int


def this_machine() -> str:
    """Return an identifier of this machine, unique in its network."""
    if _BOOT.is_file():
        return _BOOT.read_text().strip()
    return f"{platform.node()} {uuid.getnode()}"


def partition(items: Sequence[WorkItem], machines: Sequence[str]) -> list[list[int]]:
    """Return the numbers of the items that each rank gets, ascending; every item is assigned once.

    Args:
        items: in the order of their bytes, so that a rank gets neighbours.
        machines: per rank, the machine that it runs on.
    """
    ranks: dict[str, list[int]] = {}
    for rank, machine in enumerate(machines):
        ranks.setdefault(machine, []).append(rank)
    weights: dict[int, int] = {}
    for item in items:
        weights[item.file] = weights.get(item.file, 0) + item.weight
    loads = dict.fromkeys(ranks, 0)
    machine_of: dict[int, str] = {}
    for file in sorted(weights, key=lambda file: (-weights[file], file)):  # largest first: small ones even out the rest
        machine = min(loads, key=lambda one: (loads[one] + weights[file]) / len(ranks[one]))
        loads[machine] += weights[file]
        machine_of[file] = machine
    assigned: list[list[int]] = [[] for _ in machines]
    before = dict.fromkeys(ranks, 0)  # machine → weight of its items so far
    for number, item in enumerate(items):
        machine = machine_of[item.file]
        local = ranks[machine]
        # The rank in whose share of the machine's load the middle of the item is; doubled, to stay in whole numbers.
        middle, load = 2 * before[machine] + item.weight, 2 * max(loads[machine], 1)
        assigned[local[min(middle * len(local) // load, len(local) - 1)]].append(number)
        before[machine] += item.weight
    return assigned
