"""What a run found, for people: tables, pictures, and one HTML file that holds them all.

The file is complete in itself: styles inline, pictures as data, no script, nothing fetched. A table prints the
same numbers in the terminal, in HTML and in Markdown, because all three ask `format_value`.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg as Canvas
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
        """Writes the picture to `path`, whole or not at all. Raises SurgeryError where it cannot be written."""
        return _write(path, self.png)


@dataclass
class Report:
    """A page that grows: a title, an introduction, then tables, figures and paragraphs as they are added."""

    title: str
    intro: str
    items: list[Table | Figure | str] = field(default_factory=list)

    def add(self, item: Table | Figure | str) -> Report:
        """Appends a table, a figure, or a string as a paragraph; returns the report."""
        self.items.append(item)
        return self

    def to_html(self) -> str:
        """The whole page."""
        body = [f"<p>{_lines(item)}</p>" if isinstance(item, str) else item.to_html() for item in self.items]
        title = html.escape(self.title)
        intro = f'<p class="intro">{_lines(self.intro)}</p>' if self.intro else ""
        return PAGE.format(title=title, style=STYLE, intro=intro, body="\n".join(body))

    def write(self, path: Path) -> Path:
        """Writes the page to `path`, whole or not at all. Raises SurgeryError where it cannot be written."""
        return _write(path, self.to_html().encode())


def _write(path: Path, content: bytes) -> Path:
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        temporary.chmod(0o644)  # mkstemp's file is for its owner alone; a report is to be passed on
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise SurgeryError(f"cannot be written ({error.strerror})", where=path) from error
    return path


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
figure { margin: 0; }
img { display: block; width: 100%; max-width: 54rem; height: auto; margin: 0 auto;
  border-radius: 6px; background: #fff; }
@media print { section { break-inside: avoid; } }
"""


# Pictures. Their paper stays white on light and dark pages alike; colours are safe for colour-blind eyes, and
# lines carry their names at their ends instead of in a box.

BLUE, SOFT, INK, LINE = "#0072B2", "#69727d", "#22262c", "#e3e6ea"
COLOURS = (BLUE, "#D55E00", "#009E73", "#AA4499", "#56B4E9", "#8C6D31")
WIDTH, DPI, PAD = 9.0, 160, 0.12  # inches and dots per inch: sharp on a page 54 rem wide
MOST_VALUES, MOST_TICKS = 14, 24  # bars that still have room for a number, layers for a tick
LABEL_HEIGHT = 0.06  # of a name at a line's end, as a share of the axes: closer ones are moved apart
MOVEMENT = "change ‖A−B‖ / ‖A‖"


