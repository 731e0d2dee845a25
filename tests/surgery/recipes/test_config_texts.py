"""The strings of a config file that may name what is read."""

from __future__ import annotations

import pytest

from surgery.io import yaml_nodes
from surgery.recipes import config_texts as module
from surgery.recipes.config_texts import config_texts


def test_each_string_of_one_line_is_there_once_in_order() -> None:
    text = 'models: [a, {model: b, lines: "x\\ny", weight: 1}, a]\n'
    assert config_texts(text, "c.yml") == ("a", "b")
    assert config_texts("a: [", "c.yml") == ()


def test_a_config_of_aliases_is_read_once_however_often_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = "".join(
        f"{name}: &{name} [{', '.join(9 * [f'*{of}'])}]\n" for of, name in zip("abcdef", "bcdefg", strict=True)
    )
    read: list[str] = []

    def count(text: str, where: str) -> object:
        read.append(where)
        return yaml_nodes.read_documents(text, where)

    monkeypatch.setattr(module, "read_documents", count)
    config_texts.cache_clear()
    assert [config_texts(f"a: &a [x]\n{levels}", "c.yml") for _ in range(20)] == 20 * [()]
    assert read == ["c.yml"]
