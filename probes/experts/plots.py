"""The pictures of experts: a map of layers × experts, the best with intervals, and what each β does.

Data in, `Figure` out. They look as those of `surgery.reporting.plots` do, and matplotlib is imported when the first is
drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from surgery.errors import SurgeryError
from surgery.reporting.plots import (
    BLUE,
    BRIGHTEST,
    COLOURS,
    INK,
    LABEL_HEIGHT,
    LINE,
    MOST_NUMBERED,
    MOST_TICKS,
    SOFT,
    Label,
    PlotInterval,
    blank_canvas,
    finished,
    name_lines,
    style,
    titled_axes,
)
from surgery.reporting.report import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ORANGE = COLOURS[1]
MOST_RANKED = 15
# Cells of a map in either direction that are still large enough for an outline; smaller ones get a ring around them.
MOST_OUTLINED = 48
DASHES = (0, (4, 3))

ExpertIndex = tuple[int, int]  # number of the layer, expert


def expert_map(
    title: str,
    values: ArrayLike,
    *,
    layers: Sequence[int],
    marked: Sequence[ExpertIndex] = (),
    measure: str = "nPMI",
    caption: str = "",
) -> Figure:
    """A map of layers × experts: blue where an expert goes with the markers, red where against them, 0 is white.

    Args:
        values: (layers, experts); NaN where a layer has fewer experts, which is hatched.
        layers: the number of each row's layer, ascending.
        marked: (number of the layer, expert), outlined; ringed where cells are small.
        measure: what the values are, with their unit; written at the colour bar.

    Raises:
        SurgeryError: no expert has a value, the layers are not as many as rows, or a marked expert has none.
    """
    from matplotlib.patches import Rectangle

    grid = np.asarray(values, dtype=np.float64)
    if grid.ndim != 2 or not np.isfinite(grid).any():
        raise SurgeryError("no expert has a value to draw", where=title)
    if len(layers) != len(grid):
        raise SurgeryError(f"got {len(layers)} layers for {len(grid)} rows", where=title)
    row_of = {layer: row for row, layer in enumerate(layers)}
    n_layers, n_experts = grid.shape
    for layer, expert in marked:
        if layer not in row_of or not 0 <= expert < n_experts or not np.isfinite(grid[row_of[layer], expert]):
            raise SurgeryError(f"there is no value for expert L{layer}E{expert}", where=title)
    places = [(expert, row_of[layer]) for layer, expert in marked]
    largest = float(np.nanmax(np.abs(grid[np.isfinite(grid)]))) or 1.0
    canvas, axes = titled_axes(title, height=min(8.5, 1.5 + max(2.2, 0.15 * n_layers)))
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
    # Twice, white below black, which is seen on every colour.
    for colour, width in (("white", 3.0), (INK, 1.4)):
        if max(grid.shape) <= MOST_OUTLINED:
            for x, y in places:
                # Inside the cell, or neighbours would share a line.
                corner = (x - 0.46, y - 0.44)
                axes.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, edgecolor=colour, linewidth=width))
        else:
            ring: dict[str, Any] = {"s": 60, "facecolors": "none", "edgecolors": colour, "linewidths": width}
            axes.scatter([x for x, _ in places], [y for _, y in places], **ring)
    if grid.size <= MOST_NUMBERED:
        for row, expert in zip(*np.nonzero(np.isfinite(grid)), strict=True):
            value = float(grid[row, expert])
            dark = abs(value) > 0.6 * largest
            text: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "color": "white" if dark else INK}
            axes.text(expert, row, f"{value:.2f}".replace("-", "−"), **text)
    experts = range(0, n_experts, _step(n_experts))
    rows = range(0, n_layers, _step(n_layers))
    axes.set_xticks(experts, [str(expert) for expert in experts])
    axes.set_yticks(rows, [str(layers[row]) for row in rows])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    bar = canvas.figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04)
    bar.outline.set_visible(False)
    bar.ax.set_ylim(-largest, largest)
    bar.ax.tick_params(colors=INK, labelsize=8.5, length=0)
    bar.set_label(measure, color=INK, fontsize=9, parse_math=False)
    return finished(canvas, title, caption)


def _step(count: int) -> int:
    """Between ticks: 1, 2, 4, 8, … as experts are counted, so that at most `MOST_TICKS` stand."""
    return 1 << max(0, math.ceil(math.log2(count / MOST_TICKS)))


def ranking(
    title: str,
    names: Sequence[str],
    estimates: Sequence[PlotInterval],
    *,
    published: Sequence[float] = (),
    measure: str = "score",
    caption: str = "",
) -> Figure:
    """The best experts, the first on top: a dot with its interval, and the published score as a hollow mark.

    Args:
        names, estimates: (n,), best first; the first fifteen are drawn.
        published: (n,), or empty.
        measure: what the horizontal axis shows.

    Raises:
        SurgeryError: there is no expert, or lengths differ.
    """
    if not names or len(estimates) != len(names) or len(published or names) != len(names):
        raise SurgeryError(
            f"got {len(estimates)} estimates and {len(published)} published scores for {len(names)} experts",
            where=title,
        )
    shown = list(estimates[:MOST_RANKED])
    rows = range(len(shown))
    canvas, axes = titled_axes(title, height=1.6 + 0.27 * len(shown))
    for row, estimate in zip(rows, shown, strict=True):
        if math.isfinite(estimate.low) and math.isfinite(estimate.high):
            axes.plot([estimate.low, estimate.high], [row, row], color=BLUE, linewidth=1.8, solid_capstyle="butt")
    axes.scatter([e.value for e in shown], rows, s=40, color=BLUE, lw=0, zorder=3, label="smoothed, 95 % interval")
    if published:
        hollow: dict[str, Any] = {"s": 46, "marker": "D", "facecolors": "none", "edgecolors": ORANGE, "linewidths": 1.5}
        axes.scatter(published[:MOST_RANKED], rows, zorder=4, label="as published", **hollow)
        # Above the rows: within them there is no place that is free whatever the scores are.
        key: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 2, "borderaxespad": 0.2}
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, handletextpad=0.2, columnspacing=1.2, **key)
    left, right = axes.get_xlim()
    if left <= 0 <= right:
        axes.axvline(0, color=SOFT, linewidth=0.8)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color=LINE, linewidth=0.8)
    axes.set_yticks(rows, names[:MOST_RANKED], parse_math=False)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel(measure, parse_math=False)
    return finished(canvas, title, caption)


def beta_curve(
    title: str,
    betas: Sequence[float],
    scores: Sequence[PlotInterval],
    *,
    random: tuple[float, PlotInterval] | None = None,
    unchanged: float | None = None,
    collapsed: Sequence[float | None] = (),
    name: str = "chosen experts",
    measure: str = "score",
    caption: str = "",
) -> Figure:
    """What each β does to a score, beside random experts; below it how many answers collapse into repetition.

    Args:
        betas: (n,) ≥ 0, ascending; their axis is logarithmic, and 0 stands apart at its left.
        scores: (n,) with intervals.
        random: one of the β, and what random experts give there: their mean, and the ends of their band.
        unchanged: the score of the model as it is.
        collapsed: (n,) shares of answers, None where none was looked at; no second panel where nothing was.
        measure: what the upper axis shows, with its unit.

    Raises:
        SurgeryError: there is no β, they do not ascend from 0 on, a series is of another length, or the random experts'
            β is none of them.
    """
    for series in (scores, collapsed or betas):
        if not betas or len(series) != len(betas):
            raise SurgeryError(f"got {len(series)} values for {len(betas)} β", where=title)
    if not all(low < high for low, high in pairwise([-1.0, *betas, math.inf])) or betas[0] < 0:
        raise SurgeryError(
            f"got β of {', '.join(f'{b:g}' for b in betas)}, expected them to ascend from 0", where=title
        )
    if random is not None and random[0] not in betas:
        raise SurgeryError(f"random experts were tried at β = {random[0]:g}, which is none of the others", where=title)
    places = dict(zip(betas, _places(betas), strict=True))
    shown = any(share is not None for share in collapsed)
    canvas = blank_canvas(5.6 if shown else 4.2, title=title)
    ratios: dict[str, Any] = {"height_ratios": [3, 2][: 1 + shown]}
    panels = canvas.figure.subplots(1 + shown, 1, sharex=True, squeeze=False, gridspec_kw=ratios)[:, 0]
    for axes in panels:
        style(axes)
    labels: list[Label] = []
    if unchanged is not None:
        panels[0].axhline(unchanged, color=INK, linewidth=1.1, linestyle=DASHES)
        labels.append((unchanged, "– unchanged", INK))
    if random is not None:
        at, given = places[random[0]], random[1]
        # Level with its β alone: what random experts do at others was not measured.
        panels[0].fill_between([at - 0.3, at + 0.3], given.low, given.high, color=SOFT, alpha=0.3, lw=0)
        panels[0].plot([at - 0.3, at + 0.3], [given.value] * 2, color=SOFT, linewidth=2, solid_capstyle="butt")
        labels.append((given.value, "▬ random experts", SOFT))
    labels.append(_by_beta(panels[0], places, [score.value for score in scores], name, BLUE, scores))
    panels[0].set_ylabel(measure, parse_math=False)
    panels[0].margins(y=0.1)
    name_lines(panels[0], labels)
    if shown:
        shares = [math.nan if share is None else 100 * share for share in collapsed]
        label = _by_beta(panels[1], places, shares, "collapsed", ORANGE)
        panels[1].set_ylim(-4, 104)
        panels[1].set_ylabel("answers that loop  (%)")
        name_lines(panels[1], [label], spacing=1.6 * LABEL_HEIGHT)
    panels[-1].set_xticks(list(places.values()), [f"{beta:g}" for beta in betas])
    panels[-1].set_xlim(min(places.values()) - 0.4, max(places.values()) + 0.4)
    panels[-1].set_xlabel("β, the factor on the experts' routing weight")
    return finished(canvas, title, caption)


def _places(betas: Sequence[float]) -> list[float]:
    """log₂ β, and 0 a step left of the smallest other."""
    least = min((math.log2(beta) for beta in betas if beta), default=0.0)
    return [math.log2(beta) if beta else least - 1.5 for beta in betas]


def _by_beta(
    axes: Axes,
    places: Mapping[float, float],
    heights: Sequence[float],
    name: str,
    colour: str,
    spans: Sequence[PlotInterval] = (),
) -> Label:
    """A line over β > 0, and a point by itself at 0, which on this axis is infinitely far; returns its name's place."""
    x = list(places.values())
    first = 1 if 0 in places else 0
    if spans:
        low, high = [span.low for span in spans], [span.high for span in spans]
        axes.fill_between(x[first:], low[first:], high[first:], color=colour, alpha=0.16, lw=0)
        # A band of one point has no width.
        for at in range(first if len(x) - first > 1 else len(x)):
            axes.plot([x[at]] * 2, [low[at], high[at]], color=colour, alpha=0.5, linewidth=1.6, solid_capstyle="butt")
    axes.plot(x[first:], heights[first:], color=colour, linewidth=1.8, marker="o", markersize=4.5)
    axes.plot(x[:first], heights[:first], color=colour, marker="o", markersize=4.5, linestyle="none")
    known = [height for height in heights if math.isfinite(height)]
    return (known[-1] if known else 0.0, name, colour)
