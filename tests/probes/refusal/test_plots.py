"""Pictures of probing: drawn for any data, the same bytes each time; a clear line where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from probes.refusal.heads.plots import cumulative_figure, head_map_figure, screen_figure
from probes.refusal.plots import TraceCurve, histogram_figure, layer_auroc_figure, trace_figure
from surgery.errors import SurgeryError
from surgery.evaluation.statistics import Band, EstimateWithInterval, align_ends, bootstrap_mean
from surgery.reporting.report import Figure

PNG = b"\x89PNG\r\n\x1a\n"
TITLE = "Heads of $org/model$_{"  # would be an error if it were read as mathematics
SURE, UNSURE = EstimateWithInterval(0.9, 0.8, 1.0), EstimateWithInterval(0.5, math.nan, math.nan)


def curve(*lengths: int) -> TraceCurve:
    return TraceCurve.ending(bootstrap_mean(*align_ends([np.linspace(0, 1, length) for length in lengths])))


def grid() -> np.ndarray:
    values = np.linspace(-1, 0.4, 32).reshape(4, 8)
    values[1] = math.nan
    return values


def figures() -> list[Figure]:
    segments = {"thinking": -9, "closing $template": -2}
    names = [f"L0H{at}" for at in range(30)]
    return [
        trace_figure(TITLE, {"harmful/complied": curve(4, 9), "one $": curve(7)}, segments=segments),
        trace_figure(TITLE, {"long": curve(90, 60)}, segments={"prompt": -200, "thinking": -80, "closing": -3}),
        trace_figure(TITLE, {"even": curve(5, 5), "gone": TraceCurve.ending(nothing())}),
        head_map_figure(TITLE, grid(), marked=[(0, 0), (3, 7)]),
        head_map_figure(TITLE, np.zeros((48, 40))),
        cumulative_figure(TITLE, [0, 1, 2], [SURE, UNSURE, SURE]),
        cumulative_figure(
            TITLE, [0, 1], [SURE] * 2, random=[SURE] * 2, kl=[0, 0.1], random_kl=[0, 0.2], budget=0.05, chosen=1
        ),
        layer_auroc_figure(TITLE, [SURE, UNSURE, SURE], selectivity=[0.4, None, -0.1]),
        layer_auroc_figure(TITLE, [SURE] * 80),
        histogram_figure(TITLE, {"a$": [0.1, 0.5], "empty": [], "b": [0.3]}, threshold=0.4),
        histogram_figure(TITLE, {"same": [0.5, 0.5]}),
        screen_figure(TITLE, list(range(30)), [0.0] * 15 + [1.0] * 15, names=names, marked={1, 2, 29}),
    ]


def nothing() -> Band:
    none = np.full(3, math.nan)
    return Band(none, none, none, np.zeros(3, dtype=np.int64))


def test_pictures_are_png_and_repeat_byte_for_byte() -> None:
    for figure, other in zip(figures(), figures(), strict=True):
        assert figure.png.startswith(PNG) and figure.png == other.png
        assert figure.title == TITLE
        assert b"matplotlib" not in figure.png


def test_curves_end_at_the_last_token_before_the_answer() -> None:
    assert curve(2, 5).positions.tolist() == [-4, -3, -2, -1, 0]
    assert curve(2, 5).n.tolist() == [1, 1, 1, 2, 2]
    assert TraceCurve.ending(nothing(), last=-2).positions.tolist() == [-4, -3, -2]


def test_the_caption_says_how_well_the_screen_agrees() -> None:
    figure = screen_figure("T", [1.0, 2, 3, 4, 5], [2.0, 1, 3, 4, 5], caption="All heads.")
    assert figure.caption == "All heads. Spearman's ρ = 0.900 (95 % interval −0.169 to 0.996, 5 heads)."


@pytest.mark.parametrize(
    ("draw", "text"),
    [
        (lambda: trace_figure("T", {}), "T: there is no trace to draw"),
        (lambda: trace_figure("T", {"a": TraceCurve.ending(nothing())}), "T: there is no trace to draw"),
        (lambda: head_map_figure("T", [[math.nan]]), "T: no head has a value to draw"),
        (lambda: head_map_figure("T", grid(), marked=[(4, 0)]), "T: there is no head L4H0 among 4 × 8"),
        (lambda: cumulative_figure("T", [0, 1], [SURE]), "T: got 1 values for 2 numbers of heads"),
        (lambda: cumulative_figure("T", [0], [SURE], kl=[0, 0]), "T: got 2 values for 1 numbers of heads"),
        (lambda: cumulative_figure("T", [], []), "T: got 0 values for 0 numbers of heads"),
        (lambda: histogram_figure("T", {"a": []}), "T: there is no value to draw"),
        (lambda: screen_figure("T", [1.0], [1.0, 2.0]), "as many numbers on both sides"),
        (lambda: layer_auroc_figure("T", []), "T: there is no layer to draw"),
    ],
)
def test_nothing_to_draw_is_a_clear_line(draw: Callable[[], Figure], text: str) -> None:
    with pytest.raises(SurgeryError, match=text):
        draw()
