"""Pictures: drawn for any data, the same bytes each time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from support.hostile_names import HOSTILE_NAMES

from surgery.reporting.plots import (
    label_lines,
    plot_distances,
    plot_layer_changes,
    plot_scale_curve,
    plot_score_bars,
    plot_similarity,
    render_figure,
    titled_axes,
)
from surgery.reporting.report import Figure

PNG = b"\x89PNG\r\n\x1a\n"
GROUPS = ["embed", *(f"layer {i}" for i in range(40)), "final norm", "lm_head"]


@dataclass(frozen=True)
class Score:
    value: float
    low: float
    high: float


def figures() -> list[Figure]:
    curve = [(scale, Score(0.1 + scale / 4, scale / 4, 0.2 + scale / 4)) for scale in (1.0, -0.0, 0.5)]
    return [
        plot_layer_changes("Moved $x$", GROUPS, [0.01] * len(GROUPS)),
        plot_layer_changes("Few", ["embed", "layer 0"], [0.0, math.inf], caption="<b>"),
        plot_similarity("Cosine", GROUPS, {"a · b": [0.5] * len(GROUPS), "a · c": [math.nan] * 42 + [None]}),
        plot_distances("Distance", GROUPS, {"a": [0.5] * len(GROUPS), "b": [None] * len(GROUPS)}),
        plot_score_bars(
            "Scores", {"sums": {"a": Score(0.5, 0.4, 0.6), "b": Score(0.1, math.nan, math.nan)}, "empty": {}}
        ),
        plot_scale_curve("Sweep", curve, {"random": curve[:1], "none": []}, lines={"donor": 0.9, "target": 0.1}),
    ]


def test_pictures_are_png_and_repeat_byte_for_byte() -> None:
    first, again = figures(), figures()
    for figure, other in zip(first, again, strict=True):
        assert figure.png.startswith(PNG)
        assert figure.png == other.png
        assert b"matplotlib" not in figure.png


PLOTS: dict[str, Callable[[str], Figure]] = {
    "layers": lambda name: plot_layer_changes(name, [name, f"layer {name}", "layer 0"], [0.1, 0.2, 0.3], measure=name),
    "similarity": lambda name: plot_similarity(name, [name, "layer 0"], {name: [0.5, 0.6]}, caption=name),
    "distances": lambda name: plot_distances(name, [name, "layer 0"], {name: [0.5, 0.6]}),
    "bars": lambda name: plot_score_bars(name, {name: {name: Score(0.5, 0.4, 0.6)}}),
    "sweep": lambda name: plot_scale_curve(
        name,
        [(0.0, Score(0.1, 0.0, 0.2))],
        {name: [(1.0, Score(0.1, 0.0, 0.2))]},
        lines={name: 0.5},
        name=name,
        score=name,
    ),
}


@pytest.mark.parametrize("name", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES)
@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
def test_names_are_drawn_as_they_are_and_not_as_formulas(plot: Callable[[str], Figure], name: str) -> None:
    # Warnings are errors here: of letters that the font lacks, too.
    assert plot(name).png.startswith(PNG)


def test_a_line_that_ends_far_beyond_the_axes_is_labelled_at_their_edge() -> None:
    canvas, axes = titled_axes("t", height=3)
    axes.set_ylim(0, 1)
    label_lines(axes, [(2147483647, "far", "#000000"), (-1e300, "low", "#000000"), (0.5, "here", "#000000")])
    assert render_figure(canvas, "t", "c").png.startswith(PNG)
