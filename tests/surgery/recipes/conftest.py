"""How tests of recipes read them: from a file in a folder of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.recipe_texts import Read, read_text


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return lambda text, **settings: read_text(tmp_path, text, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")
