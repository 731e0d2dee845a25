"""The lab's real models for tests of what only trained weights can show; built once, then taken from the cache."""

from __future__ import annotations

from pathlib import Path

from surgery import lab


def family() -> dict[str, Path]:
    """Name → folder of every lab model; building them all takes about three minutes on two cores."""
    return {name: lab.resolve(name) for name in lab.names()}
