"""The model that the tests of fetching put on their server."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.hub_models import FETCHED, LEFT_ALONE, folder_of


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "model", FETCHED | LEFT_ALONE)
