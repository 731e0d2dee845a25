"""Draw plots as `Figure`s: one function per kind, and the canvas, axes and labels that all plots share.

Matplotlib is imported when the first plot is drawn, since most commands draw none.
"""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from surgery.io.escaping import one_line
from surgery.reporting.report import Figure, format_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg as Canvas

# The background is white on light and dark pages alike; the colours are safe for colour-blind readers, and lines are
# labelled at their ends instead of in a legend.

BLUE, PALE, SOFT, INK, LINE = "#0072B2", "#9db8cc", "#69727d", "#22262c", "#e3e6ea"
COLOURS = (BLUE, "#D55E00", "#009E73", "#AA4499", "#56B4E9", "#8C6D31")
WIDTH, DPI, PAD = 9.0, 160, 0.12  # inches and dots per inch: sharp on a page 54 rem wide
MOST_VALUES, MOST_TICKS = 14, 24  # bars that still have room for a number, layers for a tick
LABEL_HEIGHT = 0.06  # of a label at a line's end, as a share of the axes: closer ones are moved apart
MOVEMENT = "change ‖A−B‖ / ‖A‖"
MOST_CHARACTERS = 120  # of a title
MOST_LABEL_CHARACTERS = 50  # of a name beside the plot: more would push it out of the picture
MOST_NUMBERED = 64  # cells of a map that still have room for a number
# How far up the colour map the largest value goes: at the very end, colours are too dark for a number on them.
BRIGHTEST = 0.85


