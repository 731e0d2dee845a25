"""Plots of experts: a map of layers × experts, the ranking with intervals, and scores by β.

In the style of `surgery.reporting.plots`; matplotlib is imported when the first is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from surgery.errors import SurgeryError
from surgery.evaluation.statistics import Floats
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
    label_lines,
    render_figure,
    short_label,
    style,
    titled_axes,
)
from surgery.reporting.report import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ORANGE = COLOURS[1]
MAX_RANKED = 15  # experts in a plot of the ranking
# With more cells in either direction they are too small for an outline, and get a ring around them.
MAX_OUTLINED = 48
DASHES = (0, (4, 3))

ExpertIndex = tuple[int, int]  # (layer, expert)


def expert_map(
    title: str,
    values: ArrayLike,
    *,
    layers: Sequence[int],
    marked: Sequence[ExpertIndex] = (),
    measure: str = "nPMI",
    caption: str = "",
) -> Figure:
    """Draw a map of layers × experts: blue for experts that go with the markers, red for those against, white for 0.

    Args:
        values: (layers, experts); NaN where a layer has fewer experts, which is hatched.
        layers: the number of each row's layer, ascending.
        marked: (layer, expert), outlined; ringed if cells are small.
        measure: the quantity and its unit, at the colour bar.

    Raises:
        SurgeryError: no expert has a value, the layers are not as many as rows, or a marked expert has none.
    """
    grid = np.asarray(values, dtype=np.float64)
    centres = _checked_centres(title, grid, layers, marked)
    n_layers, n_experts = grid.shape
    largest = float(np.nanmax(np.abs(grid[np.isfinite(grid)]))) or 1.0
    canvas, axes = titled_axes(title, height=min(8.5, 1.5 + max(2.2, 0.15 * n_layers)))
    axes.grid(visible=False)
    # Masked cells let the patch show through: hatched, so that "no expert" is not taken for "0".
    axes.patch.set(facecolor="white", hatch="////", edgecolor=LINE)
    # Symmetric limits keep white at 0; not up to the ends of the colour map, whose tones are nearly black.
    image = axes.imshow(
        np.ma.masked_invalid(grid),
        cmap="RdBu",
        vmin=-largest / BRIGHTEST,
        vmax=largest / BRIGHTEST,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
    )
    _mark_cells(axes, centres, small=max(grid.shape) > MAX_OUTLINED)
    if grid.size <= MOST_NUMBERED:
        _write_values(axes, grid, largest)
    experts = range(0, n_experts, _tick_step(n_experts))
    rows = range(0, n_layers, _tick_step(n_layers))
    axes.set_xticks(experts, [str(expert) for expert in experts])
    axes.set_yticks(rows, [str(layers[row]) for row in rows])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    bar = canvas.figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04)
    bar.outline.set_visible(False)
    # The colour map's limits are wider than the values; the bar shows only those that occur.
    bar.ax.set_ylim(-largest, largest)
    bar.ax.tick_params(colors=INK, labelsize=8.5, length=0)
    bar.set_label(measure, color=INK, fontsize=9, parse_math=False)
    return render_figure(canvas, title, caption)


def _checked_centres(
    title: str, grid: Floats, layers: Sequence[int], marked: Sequence[ExpertIndex]
) -> list[tuple[int, int]]:
    """Return the centres (x, y) of the marked cells. Raises SurgeryError as `expert_map`."""
    if grid.ndim != 2 or not np.isfinite(grid).any():
        raise SurgeryError("no expert has a value to draw", where=title)
    if len(layers) != len(grid):
        raise SurgeryError(f"got {len(layers)} layers for {len(grid)} rows", where=title)
    row_of = {layer: row for row, layer in enumerate(layers)}
    for layer, expert in marked:
        if layer not in row_of or not 0 <= expert < grid.shape[1] or not np.isfinite(grid[row_of[layer], expert]):
            raise SurgeryError(f"there is no value for expert L{layer}E{expert}", where=title)
    return [(expert, row_of[layer]) for layer, expert in marked]


def _mark_cells(axes: Axes, centres: Sequence[tuple[int, int]], *, small: bool) -> None:
    """Outline cells, or draw a ring around them if they are small."""
    from matplotlib.patches import Rectangle

    # White below black: visible on every colour.
    for colour, width in (("white", 3.0), (INK, 1.4)):
        if small:
            ring: dict[str, Any] = {"s": 60, "facecolors": "none", "edgecolors": colour, "linewidths": width}
            axes.scatter([x for x, _ in centres], [y for _, y in centres], **ring)
            continue
        for x, y in centres:
            # Inside the cell, or neighbours would share a line.
            corner = (x - 0.46, y - 0.44)
            axes.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, edgecolor=colour, linewidth=width))


def _write_values(axes: Axes, grid: Floats, largest: float) -> None:
    for row, expert in zip(*np.nonzero(np.isfinite(grid)), strict=True):
        value = float(grid[row, expert])
        # Beyond 60 % the colour map is too dark for black text.
        dark = abs(value) > 0.6 * largest
        text: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "color": "white" if dark else INK}
        axes.text(expert, row, f"{value:.2f}".replace("-", "−"), **text)


def _tick_step(count: int) -> int:
    """Return the step between ticks, a power of two as experts are counted, for at most `MOST_TICKS` ticks."""
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
    """Draw the best experts, the first on top: a dot with its interval, and the published score as a hollow mark.

    Args:
        names, estimates: (n,), best first; the first fifteen are drawn.
        published: (n,), or empty.
        measure: the quantity on the horizontal axis.

    Raises:
        SurgeryError: there is no expert, or lengths differ.
    """
    if not names or len(estimates) != len(names) or len(published or names) != len(names):
        raise SurgeryError(
            f"got {len(estimates)} estimates and {len(published)} published scores for {len(names)} experts",
            where=title,
        )
    drawn = list(estimates[:MAX_RANKED])
    rows = range(len(drawn))
    canvas, axes = titled_axes(title, height=1.6 + 0.27 * len(drawn))
    for row, estimate in zip(rows, drawn, strict=True):
        # With a single block of texts there are no intervals: the dot stands alone.
        if math.isfinite(estimate.low) and math.isfinite(estimate.high):
            axes.plot([estimate.low, estimate.high], [row, row], color=BLUE, linewidth=1.8, solid_capstyle="butt")
    axes.scatter([e.value for e in drawn], rows, s=40, color=BLUE, lw=0, zorder=3, label="smoothed, 95 % interval")
    if published:
        hollow: dict[str, Any] = {"s": 46, "marker": "D", "facecolors": "none", "edgecolors": ORANGE, "linewidths": 1.5}
        axes.scatter(published[:MAX_RANKED], rows, zorder=4, label="as published", **hollow)
        # Above the rows: no place within them is free for all scores.
        key: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 2, "borderaxespad": 0.2}
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, handletextpad=0.2, columnspacing=1.2, **key)
    # After the data are drawn, which set the limits.
    left, right = axes.get_xlim()
    if left <= 0 <= right:
        axes.axvline(0, color=SOFT, linewidth=0.8)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color=LINE, linewidth=0.8)
    axes.set_yticks(rows, list(map(short_label, names[:MAX_RANKED])), parse_math=False)
    axes.set_ylim(len(drawn) - 0.4, -0.6)
    axes.set_xlabel(measure, parse_math=False)
    return render_figure(canvas, title, caption)


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
    """Draw scores by β, beside those of random experts; below them the share of answers that collapse into repetition.

    Args:
        betas: (n,) ≥ 0, ascending; their axis is logarithmic, and 0 is drawn apart on its left.
        scores: (n,) with intervals.
        random: one of the β, and the scores of random experts there: their mean, and the ends of their band.
        unchanged: the score of the unchanged model.
        collapsed: (n,) shares of answers, None where not measured; without any there is no second panel.
        measure: the quantity on the upper axis, with its unit.

    Raises:
        SurgeryError: there is no β, they do not ascend from 0 on, a series is of another length, or the random experts'
            β is none of them.
    """
    _check_betas(title, betas, scores, collapsed, None if random is None else random[0])
    x_of = dict(zip(betas, _beta_positions(betas), strict=True))
    two_panels = any(share is not None for share in collapsed)
    canvas = blank_canvas(5.6 if two_panels else 4.2, title=title)
    ratios: dict[str, Any] = {"height_ratios": [3, 2][: 1 + two_panels]}
    panels = canvas.figure.subplots(1 + two_panels, 1, sharex=True, squeeze=False, gridspec_kw=ratios)[:, 0]
    for axes in panels:
        style(axes)
    labels: list[Label] = []
    if unchanged is not None:
        panels[0].axhline(unchanged, color=INK, linewidth=1.1, linestyle=DASHES)
        labels.append((unchanged, "– unchanged", INK))
    if random is not None:
        labels.append(_draw_random_experts(panels[0], x_of[random[0]], random[1]))
    labels.append(_draw_by_beta(panels[0], x_of, [score.value for score in scores], name, BLUE, scores))
    panels[0].set_ylabel(measure, parse_math=False)
    panels[0].margins(y=0.1)
    label_lines(panels[0], labels)
    if two_panels:
        shares = [math.nan if share is None else 100 * share for share in collapsed]
        label = _draw_by_beta(panels[1], x_of, shares, "collapsed", ORANGE)
        # A little beyond 0 and 100 %, or markers at the ends would be cut in half.
        panels[1].set_ylim(-4, 104)
        panels[1].set_ylabel("answers that loop  (%)")
        label_lines(panels[1], [label], spacing=1.6 * LABEL_HEIGHT)
    panels[-1].set_xticks(list(x_of.values()), [f"{beta:g}" for beta in betas])
    panels[-1].set_xlim(min(x_of.values()) - 0.4, max(x_of.values()) + 0.4)
    panels[-1].set_xlabel("β, the factor on the experts' routing weight")
    return render_figure(canvas, title, caption)


def _check_betas(
    title: str,
    betas: Sequence[float],
    scores: Sequence[PlotInterval],
    collapsed: Sequence[float | None],
    random: float | None,
) -> None:
    for series in (scores, collapsed or betas):
        if not betas or len(series) != len(betas):
            raise SurgeryError(f"got {len(series)} values for {len(betas)} β", where=title)
    if not all(low < high for low, high in pairwise([-1.0, *betas, math.inf])) or betas[0] < 0:
        raise SurgeryError(
            f"got β of {', '.join(f'{b:g}' for b in betas)}, expected them to ascend from 0", where=title
        )
    if random is not None and random not in betas:
        raise SurgeryError(f"random experts were tried at β = {random:g}, which is none of the others", where=title)


def _beta_positions(betas: Sequence[float]) -> list[float]:
    """Return log₂ β, and for 0 a position left of the smallest other."""
    least = min((math.log2(beta) for beta in betas if beta), default=0.0)
    return [math.log2(beta) if beta else least - 1.5 for beta in betas]


def _draw_random_experts(axes: Axes, x: float, scores: PlotInterval) -> Label:
    """Draw the band of the random experts, at their β alone, where they were measured; return the label."""
    axes.fill_between([x - 0.3, x + 0.3], scores.low, scores.high, color=SOFT, alpha=0.3, lw=0)
    axes.plot([x - 0.3, x + 0.3], [scores.value] * 2, color=SOFT, linewidth=2, solid_capstyle="butt")
    return (scores.value, "▬ random experts", SOFT)


def _draw_by_beta(
    axes: Axes,
    x_of: Mapping[float, float],
    heights: Sequence[float],
    name: str,
    colour: str,
    spans: Sequence[PlotInterval] = (),
) -> Label:
    """Draw a line over β > 0, and a separate point at 0, which is infinitely far on this axis; return the label."""
    x = list(x_of.values())
    first = 1 if 0 in x_of else 0
    if spans:
        low, high = [span.low for span in spans], [span.high for span in spans]
        axes.fill_between(x[first:], low[first:], high[first:], color=colour, alpha=0.16, lw=0)
        # A band of one point has no width: bars instead.
        for index in range(first if len(x) - first > 1 else len(x)):
            axes.plot(
                [x[index]] * 2, [low[index], high[index]], color=colour, alpha=0.5, linewidth=1.6, solid_capstyle="butt"
            )
    axes.plot(x[first:], heights[first:], color=colour, linewidth=1.8, marker="o", markersize=4.5)
    axes.plot(x[:first], heights[:first], color=colour, marker="o", markersize=4.5, linestyle="none")
    known = [height for height in heights if math.isfinite(height)]
    return (known[-1] if known else 0.0, name, colour)
