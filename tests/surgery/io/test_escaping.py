"""Text from files stays text: on terminals, in JSON, YAML, Markdown and HTML."""

from __future__ import annotations

import json
import sys
import unicodedata
from html.parser import HTMLParser

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from support.hostile_names import HOSTILE_NAMES, hidden_characters

from surgery.io.escaping import (
    MOST_CHARACTERS,
    html_text,
    json_text,
    markdown_block,
    markdown_code,
    markdown_text,
    one_line,
    visible,
    yaml_text,
)

names = pytest.mark.parametrize("name", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES)
GITHUB = MarkdownIt("gfm-like", {"linkify": False, "html": True})
INERT = {
    "inline",
    "text",
    "code_inline",
    "softbreak",
    *(
        f"{tag}_{side}"
        for tag in ("paragraph", "heading", "table", "thead", "tbody", "tr", "th", "td")
        for side in ("open", "close")
    ),
}

FRAMES = [
    "{}",
    "# {}",
    "The model {}, merged onto {}.",
    "**{}**\n\n| a | b |\n|---|---|\n| {} | {} |",
]


def kinds(markdown: str) -> set[str]:
    """The kinds of everything in a Markdown text."""
    tokens = GITHUB.parse(markdown)
    return {token.type for token in tokens} | {child.type for token in tokens for child in token.children or ()}


def test_every_control_and_format_character_of_unicode_is_hidden() -> None:
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            assert (visible(character) == character) == (character in "\t\n"), hex(number)


@pytest.mark.parametrize(
    "text", ["plain", "α ≥ 0.5 · ‖v‖", "模型", "é", "e\u0301", "\U0001f600", "a\u00a0b\u3000c", "नमस्ते", "x\ty\nz"]
)
def test_what_people_write_is_left_alone(text: str) -> None:
    assert visible(text) == text


def test_hidden_characters_are_written_out() -> None:
    assert visible("\x1b[1m\x9b\u202e\U000e0041\ud800") == r"\x1b[1m\x9b\u202e\U000e0041\ud800"
    assert visible("a\r\nb\rc") == "a\nb\\rc"
    assert one_line("a\nb\tc\r\n") == r"a\nb\tc\r\n"


@names
def test_a_line_is_one_line_of_bounded_length(name: str) -> None:
    line = one_line(name)
    assert hidden_characters(line, allowed="") == []
    assert len(line) <= MOST_CHARACTERS
    assert one_line(line) == line


@given(st.text(st.characters(codec=None)))
def test_nothing_hidden_is_left(text: str) -> None:
    assert hidden_characters(visible(text)) == []
    assert hidden_characters(one_line(text), allowed="") == []


@given(st.recursive(st.text(st.characters(codec=None)) | st.none(), lambda inner: st.dictionaries(st.text(), inner)))
def test_json_has_the_same_values_and_nothing_hidden(value: object) -> None:
    for indent in (None, 2):
        text = json_text(json.dumps(value, ensure_ascii=False, indent=indent))
        assert json.loads(text) == value
        assert hidden_characters(text) == []
        text.encode()


@names
def test_yaml_has_the_same_values_and_no_second_document(name: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in name):
        pytest.skip("YAML has no surrogates")
    text = yaml_text({"name": name, "list": [name]})
    assert hidden_characters(text) == []
    assert not any(line.startswith("---") for line in text.splitlines())
    assert yaml.safe_load(text) == {"name": name, "list": [name]}


@names
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("function", [markdown_text, markdown_code])
def test_nothing_in_markdown_is_active(name: str, frame: str, function: object) -> None:
    shown = function(name)  # type: ignore[operator]
    assert "\n" not in shown
    assert hidden_characters(shown, allowed="") == []
    page = frame.format(*[shown] * 3)
    assert kinds(page) <= INERT | {"strong_open", "strong_close"} | ({"hr"} if not shown else set())
    if "|" in frame and shown:
        # The name has not begun a cell of its own.
        assert [token.type for token in GITHUB.parse(page)].count("td_open") == 2


@names
def test_a_block_holds_its_text(name: str) -> None:
    tokens = GITHUB.parse(f"before\n\n{markdown_block(name, 'yaml')}\n\nafter")
    assert [token.type for token in tokens if token.nesting >= 0 and token.level == 0] == [
        "paragraph_open",
        "fence",
        "paragraph_open",
    ]
    assert hidden_characters(markdown_block(name)) == []


def test_plain_names_are_written_as_they_are() -> None:
    for name in ("lab:sft", "org/name", "a_b_c", "12.3 %", "−1.2e-05", "0.88 [0.83, 0.92]", "–", "L12H7", "(x, y)"):
        assert markdown_text(name) == name
    assert markdown_text("x[a]") == "`x[a]`"
    assert markdown_text("[1](javascript:x)") == "`[1](javascript:x)`"
    assert markdown_code("a|b") == r"`a\|b`"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[tuple[str, str | None]]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, attrs))


@names
def test_html_has_no_tag_or_attribute_of_a_name(name: str) -> None:
    shown = html_text(name)
    assert hidden_characters(shown) == []
    parser = Tags()
    parser.feed(f"<p title=\"{shown}\" lang='{shown}'>{shown}</p>")
    assert [(tag, [key for key, _ in attributes]) for tag, attributes in parser.found] == [("p", ["title", "lang"])]
