"""Pictures of experts: drawn for any data, the same bytes each time; a clear line where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from probes.experts import plots as expert_plots
from probes.experts.plots import beta_curve, expert_map, ranking
from surgery.errors import SurgeryError
from surgery.evaluation.statistics import EstimateWithInterval
from surgery.reporting.report import Figure

PNG = b"\x89PNG\r\n\x1a\n"
TITLE = "Experts of $org/model$_{"  # would be an error if it were read as mathematics
SURE, UNSURE = EstimateWithInterval(0.9, 0.8, 1.0), EstimateWithInterval(0.5, math.nan, math.nan)
Drawing = Callable[[], Figure]


def grid(layers: int, experts: int) -> np.ndarray:
    values = np.linspace(-0.4, 1, layers * experts).reshape(layers, experts)
    values[-1, experts // 2 :] = math.nan
    return values


def figures() -> list[Figure]:
    betas = [0, 0.5, 1, 2, 64]
    shares = [0.5, None, 0.0, None, 1.0]
    return [
        expert_map(TITLE, grid(4, 8), layers=[1, 3, 5, 7], marked=[(1, 0), (7, 3)], measure="$nPMI"),
        expert_map(TITLE, grid(60, 256), layers=range(3, 63), marked=[(3, 200)]),
        expert_map(TITLE, [[0.0]], layers=[0]),
        ranking(TITLE, ["L0E1", "L0$E2"], [SURE, UNSURE], published=[0.7, -0.1]),
        ranking(TITLE, [f"L{at}E0" for at in range(40)], [SURE] * 40),
        beta_curve(TITLE, betas, [SURE] * 5, random=(64, SURE), unchanged=0.9, collapsed=shares),
        beta_curve(TITLE, [1.0], [UNSURE]),
        beta_curve(TITLE, [0, 1], [SURE, UNSURE], collapsed=[None, None]),
        beta_curve(TITLE, [0], [SURE]),
    ]


def test_pictures_are_png_and_repeat_byte_for_byte() -> None:
    for figure, other in zip(figures(), figures(), strict=True):
        assert figure.png.startswith(PNG) and figure.png == other.png
        assert figure.title == TITLE
        assert b"matplotlib" not in figure.png


def drawn(monkeypatch: pytest.MonkeyPatch, draw: Drawing) -> list[Any]:
    """The axes of what `draw` draws."""
    seen: list[Any] = []
    finish = expert_plots.render_figure

    def finished(canvas: Any, title: str, caption: str) -> Figure:
        seen.extend(canvas.figure.axes)
        return finish(canvas, title, caption)

    monkeypatch.setattr(expert_plots, "render_figure", finished)
    draw()
    return seen


def test_the_map_writes_the_numbers_of_layers_and_marks_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(monkeypatch, lambda: expert_map("T", grid(3, 4), layers=[2, 5, 8], marked=[(5, 3)]))[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["2", "5", "8"]
    assert [patch.get_center().tolist() for patch in axes.patches] == [[3, 1], [3, 1]]
    assert len(axes.texts) == 10


def test_a_large_map_has_few_ticks_and_rings_that_can_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    marked = [(3, 0), (62, 100)]
    axes = drawn(monkeypatch, lambda: expert_map("T", grid(60, 256), layers=range(3, 63), marked=marked))[0]
    assert len(axes.get_xticks()) == 16 and len(axes.get_yticks()) == 15
    assert [ring.get_offsets().tolist() for ring in axes.collections] == [[[0, 0], [100, 59]]] * 2
    assert not axes.texts and not axes.patches


def test_the_ranking_shows_fifteen_with_the_first_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"L{at}E0" for at in range(20)]
    estimates = [EstimateWithInterval(1 - at / 20, 0.9 - at / 20, 1.1 - at / 20) for at in range(20)]
    axes = drawn(monkeypatch, lambda: ranking("T", names, estimates, published=[0.3] * 20))[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == names[:15]
    bottom, top = axes.get_ylim()
    assert top < 0 < 14 < bottom
    dots, hollow = axes.collections
    assert dots.get_offsets()[1].tolist() == [0.95, 1]
    assert hollow.get_offsets()[:, 0].tolist() == [0.3] * 15 and hollow.get_facecolors().size == 0
    assert axes.lines[1].get_xdata() == pytest.approx([0.85, 1.05])


def test_the_axis_of_beta_is_logarithmic_and_zero_stands_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    betas = [0, 0.5, 1, 4]
    draw = lambda: beta_curve("T", betas, [SURE] * 4, random=(4, UNSURE), unchanged=0.7, collapsed=[0.25, 0, None, 1])  # noqa: E731
    upper, lower = drawn(monkeypatch, draw)
    assert upper.get_xticks().tolist() == [-2.5, -1, 0, 2]
    assert [label.get_text() for label in lower.get_xticklabels()] == ["0", "0.5", "1", "4"]
    line, alone = lower.lines
    assert line.get_xdata().tolist() == [-1, 0, 2] and line.get_ydata() == pytest.approx(
        [0, math.nan, 100], nan_ok=True
    )
    assert alone.get_xdata().tolist() == [-2.5] and alone.get_ydata().tolist() == [25]
    assert {text.get_text() for text in upper.texts} == {"– unchanged", "▬ random experts", "chosen experts"}


FAULTS: list[tuple[Drawing, str]] = [
    (lambda: expert_map("T", [[math.nan]], layers=[0]), "T: no expert has a value to draw"),
    (lambda: expert_map("T", [0.5], layers=[0]), "T: no expert has a value to draw"),
    (lambda: expert_map("T", [[0.5]], layers=[0, 1]), "T: got 2 layers for 1 rows"),
    (lambda: expert_map("T", [[0.5]], layers=[3], marked=[(0, 0)]), "T: there is no value for expert L0E0"),
    (lambda: expert_map("T", [[0.5]], layers=[3], marked=[(3, 1)]), "T: there is no value for expert L3E1"),
    (lambda: expert_map("T", [[0.5, math.nan]], layers=[3], marked=[(3, 1)]), "no value for expert L3E1"),
    (lambda: ranking("T", [], []), "T: got 0 estimates and 0 published scores for 0 experts"),
    (lambda: ranking("T", ["a"], [SURE], published=[1, 2]), "T: got 1 estimates and 2 published scores for 1 experts"),
    (lambda: beta_curve("T", [], []), "T: got 0 values for 0 β"),
    (lambda: beta_curve("T", [1, 2], [SURE]), "T: got 1 values for 2 β"),
    (lambda: beta_curve("T", [1], [SURE], collapsed=[0, 1]), "T: got 2 values for 1 β"),
    (lambda: beta_curve("T", [2, 1], [SURE] * 2), "T: got β of 2, 1, expected them to ascend from 0"),
    (lambda: beta_curve("T", [1, 1], [SURE] * 2), "got β of 1, 1,"),
    (lambda: beta_curve("T", [-0.5, 1], [SURE] * 2), "got β of -0.5, 1,"),
    (lambda: beta_curve("T", [1, math.nan], [SURE] * 2), "got β of 1, nan,"),
    (lambda: beta_curve("T", [1], [SURE], random=(2, SURE)), "random experts were tried at β = 2, which is none"),
]


@pytest.mark.parametrize(("draw", "message"), FAULTS)
def test_what_cannot_be_drawn_is_said(draw: Drawing, message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        draw()
