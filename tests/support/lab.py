"""The lab's real models for tests of what only trained weights can show; built once, then taken from the cache."""

from __future__ import annotations

from pathlib import Path

from surgery import lab
from surgery.lab.builder import MEMBERS
from surgery.lab.recipe import CliffRecipe, MoeRecipe


def family() -> dict[str, Path]:
    """Name → folder of the lab's dense models that do sums or sort; building them all takes three minutes on two cores.

    The cliff models and the mixture of experts stay out: each takes a minute or so, and a test that needs one resolves
    that one.
    """
    return {
        name: lab.resolve(name) for name in lab.names() if not isinstance(MEMBERS[name].recipe, CliffRecipe | MoeRecipe)
    }