class Interval(Protocol):
    """A measured value with the ends of its confidence interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


Curve = Sequence[tuple[float, Interval]]  # (α, score) …
Label = tuple[float, str, str]  # height in data units, text, colour


def layer_movement(
    title: str,
    groups: Sequence[str],
    relative: Sequence[float],
    *,
    measure: str = MOVEMENT,
    caption: str = "",
) -> Figure:
    """Bars: how far each group ("embed", "layer 0", …) moved, as a fraction; what is not finite has no bar.

    groups, relative: (n,). measure: what the fraction is.
    """
    canvas, axes = _axes(title, height=3.6)
    colours = [SOFT if _layer_number(group) is None else BLUE for group in groups]
    heights = [100 * value if math.isfinite(value) else 0.0 for value in relative]
    axes.bar(range(len(groups)), heights, width=0.72, color=colours)
    if len(groups) <= MOST_VALUES:
        for at, value in enumerate(relative):
            text = f"{100 * value:.2f}" if 1e-4 <= value < math.inf else format_value(100 * value)
            place = {"textcoords": "offset points", "ha": "center", "color": INK, "fontsize": 8}
            axes.annotate(text, (at, heights[at]), (0, 3), **place)
    _group_ticks(axes, groups)
    axes.set_ylabel(f"{measure}  (%)")
    axes.set_ylim(bottom=0)
    return _figure(canvas, title, caption)


def layer_parts_heatmap(
    title: str,
    layers: Sequence[str],
    parts: Sequence[str],
    relative: Sequence[Sequence[float | None]],
    *,
    measure: str = MOVEMENT,
    caption: str = "",
) -> Figure:
    """Colours: how far each part (rows) of each layer (columns) moved, as a fraction; None stays blank.

    relative: (layers, parts). measure: what the fraction is.
    """
    import numpy as np

    canvas, axes = _axes(title, height=1.5 + 0.36 * len(parts))
    cells = np.array([[math.nan if v is None else 100 * v for v in row] for row in relative], dtype=float)
    cells = np.ma.masked_invalid(cells.reshape(len(layers), len(parts)).T)
    highest = float(cells.max()) if cells.count() else 0.0
    image = axes.imshow(cells, aspect="auto", cmap="cividis", vmin=0, vmax=highest or 1.0)
    axes.grid(False)
    axes.set_yticks(range(len(parts)), list(parts))
    _group_ticks(axes, layers)
    axes.hlines(
        [at - 0.5 for at in range(1, len(parts))], -0.5, len(layers) - 0.5, color="white", linewidth=1
    )
    axes.vlines(
        [at - 0.5 for at in range(1, len(layers))], -0.5, len(parts) - 0.5, color="white", linewidth=0.6
    )
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.spines[:].set_visible(False)
    bar = canvas.figure.colorbar(image, ax=axes, pad=0.015, aspect=14)
    bar.set_label(f"{measure}  (%)", color=INK)
    bar.ax.tick_params(colors=INK, labelsize=9, length=0)
    bar.outline.set_visible(False)
    return _figure(canvas, title, caption)


def similarity(
    title: str, groups: Sequence[str], series: Mapping[str, Sequence[float | None]], *, caption: str = ""
) -> Figure:
    """Lines: the cosine of each pair of vectors, group by group; None and NaN leave a gap.

    series: name of the pair → (n groups,).
    """
    canvas, axes = _axes(title, height=4.0)
    labels: list[Label] = []
    lowest = 0.0
    for (name, values), colour in zip(series.items(), itertools.cycle(COLOURS), strict=False):
        heights = [math.nan if value is None else value for value in values]
        axes.plot(range(len(heights)), heights, color=colour, linewidth=1.8, marker="o", markersize=3.5)
        known = [height for height in heights if not math.isnan(height)]
        labels += [(known[-1], name, colour)] if known else []
        lowest = min([lowest, *known])
    # The axis is that of cosines, not of these ones: a small difference must not look like a large one.
    axes.set_ylim(min(-0.05, lowest - 0.05), 1.05)
    axes.axhline(0, color=SOFT, linewidth=0.8)
    _group_ticks(axes, groups)
    axes.set_ylabel("cosine")
    _name_lines(axes, labels)
    return _figure(canvas, title, caption)


def scale_curve(
    title: str,
    curve: Curve,
    controls: Mapping[str, Curve] | None = None,
    *,
    lines: Mapping[str, float] | None = None,
    score: str = "score",
    caption: str = "",
) -> Figure:
    """A sweep over α: the score with its interval at each scale, controls beside it, reference scores as lines.

    Args:
        controls: name → points, such as random vectors of the same norm.
        lines: name → a score that does not depend on α: the target unchanged, the donor.
        score: what the vertical axis shows, with its unit.
    """
    canvas, axes = _axes(title, height=4.2)
    labels: list[Label] = []
    points = sorted(curve, key=lambda point: point[0])
    scales, scores = [scale for scale, _ in points], [point for _, point in points]
    axes.fill_between(scales, [s.low for s in scores], [s.high for s in scores], color=BLUE, alpha=0.16, lw=0)
    axes.plot(scales, [s.value for s in scores], color=BLUE, linewidth=2, marker="o", markersize=5)
    for (name, given), colour in zip((controls or {}).items(), itertools.cycle(COLOURS[1:]), strict=False):
        heights = [s.value for _, s in given]
        spans = [[s.value - s.low for _, s in given], [s.high - s.value for _, s in given]]
        style = {"fmt": "D", "color": colour, "markersize": 5, "capsize": 3, "linewidth": 1.2}
        axes.errorbar([scale for scale, _ in given], heights, yerr=spans, **style)
        labels += [(heights[-1], f"◆ {name}", colour)] if heights else []
    for name, height in (lines or {}).items():
        axes.axhline(height, color=SOFT, linewidth=1.1, linestyle=(0, (4, 3)))
        labels.append((height, f"– {name}", SOFT))
    axes.set_xlabel("scale α")
    axes.set_ylabel(score)
    axes.margins(x=0.03, y=0.08)
    _name_lines(axes, labels)
    return _figure(canvas, title, caption)


def _axes(title: str, *, height: float) -> tuple[Canvas, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    room = ConstrainedLayoutEngine(w_pad=PAD, h_pad=PAD)
    picture = Picture(figsize=(WIDTH, height), dpi=DPI, facecolor="white", layout=room)
    axes = picture.add_subplot()
    # A model's name may hold a dollar sign; it is not mathematics.
    axes.set_title(title, loc="left", color=INK, fontsize=11.5, fontweight="bold", pad=12, parse_math=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    return FigureCanvasAgg(picture), axes


def _figure(canvas: Canvas, title: str, caption: str) -> Figure:
    buffer = io.BytesIO()
    # Without the name of matplotlib's version, which would change the bytes and nothing else.
    canvas.figure.savefig(buffer, format="png", metadata={"Software": None})
    return Figure(title, caption, buffer.getvalue())


def _layer_number(group: str) -> int | None:
    number = group.removeprefix("layer ")
    return int(number) if number != group and number.isdecimal() else None


def _group_ticks(axes: Axes, groups: Sequence[str]) -> None:
    """Layers by number, as many as fit; other groups by name."""
    numbers = [_layer_number(group) for group in groups]
    step = max(1, math.ceil(sum(number is not None for number in numbers) / MOST_TICKS))
    shown = [at for at, number in enumerate(numbers) if number is None or number % step == 0]
    axes.set_xticks(shown, [groups[at].removeprefix("layer ") for at in shown])
    for label, at in zip(axes.get_xticklabels(), shown, strict=True):
        label.set_parse_math(False)
        if numbers[at] is None and len(groups) > MOST_VALUES:
            label.set(rotation=50, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(groups) - 0.4)
    if any(number is not None for number in numbers):
        axes.set_xlabel("layer")


def _name_lines(axes: Axes, labels: Sequence[Label]) -> None:
    """Names at the right edge at the height of their lines; those that would overlap stand around their mean."""
    low, high = axes.get_ylim()
    ordered = sorted(labels, key=lambda label: label[0])
    stacks: list[list[float]] = []  # wished heights, as shares of the axes, of names that stand on each other
    for height, _, _ in ordered:
        stacks.append([(height - low) / (high - low)])
        while len(stacks) > 1 and _places(stacks[-2])[-1] + LABEL_HEIGHT > _places(stacks[-1])[0]:
            stacks[-2:] = [stacks[-2] + stacks[-1]]
    heights = [place for stack in stacks for place in _places(stack)]
    for place, (_, name, colour) in zip(heights, ordered, strict=True):
        where = {"xycoords": "axes fraction", "va": "center", "annotation_clip": False, "parse_math": False}
        axes.annotate(name, (1.012, place), color=colour, fontsize=9, **where)


def _places(stack: Sequence[float]) -> list[float]:
    bottom = sum(stack) / len(stack) - LABEL_HEIGHT * (len(stack) - 1) / 2
    return [bottom + LABEL_HEIGHT * at for at in range(len(stack))]
