"""What a run found, for people: tables, and one HTML file that holds tables and pictures.

The file is complete in itself: styles inline, pictures as data, no script, nothing fetched. A table prints
the same numbers in the terminal, in HTML and in Markdown, because all three ask `format_value`.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from surgery.io.atomic import write_file

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Format = Literal["auto", "count", "number", "score", "percent", "bytes"]
Value = str | int | float | bool | None

MISSING = "–"
BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
PLAIN_FROM, PLAIN_BELOW = 1e-3, 1e6  # outside this range a number reads better with an exponent


def format_value(value: Value, rule: Format = "auto") -> str:
    """The one way a value is written.

    "auto" writes whole numbers as "count" and others as "number". "count": 1,234. "number": four significant
    digits, with an exponent below 0.001 and from a million. "score": three decimals. "percent": the fraction
    0.123 as 12.3 %. "bytes": decimal units. None is a dash, a truth value yes or no, text itself.
    """
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    text = _format_number(value, rule)
    return text.replace("-", "−", 1) if text.startswith("-") else text


def _format_number(value: float, rule: Format) -> str:
    if rule == "count" or (rule == "auto" and isinstance(value, int)):
        return f"{value:,.0f}"
    if rule == "percent":
        return f"{100 * value:.1f} %"
    if rule == "score":
        return f"{value:.3f}"
    if rule == "bytes":
        power = min(int(math.log(abs(value), 1000)), len(BYTE_UNITS) - 1) if abs(value) >= 1 else 0
        power += power + 1 < len(BYTE_UNITS) and abs(value) / 1000**power >= 999.5
        return f"{value / 1000**power:.{3 if power else 4}g} {BYTE_UNITS[power]}"
    if value == 0:
        return "0"
    if PLAIN_FROM <= abs(value) < PLAIN_BELOW:
        digits = max(0, 3 - math.floor(math.log10(abs(value))))
        return f"{value:,.{digits}f}"
    return f"{value:.3e}"


@dataclass(frozen=True)
class Column:
    """A column's heading and how its numbers are written."""

    name: str
    rule: Format = "auto"


@dataclass(frozen=True)
class Table:
    """Rows of values under named columns; a plain string is a column with the format "auto".

    Raises:
        ValueError: a row has another length than `columns`.
    """

    title: str
    columns: Sequence[Column | str]
    rows: Sequence[Sequence[Value]]
    note: str | None = None

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: a row has {len(row)} values for {len(self.columns)} columns")

    @property
    def _columns(self) -> list[Column]:
        return [Column(column) if isinstance(column, str) else column for column in self.columns]

    @property
    def _cells(self) -> list[list[str]]:
        rules = [column.rule for column in self._columns]
        return [[format_value(v, rule) for v, rule in zip(row, rules, strict=True)] for row in self.rows]

    @property
    def _numeric(self) -> list[bool]:
        """Per column: whether it holds numbers only, and so stands to the right."""
        columns = [[row[at] for row in self.rows if row[at] is not None] for at in range(len(self.columns))]
        return [bool(values) and not any(isinstance(v, str | bool) for v in values) for values in columns]

    def to_rich(self) -> RichTable:
        """The table for a rich console."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=Text(self.title, style="bold"),
            caption=None if self.note is None else Text(self.note),
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            show_header=any(column.name for column in self._columns),
        )
        for column, numeric in zip(self._columns, self._numeric, strict=True):
            table.add_column(Text(column.name), justify="right" if numeric else "left", overflow="fold")
        for cells in self._cells:
            table.add_row(*map(Text, cells))
        return table

    def to_markdown(self) -> str:
        """The table in GitHub's Markdown, under its title in bold."""
        rule = " | ".join("---:" if numeric else "---" for numeric in self._numeric)
        lines = [[column.name for column in self._columns], *self._cells]
        heading, *body = (f"| {' | '.join(map(_markdown_cell, cells))} |" for cells in lines)
        note = f"\n\n{self.note}" if self.note else ""
        return "\n".join((f"**{_markdown_cell(self.title)}**", "", heading, f"| {rule} |", *body)) + note

    def to_html(self) -> str:
        """The table as an HTML section."""

        def row(cells: Sequence[str], tag: str) -> str:
            kinds = [' class="n"' if numeric else "" for numeric in self._numeric]
            parts = zip(cells, kinds, strict=True)
            return f"<tr>{''.join(f'<{tag}{kind}>{html.escape(cell)}</{tag}>' for cell, kind in parts)}</tr>"

        names = [column.name for column in self._columns]
        head = f"<thead>{row(names, 'th')}</thead>" if any(names) else ""
        body = "\n".join(row(cells, "td") for cells in self._cells)
        note = f'<p class="note">{_lines(self.note)}</p>' if self.note else ""
        return (
            f"<section><h2>{html.escape(self.title)}</h2>"
            f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>{note}</section>'
        )


