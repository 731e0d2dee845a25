"""Figures of heads: a map of layers × heads, the screen against ablation, and what growing sets do.

They share the style of `surgery.reporting.plots`. Matplotlib is imported when the first is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from probes.refusal.plots import DASHES, draw_line
from surgery.errors import SurgeryError
from surgery.evaluation.statistics import Floats, spearman
from surgery.reporting.plots import (
    BLUE,
    BRIGHTEST,
    COLOURS,
    INK,
    LABEL_HEIGHT,
    LINE,
    MOST_NUMBERED,
    MOST_TICKS,
    PALE,
    SOFT,
    PlotInterval,
    blank_canvas,
    label_lines,
    render_figure,
    style,
    titled_axes,
)
from surgery.reporting.report import Figure, format_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ORANGE = COLOURS[1]
# With more marked points than this their names would cover each other.
MOST_NAMED = 16
# From this share of the largest value on the colour is so dark that a number on it is white.
DARK = 0.6
# A name beside a point: width and height as shares of the axes, and its distance.
NAME_SIZE, NAME_GAP = (0.06, 0.045), 0.008

HeadIndex = tuple[int, int]  # layer, head
Box = tuple[float, float, float, float]  # left, bottom, right, top


def head_map_figure(
    title: str,
    values: ArrayLike,
    *,
    marked: Sequence[HeadIndex] = (),
    measure: str = "contribution to the refusal logit",
    caption: str = "",
) -> Figure:
    """Draw a map of layers × heads: red where a head works against refusal, blue where it works for it, white at 0.

    Args:
        values: (layers, heads); NaN where a layer has no heads, or fewer, which is hatched.
        marked: (layer, head), outlined.
        measure: what the values are, with their unit; written at the colour bar.

    Raises:
        SurgeryError: no head has a value, or a marked one is outside.
    """
    grid = np.asarray(values, dtype=np.float64)
    if grid.ndim != 2 or not np.isfinite(grid).any():
        raise SurgeryError("no head has a value to draw", where=title)
    layers, heads = grid.shape
    outside = [(layer, head) for layer, head in marked if not (0 <= layer < layers and 0 <= head < heads)]
    if outside:
        raise SurgeryError(f"there is no head L{outside[0][0]}H{outside[0][1]} among {layers} × {heads}", where=title)
    largest = float(np.nanmax(np.abs(grid))) or 1.0
    canvas, axes = titled_axes(title, height=min(8.5, 1.5 + max(2.2, 0.15 * layers)))
    axes.grid(visible=False)
    # The hatch is visible where the map has no value.
    axes.patch.set(facecolor="white", hatch="////", edgecolor=LINE)
    image = axes.imshow(
        np.ma.masked_invalid(grid),
        cmap="RdBu",
        # The ends of the colour map are nearly black: the largest value gets a colour this share of the way there.
        vmin=-largest / BRIGHTEST,
        vmax=largest / BRIGHTEST,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
    )
    _outline_cells(axes, marked)
    if grid.size <= MOST_NUMBERED:
        _number_cells(axes, grid, largest)
    for axis, count in ((axes.xaxis, heads), (axes.yaxis, layers)):
        axis.set_ticks(range(0, count, max(1, math.ceil(count / MOST_TICKS))))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    bar = canvas.figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04)
    bar.outline.set_visible(False)
    # The bar ends at the largest value; the colours beyond it are not used.
    bar.ax.set_ylim(-largest, largest)
    bar.ax.tick_params(colors=INK, labelsize=8.5, length=0)
    bar.set_label(measure, color=INK, fontsize=9, parse_math=False)
    return render_figure(canvas, title, caption)


def _outline_cells(axes: Axes, marked: Sequence[HeadIndex]) -> None:
    from matplotlib.patches import Rectangle

    for layer, head in marked:
        # Inside the cell, or neighbours would share a line; white below black is visible on every colour.
        for colour, width in (("white", 3.0), (INK, 1.4)):
            corner = (head - 0.46, layer - 0.44)
            axes.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, edgecolor=colour, linewidth=width))


def _number_cells(axes: Axes, grid: Floats, largest: float) -> None:
    for layer, head in zip(*np.nonzero(np.isfinite(grid)), strict=True):
        value = float(grid[layer, head])
        colour = "white" if abs(value) > DARK * largest else INK
        text = f"{value:.2g}".replace("-", "−")
        axes.text(head, layer, text, ha="center", va="center", fontsize=8, color=colour)


def screen_figure(
    title: str,
    attribution: Sequence[float],
    effect: Sequence[float],
    *,
    names: Sequence[str] = (),
    marked: Collection[int] = (),
    x: str = "attribution of the head",
    y: str = "change in refusal when it is ablated",
    caption: str = "",
) -> Figure:
    """Draw each head's attribution against the effect of its ablation; the caption has their rank correlation.

    Args:
        attribution, effect: (n,). names: (n,) such as "L12H7", written at marked points where these are few.
        marked: indices of points to mark.

    Raises:
        SurgeryError: lengths differ, or a value is NaN.
    """
    correlation = spearman(attribution, effect)
    canvas, axes = titled_axes(title, height=4.6)
    rest = [at for at in range(len(attribution)) if at not in marked]
    chosen = sorted(marked)
    for points, colour, size in ((rest, PALE, 18), (chosen, ORANGE, 34)):
        axes.scatter([attribution[at] for at in points], [effect[at] for at in points], s=size, color=colour, lw=0)
    axes.axhline(0, color=SOFT, linewidth=0.8)
    axes.axvline(0, color=SOFT, linewidth=0.8)
    axes.margins(0.06, 0.08)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if names and len(chosen) <= MOST_NAMED:
        _name_points(axes, [(attribution[at], effect[at], names[at]) for at in chosen])
    numbers = (correlation.value, correlation.low, correlation.high)
    rho, low, high = (format_value(number, "score") for number in numbers)
    sentence = f"Spearman's ρ = {rho} (95 % interval {low} to {high}, {len(attribution):,} heads)."
    return render_figure(canvas, title, f"{caption} {sentence}".strip())


def cumulative_figure(
    title: str,
    sizes: Sequence[int],
    scores: Sequence[PlotInterval],
    *,
    random: Sequence[PlotInterval] = (),
    kl: Sequence[float] = (),
    random_kl: Sequence[float] = (),
    budget: float | None = None,
    chosen: int | None = None,
    name: str = "chosen heads",
    measure: str = "refusal of harmful prompts",
    caption: str = "",
) -> Figure:
    """Draw what ablating more and more heads does, beside as many random ones, and below it what it costs in KL.

    Args:
        sizes: (n,) how many heads are ablated. scores: (n,) with intervals.
        random: (n,) mean, low and high over random sets of the same sizes, or empty.
        kl: (n,) KL divergence from the unchanged model in nats per token, or empty for no second panel. random_kl:
            its mean over random sets.
        budget: the largest KL allowed. chosen: the size that was decided on.
        name: of the sets. measure: what the upper axis shows, with its unit.

    Raises:
        SurgeryError: there is no size, or a series is of another length.
    """
    for series in (scores, random or sizes, kl or sizes, random_kl or sizes):
        if not sizes or len(series) != len(sizes):
            raise SurgeryError(f"got {len(series)} values for {len(sizes)} numbers of heads", where=title)
    canvas = blank_canvas(5.6 if kl else 4.2, title=title)
    ratios: dict[str, Any] = {"height_ratios": [3, 2][: 2 if kl else 1]}
    panels = canvas.figure.subplots(2 if kl else 1, 1, sharex=True, squeeze=False, gridspec_kw=ratios)[:, 0]
    for axes in panels:
        style(axes)
        if chosen is not None:
            axes.axvline(chosen, color=SOFT, linewidth=1.1, linestyle=DASHES)
    _draw_scores(panels[0], sizes, (("random heads", random, SOFT), (name, scores, BLUE)))
    panels[0].set_ylabel(measure)
    if kl:
        _draw_costs(panels[1], sizes, (("random heads", random_kl, SOFT), (name, kl, BLUE)), budget)
    panels[-1].set_xlabel("heads ablated" if chosen is None else f"heads ablated (dashed: {chosen}, the choice)")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    return render_figure(canvas, title, caption)


def _draw_scores(axes: Axes, sizes: Sequence[int], lines: Sequence[tuple[str, Sequence[PlotInterval], str]]) -> None:
    labels = []
    for name, points, colour in lines:
        if points:
            axes.fill_between(sizes, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.18, lw=0)
            labels.append(draw_line(axes, sizes, [point.value for point in points], name, colour))
    axes.margins(x=0.03, y=0.08)
    label_lines(axes, labels)


def _draw_costs(
    axes: Axes, sizes: Sequence[int], lines: Sequence[tuple[str, Sequence[float], str]], budget: float | None
) -> None:
    labels = [draw_line(axes, sizes, values, name, colour) for name, values, colour in lines if values]
    if budget is not None:
        axes.axhline(budget, color=ORANGE, linewidth=1.2, linestyle=DASHES)
        labels.append((budget, f"– budget {budget:g}", ORANGE))
    axes.set_ylabel("KL  (nats/token)")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.1)
    # The panel is lower than others, so the same distance between names is a larger share of it.
    label_lines(axes, labels, spacing=1.6 * LABEL_HEIGHT)


def _name_points(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write names beside points where there is room; a name that would run into another or into a point is left out."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    # In shares of the axes, so that names have the same size whatever the units are.
    places = [((x - left) / (right - left), (y - bottom) / (top - bottom)) for x, y, _ in points]
    width, height = NAME_SIZE
    taken = [(x - NAME_GAP / 2, y - NAME_GAP, x + NAME_GAP / 2, y + NAME_GAP) for x, y in places]
    for (x, y), (_, _, name) in zip(places, points, strict=True):
        beside, over = NAME_GAP + width / 2, NAME_GAP + height / 2
        # Right, left, above, below, then the corners: the first free place is taken.
        for i, j in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)):
            dx, dy = i * beside, j * over
            box = (x + dx - width / 2, y + dy - height / 2, x + dx + width / 2, y + dy + height / 2)
            inside = min(box[:2]) >= 0 and max(box[2:]) <= 1
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                place: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "center", "fontsize": 8.5}
                axes.text(x + dx, y + dy, name, color=INK, parse_math=False, **place)
                break


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
