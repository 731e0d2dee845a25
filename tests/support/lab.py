"""Trained lab models, for tests of what only trained weights can show; built once, then taken from the cache."""

from __future__ import annotations

from pathlib import Path

from surgery import lab
from surgery.lab.catalogue import MODELS
from surgery.lab.recipe import CliffRecipe, MoeRecipe


def family() -> dict[str, Path]:
    """Return name → folder of the dense models that do sums or sort; building all takes three minutes on two cores.

    The cliff models and the mixture of experts are left out: each takes a minute or so, and a test that needs one
    resolves that one.
    """
    return {
        name: lab.resolve(name) for name in lab.names() if not isinstance(MODELS[name].recipe, CliffRecipe | MoeRecipe)
    }
