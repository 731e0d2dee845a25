"""A family of models for the tests of whole merges."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.merges import family


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family of Llamas in fp32; for reading only."""
    return family("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def own(llama: Path, tmp_path: Path) -> Path:
    """A copy of `llama` that a test may change or damage."""
    return shutil.copytree(llama, tmp_path / "own")
