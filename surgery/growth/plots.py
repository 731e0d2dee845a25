"""Plots of a growth: its loss against tokens, operations and depth, beside the baselines."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.evaluation.perplexity import LOSS
from surgery.growth.results import Growth, LossPoint, TrainedStage, TrainingRecord
from surgery.reporting.plots import (
    BLUE,
    COLOURS,
    INK,
    PALE,
    SOFT,
    Label,
    blank_canvas,
    label_lines,
    render_figure,
    style,
    titled_axes,
)
from surgery.reporting.report import Figure, format_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADES = (BLUE, "#56B4E9")  # of stages in turn, so that one sees where the next starts
SMOOTHED = 30  # points of a plotted curve, each a mean over its part of the steps
GROWN = "grown"


def loss_figure(growth: Growth) -> Figure:
    """Plot the training loss against all tokens and against all operations so far, with the baselines'."""
    title = "Training loss against what it cost"
    canvas = blank_canvas(4.2, title=title)
    left, right = canvas.figure.subplots(1, 2, sharey=True)
    style(left)
    style(right)
    labels: list[Label] = []
    tokens = flops = 0.0
    for number, stage in enumerate(growth.stages):
        record, colour = stage.training, SHADES[number % len(SHADES)]
        points = _smooth(record)
        left.plot([tokens + p.tokens for p in points], [p.loss for p in points], color=colour, linewidth=1.6)
        rate = record.flops / record.tokens
        right.plot([flops + rate * p.tokens for p in points], [p.loss for p in points], color=colour, linewidth=1.6)
        tokens, flops = tokens + record.tokens, flops + record.flops
    # One label for the whole growth, at its end: it is one model.
    labels.append((growth.stages[-1].training.last_loss, GROWN, BLUE))
    for baseline, colour in zip(growth.baselines, itertools.cycle(COLOURS[1:4]), strict=False):
        record = baseline.training
        points = _smooth(record)
        rate = record.flops / record.tokens
        left.plot([p.tokens for p in points], [p.loss for p in points], color=colour, linewidth=1.3)
        right.plot([rate * p.tokens for p in points], [p.loss for p in points], color=colour, linewidth=1.3)
        labels.append((record.last_loss, record.name, colour))
    # Both panels share the y-axis.
    _focus(left, growth)
    left.set_xlabel("tokens trained on, all stages")
    right.set_xlabel("operations (FLOP), nothing cached")
    left.set_ylabel("loss (nats per token)")
    label_lines(right, labels)
    caption = (
        "Each change of shade is a new stage. Operations count as if nothing were cached: a prefix cache makes growth "
        "cheaper than drawn."
    )
    return render_figure(canvas, title, caption)


def depth_figure(growth: Growth) -> Figure:
    """Plot the loss against the number of layers, in training and on each held-out text; dashes for baselines."""
    title = "Loss against depth"
    canvas, axes = titled_axes(title, height=4.2)
    depths = [stage.training.layers for stage in growth.stages]
    labels: list[Label] = []
    heights = [stage.training.last_loss for stage in growth.stages]
    axes.plot(depths, heights, color=PALE, linewidth=2, marker="o", markersize=5)
    labels.append((heights[-1], "training", PALE))
    # A dict keeps the order of the plan, and with it the colours.
    texts = dict.fromkeys(s.task for stage in growth.stages for s in stage.scores if s.metric == LOSS)
    for text, colour in zip(texts, itertools.cycle(COLOURS), strict=False):
        known = [
            (stage.training.layers, score)
            for stage in growth.stages
            for score in stage.scores
            if (score.task, score.metric) == (text, LOSS)
        ]
        axes.plot([x for x, _ in known], [s.value for _, s in known], color=colour, linewidth=2, marker="o", ms=5)
        labels.append((known[-1][1].value, text, colour))
        for baseline in growth.baselines:
            for score in baseline.scores:
                if (score.task, score.metric) == (text, LOSS):
                    axes.axhline(score.value, color=colour, linewidth=1.0, linestyle=(0, (4, 3)), alpha=0.7)
                    labels.append((score.value, f"– {baseline.training.name}", colour))
    axes.set_xticks(sorted(set(depths)))
    axes.set_xlabel("layers")
    axes.set_ylabel("loss (nats per token)")
    axes.margins(x=0.04, y=0.1)
    label_lines(axes, labels)
    caption = f"Training: mean over the last twentieth of a stage. Dashes: trained in one go, with {depths[-1]} layers."
    return render_figure(canvas, title, caption if growth.baselines else caption.partition(" Dashes")[0])


def speed_figure(growth: Growth) -> Figure:
    """Plot the tokens per second of every stage as bars; darker where the prefix was read from the cache."""
    title = "Training speed against depth"
    canvas, axes = titled_axes(title, height=3.2)
    records = [stage.training for stage in growth.stages]
    for at, record in enumerate(records):
        axes.bar(at, record.tokens_per_second, width=0.72, color=BLUE if record.cache.used else PALE)
        axes.annotate(
            format_value(round(record.tokens_per_second), "count"),
            (at, record.tokens_per_second),
            (0, 3),
            textcoords="offset points",
            ha="center",
            color=INK,
            fontsize=8,
        )
    axes.set_xticks(range(len(records)), [f"{record.layers}" for record in records])
    axes.set_xlabel("layers")
    axes.set_ylabel("tokens per second")
    axes.tick_params(colors=SOFT)
    return render_figure(canvas, title, "Dark: what lies below the new layers was read from the prefix cache.")


def _smooth(record: TrainingRecord) -> Sequence[LossPoint]:
    curve = record.curve
    size = max(1, -(-len(curve) // SMOOTHED))
    parts = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [LossPoint(tokens=part[-1].tokens, loss=sum(p.loss for p in part) / len(part)) for part in parts]


def _focus(axes: Axes, growth: Growth) -> None:
    """Limit the y-axis: the first steps, in which every loss falls from the same height, are cut off."""
    models: list[TrainedStage] = [*growth.stages, *growth.baselines]
    losses = [point.loss for model in models for point in _smooth(model.training)]
    low = min(losses)
    first = growth.stages[0].training
    # After a sixth of the first stage the steep part is over.
    late = [point.loss for point in _smooth(first)][len(_smooth(first)) // 6 :]
    axes.set_ylim(low - 0.05 * (max(late) - low + 0.1), max(late) + 0.35 * (max(late) - low + 0.1))
