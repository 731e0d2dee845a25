"""YAML texts as pydantic models: every fault with its line, its key, and the nearest name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, field_validator

from surgery.errors import SurgeryError
from surgery.io.json_records import Strict
from surgery.io.yaml_models import parse_model, read_text


class Part(Strict):
    kind: Literal["red", "green"]
    count: int = 1
    share: float = Field(0.5, ge=0, le=1)

    @field_validator("count")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"got {value}, expected an odd number")
        return value


class Whole(Strict):
    name: str
    parts: tuple[Part, ...] = ()
    named: Mapping[str, Part] = {}


def faults_of(text: str) -> list[str]:
    with pytest.raises(SurgeryError) as caught:
        parse_model(text, "f.yml", Whole)
    assert caught.value.exit_code == 2
    return str(caught.value).split("\n")


def test_a_text_becomes_a_model() -> None:
    whole = parse_model(
        "name: n\nparts:\n  - {kind: red, share: 1e-3}\nnamed: {a: {kind: green, count: 3}}", "f.yml", Whole
    )
    assert whole == Whole(name="n", parts=(Part(kind="red", share=0.001),), named={"a": Part(kind="green", count=3)})


def test_all_faults_are_named_with_file_line_key_and_nearest_name() -> None:
    text = """name: 5
parts:
  - {kind: grean, count: 2}
  - kind: red
    shar: 0.1
    count: many
  - {share: 1.5}
nmaed: {}
named: {a: red}
"""
    assert faults_of(text) == [
        "f.yml:1: name: got 5, expected a valid string",
        "f.yml:3: parts[0].kind: got 'grean', expected 'red' or 'green'; did you mean green?",
        "f.yml:3: parts[0].count: got 2, expected an odd number",
        "f.yml:5: parts[1].shar: is not known here; did you mean share?",
        "f.yml:6: parts[1].count: got 'many', expected a valid integer",
        "f.yml:7: parts[2]: kind: is missing",
        "f.yml:7: parts[2].share: got 1.5, expected less than or equal to 1",
        "f.yml:8: nmaed: is not known here; did you mean named?",
        "f.yml:9: named.a: got 'red', expected a mapping",
    ]


def test_an_unknown_key_without_a_near_one_lists_what_is_known() -> None:
    assert faults_of("name: n\nzzz: 1") == ["f.yml:2: zzz: is not known here; known: name, named, parts"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.yml: is empty"),
        ("# nothing", "f.yml: is empty"),
        ("name: a\n---\nname: b", "f.yml: holds 2 documents, expected one"),
        ("- 1", "f.yml:1: got a list, expected a mapping"),
        ("name: [", "f.yml:1: is not YAML"),
        ("name: a\nname: b", "f.yml:2: name: stands here a second time"),
    ],
)
def test_what_is_no_such_document_is_said_in_a_line(text: str, message: str) -> None:
    assert faults_of(text)[0].startswith(message)


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="cannot be read"):
        read_text(tmp_path / "none.yml")
    (tmp_path / "latin.yml").write_bytes(b"name: \xe9")
    with pytest.raises(SurgeryError, match=r"is not UTF-8 text \(byte 6\)"):
        read_text(tmp_path / "latin.yml")
