"""Reports: one rule for numbers, nothing fetched, nothing interpreted, written whole or not at all."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console
from support.hostile_names import HOSTILE_NAMES, hidden_characters

from surgery.errors import SurgeryError
from surgery.reporting.report import (
    Column,
    Figure,
    Format,
    PreformattedText,
    Report,
    Table,
    Value,
    format_value,
)

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("value", "rule", "text"),
    [
        (None, "auto", "–"),
        (None, "percent", "–"),
        (True, "auto", "yes"),
        (False, "count", "no"),
        ("α-sweep", "number", "α-sweep"),
        (1234567, "auto", "1,234,567"),
        (0, "auto", "0"),
        (-3, "auto", "−3"),
        (0.0, "auto", "0"),
        (12.34567, "auto", "12.35"),
        (1.0, "number", "1.000"),
        (99999.6, "number", "100,000"),
        (0.001, "number", "0.001000"),
        (0.000123449, "auto", "1.234e-04"),
        (-2.5e9, "number", "−2.500e+09"),
        (math.nan, "score", "NaN"),
        (math.inf, "auto", "∞"),
        (-math.inf, "auto", "−∞"),
        (0.9712, "score", "0.971"),
        (0.1234, "percent", "12.3 %"),
        (0, "bytes", "0 B"),
        (999, "bytes", "999 B"),
        (1000, "bytes", "1 kB"),
        (999_999, "bytes", "1 MB"),
        (1_234_567_890, "bytes", "1.23 GB"),
    ],
)
def test_numbers_are_written_by_one_rule(value: Value, rule: Format, text: str) -> None:
    assert format_value(value, rule) == text


@given(st.floats(allow_nan=False, allow_infinity=False, width=32), st.sampled_from(["auto", "bytes", "count"]))
def test_any_number_can_be_written(value: float, rule: Format) -> None:
    assert format_value(value, rule)


def table() -> Table:
    return Table(
        "A <b>|</b> table",
        ("model", Column("score", "percent"), Column("size", "bytes"), "kind"),
        [("<script>alert(1)</script>", 0.5, 1000, None), ("a|b [red]", 1.0, None, "x\ny")],
        note="<i>a note</i>",
    )


def test_three_renderings_show_the_same_cells() -> None:
    shown = Console(width=200, file=io.StringIO(), record=True)
    shown.print(table().to_rich())
    for text in (shown.export_text(), table().to_markdown(), table().to_html()):
        assert "50.0 %" in text and "100.0 %" in text and "1 kB" in text and "–" in text
    assert "a|b [red]" in table().to_html()


def test_markdown_stays_one_table() -> None:
    head, _, columns, rule, *rows = table().to_markdown().splitlines()[:6]
    assert head == "**`A <b>\\|</b> table`**"
    assert columns == "| model | score | size | kind |"
    assert rule == "| --- | ---: | ---: | --- |"
    assert rows == [
        "| `<script>alert(1)</script>` | 50.0 % | 1 kB | – |",
        "| `a\\|b [red]` | 100.0 % | – | `x\\ny` |",
    ]


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="T: a row has 1 values for 2 columns"):
        Table("T", ("a", "b"), [(1,)])


def figures() -> list[Figure]:
    return [Figure("Sweep <b>", "caption <i>", PNG), Figure("Bars", "", PNG)]


def test_the_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    report = Report("T <&>", "intro <script>")
    report.add(table()).add("a paragraph with <b>marks</b>\nand a second line")
    for figure in figures():
        report.add(figure)
    page = report.write(tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//", re.sub(r"base64,[^\"]*", "", page))
    sources = re.findall(r"src=\"([^\"]{0,22})", page)
    assert len(sources) == len(figures()) and set(sources) == {"data:image/png;base64,"}
    assert "<script" not in page and "<b>" not in page and "<i>" not in page
    assert "<title>T &lt;&amp;&gt;</title>" in page
    assert "marks&lt;/b&gt;<br>and a second line" in page
    assert page.count("<section>") == page.count("</section>") == 1 + len(figures())


class Elements(HTMLParser):
    """Every tag of a page with the names of its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, ...]] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add((tag, *sorted(key for key, _ in attrs)))


