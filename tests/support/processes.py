"""Processes that know of each other, as a launcher starts them."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from support.forks import Fork

# What a process may take before it counts as hanging, on a machine with ten others at work; it takes about ten.
SECONDS = 600


def free_port() -> int:
    """A port of this machine at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def known_to(rank: int, *, world: int, port: int) -> dict[str, str]:
    """What a launcher tells process `rank` of `world`."""
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in known.items()}


def run_ranks(
    command: Sequence[object], *, world: int = 2, cwd: Path | None = None
) -> tuple[list[int], list[str], list[str]]:
    """Runs `command` in `world` processes of one thread each; exit code, complaints, and what it printed, of each."""
    port, running = free_port(), []
    for rank in range(world):
        environment = os.environ | known_to(rank, world=world, port=port) | {"OMP_NUM_THREADS": "1"}
        running.append(
            subprocess.Popen(
                list(map(str, command)),
                cwd=cwd,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], [err for _, err in said], [out for out, _ in said]


def fork_ranks(
    script: str, *arguments: object, world: int = 2, cwd: Path | None = None
) -> tuple[list[int], list[str], list[str]]:
    """As `run_ranks`, of a script in forks, which need not import everything again."""
    port = free_port()
    running = [
        Fork(script, *arguments, cwd=cwd, environment=known_to(rank, world=world, port=port)) for rank in range(world)
    ]
    try:
        ended = [process.wait(SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
    return [code for code, _, _ in ended], [err for _, _, err in ended], [out for _, out, _ in ended]
