"""The public names of `surgery` are there, documented, and cost nothing until they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import surgery


@pytest.mark.parametrize("name", surgery.__all__)
def test_every_public_name_is_one_import_away_and_documented(name: str) -> None:
    assert getattr(surgery, name).__doc__


def test_a_name_that_is_none_is_said() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        surgery.nothing  # noqa: B018


def test_importing_the_package_brings_nothing_heavy_along() -> None:
    script = "import sys, surgery; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