@pytest.mark.parametrize("name", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES)
def test_no_name_adds_an_element_to_a_page_or_leads_anywhere(name: str) -> None:
    def page(text: str) -> str:
        report = Report(text, text).add(text).add(Table(text, ["n", Column(text)], [[1, text]], note=text))
        report.add(Figure(text, text, PNG))
        return report.add(PreformattedText(text, text, f"{text}.", text, {text: f"steps/{text}"})).to_html()

    plain, hostile = Elements(), Elements()
    plain.feed(page("x"))
    text = page(name)
    hostile.feed(text)
    assert hostile.found - {("br",)} <= plain.found
    assert hidden_characters(text) == []
    # Relative, and with everything but letters encoded.
    assert [target for target in re.findall(r'href="([^"]*)"', text) if not target.startswith("steps/")] == []
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    assert not re.search(r"(?<!-src 'none'; img-src )\bsrc=\"(?!data:image/png;base64,)", text)


@pytest.mark.parametrize("name", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES)
def test_every_name_is_one_cell_of_markdown(name: str) -> None:
    text = Table(name, [name, "b"], [[name, "x"], ["y", name]], note=name).to_markdown()
    tokens = MarkdownIt("gfm-like", {"linkify": False, "html": True}).parse(text)
    kinds = [token.type for token in tokens]
    assert kinds.count("table_open") == 1 and kinds.count("td_open") == 4 and kinds.count("tr_open") == 3
    inside = {child.type for token in tokens for child in token.children or ()}
    assert inside <= {"text", "code_inline", "strong_open", "strong_close", "softbreak"}
    assert hidden_characters(text) == []


def test_sections_have_the_bytes_that_published_reports_have() -> None:
    marked = Table("""It's "a" <b>""", ("", Column("n", "count")), [("x", 1), ("y", None)], note="one\ntwo")
    assert marked.to_html() == (
        "<section><h2>It&#x27;s &quot;a&quot; &lt;b&gt;</h2>"
        '<div class="wide"><table><thead><tr><th></th><th class="n">n</th></tr></thead>'
        '<tbody><tr><td>x</td><td class="n">1</td></tr>\n<tr><td>y</td><td class="n">–</td></tr></tbody></table></div>'
        '<p class="note">one<br>two</p></section>'
    )
    text = PreformattedText("Step", line="surgery <x>", text=" a\n  b", links={"log & text": "a b/log.txt", "out": "o"})
    assert text.to_html() == (
        '<section><h2>Step</h2><div class="wide"><pre class="line">surgery &lt;x&gt;</pre></div>'
        '<div class="wide"><pre> a\n  b</pre></div>'
        '<p class="note"><a href="a%20b/log.txt">log &amp; text</a> · <a href="o">out</a></p></section>'
    )
    assert Table("", ("",), []).to_html() == (
        '<section><h2></h2><div class="wide"><table><tbody></tbody></table></div></section>'
    )
    assert Report("T", "").to_html().endswith("<main>\n<h1>T</h1>\n\n\n</main>\n</body>\n</html>\n")


def test_a_page_replaces_the_old_one_or_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(SurgeryError, match=r"report.html: the disk is full"):
            Report("T", "").write(path)
    assert path.read_text() == "old"
    Report("T", "").write(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert "<h1>T</h1>" in path.read_text()


def test_a_picture_is_saved_as_it_is(tmp_path: Path) -> None:
    assert Figure("t", "c", PNG).save(tmp_path / "a.png").read_bytes() == PNG
    with pytest.raises(SurgeryError, match="cannot be written"):
        Figure("t", "c", PNG).save(tmp_path / "a.png" / "b.png")
