"""The pictures of heads: a map of layers × heads, and what a screen says of them against what ablation proves.

They look as those of `surgery.reporting.plots` do, and matplotlib is imported when the first is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from surgery.errors import SurgeryError
from surgery.evaluation.statistics import spearman
from surgery.reporting.plots import (
    BRIGHTEST,
    COLOURS,
    INK,
    LINE,
    MOST_NUMBERED,
    MOST_TICKS,
    PALE,
    SOFT,
    finished,
    titled_axes,
)
from surgery.reporting.report import Figure, format_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ORANGE = COLOURS[1]
# Cells of a head map that still have room for a number, marked points for a name.
MOST_NAMED = 16
# The ends of the colour map are nearly black: the largest value gets a colour this share of the way there.
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
    """A map of layers × heads: red where a head works against refusal, blue where it works for it, 0 is white.

    Args:
        values: (layers, heads); NaN where a layer has no heads, or fewer, which is hatched.
        marked: (layer, head), outlined.
        measure: what the values are, with their unit; written at the colour bar.

    Raises:
        SurgeryError: no head has a value, or a marked one is outside.
    """
    from matplotlib.patches import Rectangle

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
    axes.patch.set(facecolor="white", hatch="////", edgecolor=LINE)
    image = axes.imshow(
        np.ma.masked_invalid(grid),
        cmap="RdBu",
        vmin=-largest / BRIGHTEST,
        vmax=largest / BRIGHTEST,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
    )
    for layer, head in marked:
        # Inside the cell, or neighbours would share a line; white below black is seen on every colour.
        for colour, width in (("white", 3.0), (INK, 1.4)):
            corner = (head - 0.46, layer - 0.44)
            axes.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, edgecolor=colour, linewidth=width))
    if grid.size <= MOST_NUMBERED:
        for layer, head in zip(*np.nonzero(np.isfinite(grid)), strict=True):
            value = float(grid[layer, head])
            dark = abs(value) > 0.6 * largest
            text: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "color": "white" if dark else INK}
            axes.text(head, layer, f"{value:.2g}".replace("-", "−"), **text)
    for axis, count in ((axes.xaxis, heads), (axes.yaxis, layers)):
        axis.set_ticks(range(0, count, max(1, math.ceil(count / MOST_TICKS))))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    bar = canvas.figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04)
    bar.outline.set_visible(False)
    bar.ax.set_ylim(-largest, largest)
    bar.ax.tick_params(colors=INK, labelsize=8.5, length=0)
    bar.set_label(measure, color=INK, fontsize=9, parse_math=False)
    return finished(canvas, title, caption)


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
    """What the screen says of each head against what ablating it does; their rank correlation is in the caption.

    Args:
        attribution, effect: (n,). names: (n,) such as "L12H7", written at marked points where these are few.
        marked: numbers of points to be marked.

    Raises:
        SurgeryError: lengths differ, or a value is NaN.
    """
    found = spearman(attribution, effect)
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
    rho, low, high = (format_value(value, "score") for value in (found.value, found.low, found.high))
    sentence = f"Spearman's ρ = {rho} (95 % interval {low} to {high}, {len(attribution):,} heads)."
    return finished(canvas, title, f"{caption} {sentence}".strip())


def _name_points(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside points, where there is room; a name that would run into another or into a point is left out."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    places = [((x - left) / (right - left), (y - bottom) / (top - bottom)) for x, y, _ in points]
    width, height = NAME_SIZE
    taken = [(x - NAME_GAP / 2, y - NAME_GAP, x + NAME_GAP / 2, y + NAME_GAP) for x, y in places]
    for (x, y), (_, _, name) in zip(places, points, strict=True):
        beside, over = NAME_GAP + width / 2, NAME_GAP + height / 2
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
