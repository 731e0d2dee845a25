"""docs/api.md is what the code says."""

from __future__ import annotations

from pathlib import Path

from cli.api_reference import page

FILE = Path(__file__).parents[2] / "docs/api.md"


def test_the_page_is_what_the_code_says() -> None:
    assert FILE.read_text(encoding="utf-8") == page(), "write it again: make docs"
