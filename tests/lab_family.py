"""The lab's real models for tests of what only trained weights can show; built once, then taken from the cache."""

from __future__ import annotations

from pathlib import Path

from surgery import lab
from surgery.lab.family import MEMBERS
from surgery.lab.recipe import Cliff


def family() -> dict[str, Path]:
    """Name → folder of every lab model that does sums or sorts; building them all takes three minutes on two cores.

    The cliff models stay out: each takes most of a minute, and a test that needs one resolves that one.
    """
    return {name: lab.resolve(name) for name in lab.names() if not isinstance(MEMBERS[name].recipe, Cliff)}