class PlotInterval(Protocol):
    """A measured value with the ends of its confidence interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


Curve = Sequence[tuple[float, PlotInterval]]  # (α, score) …
Label = tuple[float, str, str]  # height in data units, text, colour


def plot_layer_changes(
    title: str,
    groups: Sequence[str],
    relative: Sequence[float],
    *,
    measure: str = MOVEMENT,
    caption: str = "",
) -> Figure:
    """Draw a bar for the relative change of each group ("embed", "layer 0", …); values that are not finite have none.

    groups, relative: (n,), fractions. measure: the label of the vertical axis.
    """
    canvas, axes = titled_axes(title, height=3.6)
    colours = [SOFT if _layer_number(group) is None else BLUE for group in groups]
    # A bar of NaN or ∞ would spoil the axis's range; the text above its place says what the value is.
    heights = [100 * value if math.isfinite(value) else 0.0 for value in relative]
    axes.bar(range(len(groups)), heights, width=0.72, color=colours)
    if len(groups) <= MOST_VALUES:
        for at, value in enumerate(relative):
            # Below 0.01 % two decimals would read 0.00.
            text = f"{100 * value:.2f}" if 1e-4 <= value < math.inf else format_value(100 * value)
            place: dict[str, Any] = {
                "textcoords": "offset points",
                "ha": "center",
                "color": INK,
                "fontsize": 8,
            }
            axes.annotate(text, (at, heights[at]), (0, 3), **place)
    group_ticks(axes, groups)
    axes.set_ylabel(f"{measure}  (%)")
    axes.set_ylim(bottom=0)
    return render_figure(canvas, title, caption)


def plot_similarity(
    title: str, groups: Sequence[str], series: Mapping[str, Sequence[float | None]], *, caption: str = ""
) -> Figure:
    """Draw a line for the cosines of each pair of vectors, group by group; None and NaN leave a gap.

    series: name of the pair → (n groups,).
    """
    canvas, axes = titled_axes(title, height=4.0)
    labels = _lines(axes, series)
    lowest = min([0.0, *_known(series)])
    # The axis has the full range of cosines: a small difference must not look like a large one.
    axes.set_ylim(min(-0.05, lowest - 0.05), 1.05)
    axes.axhline(0, color=SOFT, linewidth=0.8)
    group_ticks(axes, groups)
    axes.set_ylabel("cosine")
    label_lines(axes, labels)
    return render_figure(canvas, title, caption)


def plot_distances(
    title: str, groups: Sequence[str], series: Mapping[str, Sequence[float | None]], *, caption: str = ""
) -> Figure:
    """Draw a line for the relative distances of a result to each of several models, by group; None leaves a gap.

    series: name of the model → (n groups,).
    """
    canvas, axes = titled_axes(title, height=4.0)
    percent = {name: [None if value is None else 100 * value for value in values] for name, values in series.items()}
    labels = _lines(axes, percent)
    axes.set_ylim(bottom=0)
    group_ticks(axes, groups)
    axes.set_ylabel("distance ‖OUT−x‖ / ‖x‖  (%)")
    label_lines(axes, labels)
    return render_figure(canvas, title, caption)


def _lines(axes: Axes, series: Mapping[str, Sequence[float | None]]) -> list[Label]:
    """Draw a line for each series; return the labels for their ends."""
    labels: list[Label] = []
    for (name, values), colour in zip(series.items(), itertools.cycle(COLOURS), strict=False):
        heights = [math.nan if value is None else value for value in values]
        axes.plot(range(len(heights)), heights, color=colour, linewidth=1.8, marker="o", markersize=3.5)
        known = _known({name: values})
        labels += [(known[-1], name, colour)] if known else []
    return labels


def _known(series: Mapping[str, Sequence[float | None]]) -> list[float]:
    return [value for values in series.values() for value in values if value is not None and not math.isnan(value)]


def plot_scale_curve(
    title: str,
    curve: Curve,
    controls: Mapping[str, Curve] | None = None,
    *,
    lines: Mapping[str, float] | None = None,
    name: str = "v",
    score: str = "score",
    caption: str = "",
) -> Figure:
    """Draw a sweep over α: the score and its interval at each scale, with controls and reference scores.

    Args:
        controls: name → points, such as random vectors of the same norm.
        lines: name → a score that does not depend on α: the target unchanged, the donor.
        name: the label of the curve.
        score: the label of the vertical axis, with its unit.
    """
    canvas, axes = titled_axes(title, height=4.2)
    labels: list[Label] = []
    # A grid may come in any order, and the line must not run back and forth.
    points = sorted(curve, key=lambda point: point[0])
    scales, scores = [scale for scale, _ in points], [point for _, point in points]
    axes.fill_between(scales, [s.low for s in scores], [s.high for s in scores], color=BLUE, alpha=0.16, lw=0)
    axes.plot(scales, [s.value for s in scores], color=BLUE, linewidth=2, marker="o", markersize=5)
    labels += [(scores[-1].value, f"● {name}", BLUE)] if scores else []
    for (control, given), colour in zip((controls or {}).items(), itertools.cycle(COLOURS[1:]), strict=False):
        heights = [s.value for _, s in given]
        # A proportion of 1 may round to just below its interval's end; matplotlib refuses negative lengths.
        spans = [[max(0, s.value - s.low) for _, s in given], [max(0, s.high - s.value) for _, s in given]]
        style: dict[str, Any] = {"fmt": "D", "color": colour, "markersize": 5, "capsize": 3, "linewidth": 1.2}
        axes.errorbar([scale for scale, _ in given], heights, yerr=spans, **style)
        labels += [(heights[-1], f"◆ {control}", colour)] if heights else []
    for line, height in (lines or {}).items():
        axes.axhline(height, color=SOFT, linewidth=1.1, linestyle=(0, (4, 3)))
        labels.append((height, f"– {line}", SOFT))
    axes.set_xlabel("scale α")
    axes.set_ylabel(score)
    axes.margins(x=0.03, y=0.08)
    label_lines(axes, labels)
    return render_figure(canvas, title, caption)


def plot_score_bars(
    title: str,
    panels: Mapping[str, Mapping[str, PlotInterval]],
    *,
    best: Mapping[str, Collection[str]] | None = None,
    caption: str = "",
) -> Figure:
    """Draw a bar with its interval for each model, in one panel per score; the best of a panel are darker.

    panels: score → model → value; a model that a panel lacks has no bar there.
    """
    models = list(dict.fromkeys(model for scores in panels.values() for model in scores))
    canvas = blank_canvas(1.3 + 0.36 * len(models), title=title)
    inner = canvas.figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (panel, scores) in zip(inner, panels.items(), strict=True):
        _bar_panel(axes, panel, models, scores, (best or {}).get(panel, ()))
    return render_figure(canvas, title, caption)


def _bar_panel(
    axes: Axes, panel: str, models: Sequence[str], scores: Mapping[str, PlotInterval], best: Collection[str]
) -> None:
    for at, model in enumerate(models):
        if model not in scores:
            continue
        score = scores[model]
        axes.barh(at, score.value, height=0.62, color=BLUE if model in best else PALE)
        if math.isfinite(score.low) and math.isfinite(score.high):
            axes.plot([score.low, score.high], [at, at], color=INK, linewidth=1.4, solid_capstyle="butt")
        end = max(x for x in (score.value, score.high) if math.isfinite(x))
        axes.annotate(
            format_value(score.value, "score"),
            (end, at),
            (5, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=8,
        )
    axes.set_yticks(range(len(models)), [short_label(model) for model in models], parse_math=False)
    # Upside down, so that the first model is at the top.
    axes.set_ylim(len(models) - 0.4, -0.6)
    # From 0, or the length of a bar would not be its score.
    axes.set_xlim(left=0)
    axes.margins(x=0.2)
    axes.set_title(panel, loc="left", color=INK, fontsize=9.5, parse_math=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)


def blank_canvas(height: float, *, title: str = "") -> Canvas:
    """Return a white canvas of `height` inches, with a title above all its panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    room = ConstrainedLayoutEngine(w_pad=PAD, h_pad=PAD)
    # Not by pyplot, which keeps every figure in memory until it is closed, and may look for a display.
    canvas = FigureCanvasAgg(Picture(figsize=(WIDTH, height), dpi=DPI, facecolor="white", layout=room))
    if title:
        title_at: dict[str, Any] = {"x": 0.012, "ha": "left", "fontsize": 11.5, "fontweight": "bold"}
        canvas.figure.suptitle(title, color=INK, parse_math=False, **title_at)
    return canvas


