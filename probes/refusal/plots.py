"""Figures of refusal traces, of probes by layer, and of misalignment scores.

They share the style of `surgery.reporting.plots`. Matplotlib is imported when the first is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import SurgeryError
from surgery.evaluation.statistics import Band, Floats
from surgery.reporting.plots import (
    BLUE,
    COLOURS,
    INK,
    LINE,
    SOFT,
    Label,
    PlotInterval,
    blank_canvas,
    group_ticks,
    label_lines,
    render_figure,
    style,
    titled_axes,
)
from surgery.reporting.report import Figure, format_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ORANGE = COLOURS[1]
# The cliff is a few tokens wide: traces longer than LONG show their last END_TOKENS once more, drawn larger.
END_TOKENS, LONG = 16, 48
HISTOGRAM_BINS = 30
# Shares of a panel's width: from which a segment has room for its name, and from which the last one gets a name even
# without the room, for there it runs into no other.
WIDE_SEGMENT, NARROW_SEGMENT = 0.25, 0.05
DASHES = (0, (4, 3))


@dataclass(frozen=True, eq=False)
class TraceCurve:
    """A mean score with its 95 % interval at each position; arrays (T,), NaN where no example has that position.

    positions: relative to the last token before the answer, ascending, ≤ 0. n: how many examples have that position.
    """

    positions: NDArray[np.int64]
    mean: Floats
    low: Floats
    high: Floats
    n: NDArray[np.int64]

    @classmethod
    def ending(cls, band: Band, *, last: int = 0) -> TraceCurve:
        """Return the curve of a band whose last column is the position `last`."""
        positions = np.arange(last + 1 - len(band.mean), last + 1)
        return cls(positions, band.mean, band.low, band.high, band.n)


def trace_figure(
    title: str,
    curves: Mapping[str, TraceCurve],
    *,
    segments: Mapping[str, int] | None = None,
    measure: str = "refusal score",
    caption: str = "",
) -> Figure:
    """Draw refusal scores token by token up to the answer, a line with its interval for each cell.

    Where positions have different numbers of examples a panel below shows these, and where traces are long a panel
    beside shows their end enlarged.

    Args:
        curves: cell → curve.
        segments: name → position of its first token (≤ 0), such as {"thinking": −40, "closing template": −3}; each
            reaches to where the next begins, the last one to the answer. Every other one is shaded.

    Raises:
        SurgeryError: no curve has a value.
    """
    known = {name: curve for name, curve in curves.items() if np.isfinite(curve.mean).any()}
    if not known:
        raise SurgeryError("there is no trace to draw", where=title)
    first = min(int(curve.positions[np.isfinite(curve.mean)][0]) for curve in known.values())
    starts = [first, -END_TOKENS] if -first > LONG else [first]
    with_counts = any(len(set(curve.n[curve.n > 0].tolist())) > 1 for curve in known.values())
    canvas = blank_canvas(5.0 if with_counts else 4.2, title=title)
    grid: dict[str, Any] = {"width_ratios": [3, 2][: len(starts)], "height_ratios": [5, 1][: 1 + with_counts]}
    panels = canvas.figure.subplots(
        1 + with_counts, len(starts), sharex="col", sharey="row", squeeze=False, gridspec_kw=grid
    )
    colours = dict(zip(known, cycle(COLOURS), strict=False))
    for column, start in enumerate(starts):
        upper = panels[0][column]
        for axes in panels[:, column]:
            style(axes)
            # Half a token before and after, so that the last segment's shade has its width.
            axes.set_xlim(start - 0.5, 0.5)
            _shade_segments(axes, segments or {}, start, named=axes is upper)
        for name, curve in known.items():
            _draw_trace(upper, curve, colours[name], start)
            if with_counts:
                panels[1][column].step(curve.positions, curve.n, where="mid", color=colours[name], linewidth=1.2)
        panels[-1][column].set_xlabel(
            "tokens before the answer (0 is the last)" if not column else f"the last {END_TOKENS + 1} of them"
        )
        panels[-1][column].xaxis.get_major_locator().set_params(integer=True)
    panels[0][0].set_ylim(-0.02, 1.02)
    panels[0][0].set_ylabel(measure)
    if with_counts:
        panels[1][0].set_ylim(bottom=0)
        panels[1][0].set_ylabel("examples")
    ends = {name: float(curve.mean[np.isfinite(curve.mean)][-1]) for name, curve in known.items()}
    labels = [(ends[name], f"{name} ({curve.n.max()})", colours[name]) for name, curve in known.items()]
    label_lines(panels[0][-1], labels)
    return render_figure(canvas, title, caption)


def _draw_trace(axes: Axes, curve: TraceCurve, colour: str, start: int) -> None:
    visible = np.isfinite(curve.mean) & (curve.positions >= start)
    x, mean = curve.positions[visible], curve.mean[visible]
    axes.fill_between(x, curve.low[visible], curve.high[visible], color=colour, alpha=0.16, lw=0)
    few = len(x) <= LONG
    axes.plot(x, mean, color=colour, linewidth=1.8 if few else 1, marker="o" if few else None, markersize=3.5)


def _shade_segments(axes: Axes, segments: Mapping[str, int], start: int, *, named: bool) -> None:
    ordered = sorted(segments.items(), key=lambda item: item[1])
    ends = [*(first for _, first in ordered), 1][1:]
    for index, ((name, first), end) in enumerate(zip(ordered, ends, strict=True)):
        left, right = max(first, start) - 0.5, end - 0.5
        if right <= left:
            continue
        if index % 2:
            axes.axvspan(left, right, color=LINE, alpha=0.6, lw=0, zorder=0)
        # A name that is wider than its segment would run into the next one's, except before the answer.
        share = (right - left) / (1 - start)
        at_end = end == 1 and share < WIDE_SEGMENT
        if named and share > (NARROW_SEGMENT if at_end else WIDE_SEGMENT):
            layout: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "ha": "right" if at_end else "center"}
            anchor = (right if at_end else (left + right) / 2, 1.01)
            axes.annotate(name, anchor, color=SOFT, fontsize=8.5, parse_math=False, va="bottom", **layout)


def draw_line(axes: Axes, x: Sequence[float], y: Sequence[float], name: str, colour: str) -> Label:
    """Draw a line with markers, and return the label for its end."""
    axes.plot(x, y, color=colour, linewidth=1.8, marker="o", markersize=3.5)
    known = [value for value in y if math.isfinite(value)]
    return (known[-1] if known else 0.0, name, colour)


def layer_auroc_figure(
    title: str,
    auroc: Sequence[PlotInterval],
    *,
    selectivity: Sequence[float | None] = (),
    caption: str = "",
) -> Figure:
    """Draw the AUROC of each layer's probe with its interval, and its selectivity.

    auroc: (layers,). selectivity: (layers,) AUROC less that of probes on shuffled labels, or empty.

    Raises:
        SurgeryError: there is no layer.
    """
    if not auroc:
        raise SurgeryError("there is no layer to draw", where=title)
    canvas, axes = titled_axes(title, height=4.0)
    layers = list(range(len(auroc)))
    axes.axhline(0.5, color=SOFT, linewidth=1.1, linestyle=DASHES)
    axes.fill_between(layers, [a.low for a in auroc], [a.high for a in auroc], color=BLUE, alpha=0.16, lw=0)
    labels = [draw_line(axes, layers, [a.value for a in auroc], "AUROC", BLUE), (0.5, "– chance", SOFT)]
    if selectivity:
        heights = [math.nan if value is None else value for value in selectivity]
        labels.append(draw_line(axes, layers, heights, "selectivity", ORANGE))
    # Selectivity may be below 0.
    lowest = min([0.0, *(a.low for a in auroc), *(value for value in selectivity if value is not None)])
    axes.set_ylim(min(-0.02, lowest - 0.02), 1.03)
    group_ticks(axes, [f"layer {layer}" for layer in layers])
    axes.set_ylabel("AUROC, held-out examples")
    label_lines(axes, labels)
    return render_figure(canvas, title, caption)


def histogram_figure(
    title: str,
    cells: Mapping[str, Sequence[float]],
    *,
    threshold: float | None = None,
    measure: str = "misalignment score",
    caption: str = "",
) -> Figure:
    """Draw a histogram for each cell on a common axis, with the share of values at or above the threshold.

    cells: name → values; shares are of the cell's examples.

    Raises:
        SurgeryError: no cell has a value.
    """
    known = {name: np.asarray(values, dtype=np.float64) for name, values in cells.items() if len(values)}
    if not known:
        raise SurgeryError("there is no value to draw", where=title)
    everything = np.concatenate([*known.values(), [] if threshold is None else [threshold]])
    low, high = float(everything.min()), float(everything.max())
    # Equal values have no range to divide into bins.
    edges = np.linspace(low, high if high > low else low + 1, HISTOGRAM_BINS + 1)
    canvas = blank_canvas(1.2 + 1.15 * len(known), title=title)
    panels = canvas.figure.subplots(len(known), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, values), colour in zip(panels, known.items(), cycle(COLOURS), strict=False):
        style(axes)
        # Shares and not counts: cells have different numbers of examples.
        shares = 100 * np.histogram(values, edges)[0] / len(values)
        axes.bar(edges[:-1], shares, width=np.diff(edges), align="edge", color=colour, alpha=0.85, edgecolor="white")
        heading = f"{name}  (n = {len(values):,})"
        if threshold is not None:
            axes.axvline(threshold, color=INK, linewidth=1.1, linestyle=DASHES)
            heading += f"  ·  {format_value(float((values >= threshold).mean()), 'percent')} at or above the threshold"
        axes.set_title(heading, loc="left", color=INK, fontsize=9, parse_math=False)
        axes.set_ylabel("share  (%)")
    label = measure if threshold is None else f"{measure}  (dashed: threshold {format_value(threshold, 'score')})"
    panels[-1].set_xlabel(label, parse_math=False)
    return render_figure(canvas, title, caption)
