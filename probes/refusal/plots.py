"""The pictures of probing: traces, ablations, layers, histograms; data in, `Figure` out. Those of heads lie beside.

They look as those of `surgery.reporting.plots` do, and matplotlib is imported when the first is drawn.
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
    LABEL_HEIGHT,
    LINE,
    SOFT,
    Label,
    PlotInterval,
    blank_canvas,
    finished,
    group_ticks,
    name_lines,
    style,
    titled_axes,
)
from surgery.reporting.report import Figure, format_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ORANGE = COLOURS[1]
# The cliff is a few tokens wide: longer traces show their end once more, drawn larger.
END_TOKENS, LONG = 16, 48
HISTOGRAM_BINS = 30
# Shares of a panel's width: a segment that holds its name; one before the answer that is worth a name anyway.
WIDE_SEGMENT, NARROW_SEGMENT = 0.25, 0.05
DASHES = (0, (4, 3))


@dataclass(frozen=True, eq=False)
class TraceCurve:
    """A mean score with its 95 % band against the position; arrays (T,), NaN where nobody has that position.

    positions: relative to the last token before the answer, ascending, ≤ 0. n: how many examples have that position.
    """

    positions: NDArray[np.int64]
    mean: Floats
    low: Floats
    high: Floats
    n: NDArray[np.int64]

    @classmethod
    def ending(cls, band: Band, *, last: int = 0) -> TraceCurve:
        """The curve of a band whose columns end together, at the position `last`."""
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
    """Refusal scores, token by token up to the answer: a line with its band for each cell, how many examples each
    position has where that differs, and the end once more, larger, where the traces are long.

    Args:
        curves: cell → curve.
        segments: name → position of its first token (≤ 0), such as {"thinking": −40, "closing template": −3}; each
            reaches to where the next begins, the last one to the answer. Shaded in turn.

    Raises:
        SurgeryError: no curve has a value.
    """
    known = {name: curve for name, curve in curves.items() if np.isfinite(curve.mean).any()}
    if not known:
        raise SurgeryError("there is no trace to draw", where=title)
    first = min(int(curve.positions[np.isfinite(curve.mean)][0]) for curve in known.values())
    starts = [first, -END_TOKENS] if -first > LONG else [first]
    uneven = any(len(set(curve.n[curve.n > 0].tolist())) > 1 for curve in known.values())
    canvas = blank_canvas(5.0 if uneven else 4.2, title=title)
    grid: dict[str, Any] = {"width_ratios": [3, 2][: len(starts)], "height_ratios": [5, 1][: 1 + uneven]}
    panels = canvas.figure.subplots(
        1 + uneven, len(starts), sharex="col", sharey="row", squeeze=False, gridspec_kw=grid
    )
    colours = dict(zip(known, cycle(COLOURS), strict=False))
    for column, start in enumerate(starts):
        upper = panels[0][column]
        for axes in panels[:, column]:
            style(axes)
            # Half a token before and after, so that the last segment's shade has its width.
            axes.set_xlim(start - 0.5, 0.5)
            _shade(axes, segments or {}, start, named=axes is upper)
        for name, curve in known.items():
            _trace(upper, curve, colours[name], start)
            if uneven:
                panels[1][column].step(curve.positions, curve.n, where="mid", color=colours[name], linewidth=1.2)
        panels[-1][column].set_xlabel(
            "tokens before the answer (0 is the last)" if not column else f"the last {END_TOKENS + 1} of them"
        )
        panels[-1][column].xaxis.get_major_locator().set_params(integer=True)
    panels[0][0].set_ylim(-0.02, 1.02)
    panels[0][0].set_ylabel(measure)
    if uneven:
        panels[1][0].set_ylim(bottom=0)
        panels[1][0].set_ylabel("examples")
    labels = [(float(curve.mean[np.isfinite(curve.mean)][-1]), name, colours[name]) for name, curve in known.items()]
    name_lines(panels[0][-1], [(height, f"{name} ({known[name].n.max()})", c) for height, name, c in labels])
    return finished(canvas, title, caption)


def _trace(axes: Axes, curve: TraceCurve, colour: str, start: int) -> None:
    shown = np.isfinite(curve.mean) & (curve.positions >= start)
    at, mean = curve.positions[shown], curve.mean[shown]
    axes.fill_between(at, curve.low[shown], curve.high[shown], color=colour, alpha=0.16, lw=0)
    few = len(at) <= LONG
    axes.plot(at, mean, color=colour, linewidth=1.8 if few else 1, marker="o" if few else None, markersize=3.5)


def _shade(axes: Axes, segments: Mapping[str, int], start: int, *, named: bool) -> None:
    ordered = sorted(segments.items(), key=lambda item: item[1])
    ends = [*(begin for _, begin in ordered), 1][1:]
    for turn, ((name, begin), end) in enumerate(zip(ordered, ends, strict=True)):
        low, high = max(begin, start) - 0.5, end - 0.5
        if high <= low:
            continue
        if turn % 2:
            axes.axvspan(low, high, color=LINE, alpha=0.6, lw=0, zorder=0)
        # A name that is wider than its segment would run into the next one's, except before the answer.
        share = (high - low) / (1 - start)
        at_end = end == 1 and share < WIDE_SEGMENT
        if named and share > (NARROW_SEGMENT if at_end else WIDE_SEGMENT):
            place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "ha": "right" if at_end else "center"}
            where = (high if at_end else (low + high) / 2, 1.01)
            axes.annotate(name, where, color=SOFT, fontsize=8.5, parse_math=False, va="bottom", **place)


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
    """What ablating more and more heads does, against as many random ones; below it what it costs in KL.

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
    labels = []
    for label, points, colour in (("random heads", random, SOFT), (name, scores, BLUE)):
        if points:
            panels[0].fill_between(
                sizes, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.18, lw=0
            )
            labels.append(_line(panels[0], sizes, [point.value for point in points], label, colour))
    panels[0].set_ylabel(measure)
    panels[0].margins(x=0.03, y=0.08)
    name_lines(panels[0], labels)
    if kl:
        labels = [
            _line(panels[1], sizes, values, label, colour)
            for label, values, colour in (("random heads", random_kl, SOFT), (name, kl, BLUE))
            if values
        ]
        if budget is not None:
            panels[1].axhline(budget, color=ORANGE, linewidth=1.2, linestyle=DASHES)
            labels.append((budget, f"– budget {budget:g}", ORANGE))
        panels[1].set_ylabel("KL  (nats/token)")
        panels[1].set_ylim(bottom=0)
        panels[1].margins(y=0.1)
        name_lines(panels[1], labels, spacing=1.6 * LABEL_HEIGHT)
    panels[-1].set_xlabel("heads ablated" if chosen is None else f"heads ablated (dashed: {chosen}, the choice)")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    return finished(canvas, title, caption)


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], name: str, colour: str) -> Label:
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
    """How well each layer's probe tells refused from complied, with its interval; and its selectivity.

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
    labels = [_line(axes, layers, [a.value for a in auroc], "AUROC", BLUE), (0.5, "– chance", SOFT)]
    if selectivity:
        heights = [math.nan if value is None else value for value in selectivity]
        labels.append(_line(axes, layers, heights, "selectivity", ORANGE))
    lowest = min([0.0, *(a.low for a in auroc), *(value for value in selectivity if value is not None)])
    axes.set_ylim(min(-0.02, lowest - 0.02), 1.03)
    group_ticks(axes, [f"layer {layer}" for layer in layers])
    axes.set_ylabel("AUROC, held-out examples")
    name_lines(axes, labels)
    return finished(canvas, title, caption)


def histogram_figure(
    title: str,
    cells: Mapping[str, Sequence[float]],
    *,
    threshold: float | None = None,
    measure: str = "misalignment score",
    caption: str = "",
) -> Figure:
    """How values are spread: one row per cell on a common axis; and what lies at or above the threshold.

    cells: name → values; shares are of the cell's examples.

    Raises:
        SurgeryError: no cell has a value.
    """
    known = {name: np.asarray(values, dtype=np.float64) for name, values in cells.items() if len(values)}
    if not known:
        raise SurgeryError("there is no value to draw", where=title)
    every = np.concatenate([*known.values(), [] if threshold is None else [threshold]])
    low, high = float(every.min()), float(every.max())
    edges = np.linspace(low, high if high > low else low + 1, HISTOGRAM_BINS + 1)
    canvas = blank_canvas(1.2 + 1.15 * len(known), title=title)
    panels = canvas.figure.subplots(len(known), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, values), colour in zip(panels, known.items(), cycle(COLOURS), strict=False):
        style(axes)
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
    return finished(canvas, title, caption)