@dataclass(frozen=True)
class Figure:
    """A picture (PNG bytes) with the sentence that says what to see in it."""

    title: str
    caption: str
    png: bytes

    def to_html(self) -> str:
        """The picture as an HTML section; its bytes are inside, and so is its title."""
        data = base64.b64encode(self.png).decode()
        caption = f"<figcaption>{_lines(self.caption)}</figcaption>" if self.caption else ""
        image = f'<img alt="{html.escape(self.title)}" src="data:image/png;base64,{data}">'
        return f"<section><figure>{image}{caption}</figure></section>"

    def save(self, path: Path) -> Path:
        """Writes the picture to `path`, whole or not at all. Raises SurgeryError where that fails."""
        return write_file(path, self.png)


@dataclass(frozen=True)
class PreformattedText:
    """A step of a longer page: its title, the line that does it, what it printed as it stands, and links.

    text: keeps its columns. links: what is shown → address, relative to the page.
    """

    title: str
    line: str = ""
    text: str = ""
    note: str = ""
    links: Mapping[str, str] = field(default_factory=dict)

    def to_html(self) -> str:
        """The step as an HTML section."""
        links = " · ".join(f'<a href="{quote(to)}">{html.escape(name)}</a>' for name, to in self.links.items())
        parts = [
            f"<h2>{html.escape(self.title)}</h2>",
            f'<p class="note">{_lines(self.note)}</p>' if self.note else "",
            f'<div class="wide"><pre class="line">{html.escape(self.line)}</pre></div>' if self.line else "",
            f'<div class="wide"><pre>{html.escape(self.text)}</pre></div>' if self.text.strip() else "",
            f'<p class="note">{links}</p>' if links else "",
        ]
        return f"<section>{''.join(parts)}</section>"


Item = Table | Figure | PreformattedText | str


@dataclass
class Report:
    """A page that grows: a title, an introduction, then tables, figures, steps and paragraphs as they are added."""

    title: str
    intro: str
    items: list[Item] = field(default_factory=list)

    def add(self, item: Item) -> Report:
        """Appends a table, a figure, a step, or a string as a paragraph; returns the report."""
        self.items.append(item)
        return self

    def to_html(self) -> str:
        """The whole page."""
        body = [f"<p>{_lines(item)}</p>" if isinstance(item, str) else item.to_html() for item in self.items]
        title = html.escape(self.title)
        intro = f'<p class="intro">{_lines(self.intro)}</p>' if self.intro else ""
        return PAGE.format(title=title, style=STYLE, intro=intro, body="\n".join(body))

    def write(self, path: Path) -> Path:
        """Writes the page to `path`, whole or not at all. Raises SurgeryError where that fails."""
        return write_file(path, self.to_html().encode())


def _markdown_cell(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return " ".join(escaped.split())


def _lines(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{intro}
{body}
</main>
</body>
</html>
"""

STYLE = """
:root { --ink: #1c1f24; --soft: #5d6673; --line: #dfe3e8; --page: #f6f7f9; --card: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa4b1; --line: #333a44; --page: #14171b; --card: #1d2127; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .8rem; overflow-wrap: anywhere; }
.intro { font-size: 1.08rem; color: var(--soft); margin: 0 0 2rem; max-width: 46rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1.2rem 1.4rem; margin: 1.2rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td { text-align: left; padding: .4rem .9rem .4rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.note, figcaption { color: var(--soft); font-size: .9rem; margin: .8rem 0 0; }
pre { font: .82rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; margin: 0; }
pre.line { color: var(--soft); margin: 0 0 .8rem; }
figure { margin: 0; }
img { display: block; width: 100%; max-width: 54rem; height: auto; margin: 0 auto;
  border-radius: 6px; background: #fff; }
@media print { section { break-inside: avoid; } }
"""
