"""Report results: tables for terminal, Markdown and HTML, and pages of tables, pictures and text.

A page is one HTML file, complete in itself: styles inline, pictures as data, no script, nothing fetched; its templates
are page.html.j2 and sections.html.j2. A table shows the same numbers in the terminal, in HTML and in Markdown, because
all three format them by `format_value`.
"""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from surgery.io.atomic import write_file
from surgery.io.escaping import html_text, markdown_text, one_line, visible

if TYPE_CHECKING:
    from jinja2 import Environment
    from rich.table import Table as RichTable

Format = Literal["auto", "count", "number", "score", "percent", "bytes"]
Value = str | int | float | bool | None

MISSING = "–"
BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
PLAIN_FROM, PLAIN_BELOW = 1e-3, 1e6  # outside this range an exponent is easier to read


def format_value(value: Value, rule: Format = "auto") -> str:
    """Return a value as all reports write it.

    "auto" writes whole numbers as "count" and others as "number". "count": 1,234. "number": four significant
    digits, with an exponent below 0.001 and from a million. "score": three decimals. "percent": the fraction
    0.123 as 12.3 %. "bytes": decimal units. None is a dash, a boolean yes or no; text is returned as it is.
    """
    if value is None:
        return MISSING
    # Before the numbers, as a bool is an int in Python.
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    text = _format_number(value, rule)
    # A true minus sign, but only in front: the exponent of 1.2e-05 stays as programs read it.
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
        # 999,999 is 1 MB, not 1000 kB, which rounding to three digits would make of it.
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
    """A column's heading, and the format of its numbers."""

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
    def headings(self) -> list[str]:
        """The columns' names, each on one line."""
        return [one_line(column.name) for column in self._columns]

    @property
    def has_heading(self) -> bool:
        """Whether any column has a name; else the row of headings is left out."""
        return any(self.headings)

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text, every value by its column's format, and on one line: names may have line breaks."""
        rules = [column.rule for column in self._columns]
        return [[one_line(format_value(v, rule)) for v, rule in zip(row, rules, strict=True)] for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """Per column: whether it holds numbers only, and so is aligned to the right."""
        columns = [[row[at] for row in self.rows if row[at] is not None] for at in range(len(self.columns))]
        return [bool(values) and not any(isinstance(v, str | bool) for v in values) for values in columns]

    def to_rich(self) -> RichTable:
        """Return the table for a rich console."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=Text(one_line(self.title), style="bold"),
            caption=None if self.note is None else Text(visible(self.note)),
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            show_header=self.has_heading,
        )
        for heading, numeric in zip(self.headings, self.numeric, strict=True):
            table.add_column(Text(heading), justify="right" if numeric else "left", overflow="fold")
        for cells in self.cells:
            table.add_row(*map(Text, cells))
        return table

    def to_markdown(self) -> str:
        """Return the table in GitHub's Markdown, under its title in bold."""
        rule = " | ".join("---:" if numeric else "---" for numeric in self.numeric)
        lines = [self.headings, *self.cells]
        heading, *body = (f"| {' | '.join(map(markdown_text, cells))} |" for cells in lines)
        note = f"\n\n{markdown_text(self.note)}" if self.note else ""
        return "\n".join((f"**{markdown_text(self.title)}**", "", heading, f"| {rule} |", *body)) + note

    def to_html(self) -> str:
        """Return the table as an HTML section."""
        return _section("table", self)


@dataclass(frozen=True)
class Figure:
    """A picture (PNG bytes), with a caption that explains it."""

    title: str
    caption: str
    png: bytes

    def to_html(self) -> str:
        """Return the picture as an HTML section; its bytes are inside, and its title is the alternative text."""
        return _section("figure", self)

    @property
    def base64(self) -> str:
        """The picture as a data URL holds it."""
        return b64encode(self.png).decode()

    def save(self, path: Path) -> Path:
        """Write the picture to `path`, whole or not at all. Raises SurgeryError."""
        return write_file(path, self.png)


@dataclass(frozen=True)
class PreformattedText:
    """A section of preformatted text: a title, a command line, what it printed, and links.

    text: shown as it is, in columns.
    links: text → address, relative to the page.
    """

    title: str
    line: str = ""
    text: str = ""
    note: str = ""
    links: Mapping[str, str] = field(default_factory=dict)

    def to_html(self) -> str:
        """Return the step as an HTML section."""
        return _section("preformatted", self)


Item = Table | Figure | PreformattedText | str


@dataclass
class Report:
    """A page: a title, an introduction, then tables, figures, preformatted text and paragraphs in the order added."""

    title: str
    intro: str
    items: list[Item] = field(default_factory=list)

    def add(self, item: Item) -> Report:
        """Append an item (a string becomes a paragraph); return the report."""
        self.items.append(item)
        return self

    def to_html(self) -> str:
        """Return the whole page."""
        sections = [_section("paragraph", item) if isinstance(item, str) else item.to_html() for item in self.items]
        page = _environment().get_template("page.html.j2")
        return page.render(title=self.title, intro=self.intro, sections=sections)

    def write(self, path: Path) -> Path:
        """Write the page to `path`, whole or not at all. Raises SurgeryError."""
        return write_file(path, self.to_html().encode())


@cache
def _environment() -> Environment:
    """Return the Jinja environment of the templates beside this file."""
    # Imported late: most commands print tables and write no page.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def escape(value: object) -> Markup:
        # In place of markupsafe's, which lets invisible characters pass.
        return value if isinstance(value, Markup) else Markup(html_text(str(value)))  # noqa: S704  # escaped there

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=escape,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["lines"] = lambda text: escape(text).replace("\n", Markup("<br>"))
    environment.filters["quote"] = partial(quote, errors="surrogatepass")
    return environment


def _section(macro: str, item: object) -> str:
    """Return the HTML of `item` by one of the macros in sections.html.j2, marked as safe to insert in a page."""
    section: str = getattr(_environment().get_template("sections.html.j2").module, macro)(item)
    return section