def titled_axes(title: str, *, height: float) -> tuple[Canvas, Axes]:
    """Return a canvas of `height` inches with one panel in our style."""
    canvas = blank_canvas(height)
    axes = canvas.figure.add_subplot()
    # A model's name may contain a dollar sign, which matplotlib would read as the start of a formula.
    axes.set_title(title, loc="left", color=INK, fontsize=11.5, fontweight="bold", pad=12, parse_math=False)
    style(axes)
    return canvas, axes


def style(axes: Axes) -> None:
    """Apply our style: no box, pale horizontal lines."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)


def render_figure(canvas: Canvas, title: str, caption: str) -> Figure:
    """Render the canvas as a PNG."""
    _make_texts_plain(canvas)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box; the report has the name in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # Without matplotlib's version in the metadata, equal plots have equal bytes.
        canvas.figure.savefig(buffer, format="png", metadata={"Software": None})
    return Figure(title, caption, buffer.getvalue())


def _make_texts_plain(canvas: Canvas) -> None:
    """Take every text of the picture for what it is: no formulas, no control characters, no more than fits."""
    from matplotlib.text import Text

    for text in canvas.figure.findobj(Text):
        assert isinstance(text, Text)
        content = text.get_text()
        shown = one_line(content, MOST_CHARACTERS)
        if shown != content:
            text.set_text(shown)
        # Between dollar signs matplotlib reads a formula, or raises an error.
        text.set_parse_math(False)


def short_label(text: str) -> str:
    """Return a name as it can stand beside a plot, at a tick or a line's end, which both take their room from it."""
    return one_line(text, MOST_LABEL_CHARACTERS)


def _layer_number(group: str) -> int | None:
    number = group.removeprefix("layer ")
    return int(number) if number != group and number.isdecimal() else None


def group_ticks(axes: Axes, groups: Sequence[str]) -> None:
    """Label the horizontal axis: layers by number, as many as fit; other groups by name."""
    numbers = [_layer_number(group) for group in groups]
    step = max(1, math.ceil(sum(number is not None for number in numbers) / MOST_TICKS))
    labelled = [at for at, number in enumerate(numbers) if number is None or number % step == 0]
    axes.set_xticks(labelled, [short_label(groups[at].removeprefix("layer ")) for at in labelled])
    for label, at in zip(axes.get_xticklabels(), labelled, strict=True):
        label.set_parse_math(False)
        if numbers[at] is None and len(groups) > MOST_VALUES:
            label.set(rotation=50, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(groups) - 0.4)
    if any(number is not None for number in numbers):
        axes.set_xlabel("layer")


def label_lines(axes: Axes, labels: Sequence[Label], *, spacing: float = LABEL_HEIGHT) -> None:
    """Write labels at the right edge, level with their lines; those that would overlap are spread around their mean.

    spacing: the height of a label as a share of the axes.
    """
    low, high = axes.get_ylim()
    ordered = sorted(labels, key=lambda label: label[0])
    stacks: list[list[float]] = []  # ideal heights, as shares of the axes, of labels that touch each other
    for height, _, _ in ordered:
        # Lines that end beyond the axes are labelled at their edge: a name far outside could not be drawn at all.
        stacks.append([min(max((height - low) / (high - low), 0.0), 1.0)])
        # Two stacks that touch become one, which takes more room and may touch the next in its turn.
        while len(stacks) > 1 and _spread(stacks[-2], spacing)[-1] + spacing > _spread(stacks[-1], spacing)[0]:
            stacks[-2:] = [stacks[-2] + stacks[-1]]
    heights = [place for stack in stacks for place in _spread(stack, spacing)]
    for place, (_, name, colour) in zip(heights, ordered, strict=True):
        where: dict[str, Any] = {
            "xycoords": "axes fraction",
            "va": "center",
            "annotation_clip": False,
            "parse_math": False,
        }
        axes.annotate(short_label(name), (1.012, place), color=colour, fontsize=9, **where)


def _spread(stack: Sequence[float], spacing: float) -> list[float]:
    bottom = sum(stack) / len(stack) - spacing * (len(stack) - 1) / 2
    return [bottom + spacing * at for at in range(len(stack))]
