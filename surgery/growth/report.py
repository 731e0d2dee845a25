"""Report of a growth: tables, sentences that compare it with baselines, plots, and one HTML page with all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from surgery.evaluation.perplexity import BITS, LOSS, PERPLEXITY
from surgery.growth.results import Growth, ScoreRecord, TrainedStage
from surgery.reporting.report import Column, Report, Table, Value, format_value


def stage_table(growth: Growth) -> Table:
    """Return a table with one row per stage: what was added, what trained, and what it cost."""
    rows: list[list[Value]] = []
    for model in growth.stages:
        record = model.training
        rows.append(
            [
                record.name,
                record.layers,
                f"{record.stage.init} at {record.stage.at}" if record.new else "none",
                ", ".join(record.stage.train),
                record.trained_parameters,
                record.optimizer_bytes,
                record.tokens,
                record.stopped,
                record.first_loss,
                record.last_loss,
                round(record.tokens_per_second),
                "read" if record.cache.used else "computed",
            ]
        )
    columns: list[Column | str] = [
        "stage",
        "layers",
        "added",
        "trains",
        Column("parameters trained"),
        Column("optimizer state", "bytes"),
        Column("tokens"),
        "stopped by",
        Column("loss at first", "score"),
        Column("at last", "score"),
        Column("tokens/s"),
        "prefix",
    ]
    proven = sum(model.training.proven for model in growth.stages)
    note = (
        f"Losses are means over the first and the last twentieth of a stage. {proven:,} frozen tensors were hashed in "
        "the checkpoints before and after their stage: every hash is the same."
    )
    return Table("Stages", columns, rows, note)


def comparison_table(growth: Growth) -> Table:
    """Return a table with one row per model: its tokens and operations, and its scores."""
    scores = [score for model in _models(growth) for score in model.scores]
    # A text has three measures that follow from each other: only the one that is comparable to the training loss.
    measured = list(dict.fromkeys((s.task, s.metric) for s in scores if s.metric not in (PERPLEXITY, BITS)))
    rows: list[list[Value]] = []
    tokens, flops = 0, 0.0
    for model in growth.stages:
        tokens, flops = tokens + model.training.tokens, flops + model.training.flops
        rows.append(_row(model, tokens, flops, measured))
    rows += [_row(model, model.training.tokens, model.training.flops, measured) for model in growth.baselines]
    columns: list[Column | str] = [
        "model",
        "layers",
        Column("tokens in all"),
        Column("operations in all", "number"),
        Column("training loss", "score"),
        *(task if metric == LOSS else f"{task}: {metric}" for task, metric in measured),
    ]
    note = (
        "Operations (FLOP) count as if nothing were cached. Texts: nats per token, with 95 % intervals. Baselines are "
        "trained in one go, all layers at once, on the windows that the growth saw, in their order."
    )
    return Table("Growth beside training in one go" if growth.baselines else "Models", columns, rows, note)


def verdicts(growth: Growth) -> list[str]:
    """Return a sentence per baseline and held-out text: which model is better, by how much, and if beyond noise."""
    if not growth.baselines:
        return ["No baseline was trained: `surgery grow baseline PLAN -o RUN` adds them, and the comparison."]
    sentences = []
    grown = growth.stages[-1]
    for baseline in growth.baselines:
        name = baseline.training.name
        # Without held-out texts only training losses remain, which have no interval.
        if not any(score.metric == LOSS for score in baseline.scores):
            gap = grown.training.last_loss - baseline.training.last_loss
            sentences.append(f"Against {name}, in training alone: {_better(gap)}.")
        for score in baseline.scores:
            ours = next((s for s in grown.scores if (s.task, s.metric) == (score.task, LOSS)), None)
            if score.metric == LOSS and ours is not None:
                clear = "" if _intervals_apart(ours, score) else ", within the noise (the 95 % intervals touch)"
                sentences.append(f"Against {name}, on {score.task}: {_better(ours.value - score.value)}{clear}.")
    return sentences


def growth_report(growth: Growth) -> Report:
    """Return the HTML report with everything."""
    # matplotlib takes long to import, and is needed only here.
    from surgery.growth.plots import depth_figure, loss_figure, speed_figure

    first, last = growth.stages[0].training, growth.stages[-1].training
    done, planned = len(growth.stages), len(growth.plan.expanded)
    start = growth.plan.embed or growth.plan.start
    frozen = all(model.training.embedding == "frozen" for model in growth.stages)
    intro = (
        f"From {first.layers - len(first.new)} to {last.layers} layers in {done} of {planned} stages, begun with "
        f"{start}, the embedding {'frozen' if frozen else 'trained too'} (after arXiv 2507.07129). Corpus: "
        f"{', '.join(growth.plan.corpus)}."
    )
    report = Report("A transformer grown layer by layer", intro)
    report.add("\n".join(verdicts(growth)))
    report.add(comparison_table(growth)).add(depth_figure(growth)).add(loss_figure(growth))
    report.add(stage_table(growth)).add(speed_figure(growth))
    return report.add("\n".join(f"{model.training.name}: {model.training.cache.reason}" for model in growth.stages))


def _models(growth: Growth) -> Sequence[TrainedStage]:
    return (*growth.stages, *growth.baselines)


def _row(model: TrainedStage, tokens: int, flops: float, measured: Sequence[tuple[str, str]]) -> list[Value]:
    record = model.training
    by_what = {(score.task, score.metric): score for score in model.scores}
    cells: list[Value] = [_cell(by_what[what]) if what in by_what else None for what in measured]
    return [record.name, record.layers, tokens, flops, record.last_loss, *cells]


def _cell(score: ScoreRecord) -> str:
    value = format_value(score.value, "score")
    if score.low is None or score.high is None:
        return value
    return f"{value} [{format_value(score.low, 'score')}, {format_value(score.high, 'score')}]"


def _intervals_apart(a: ScoreRecord, b: ScoreRecord) -> bool:
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return False
    # Stricter than a paired test: intervals that touch may still hide a significant difference.
    return a.low > b.high or b.low > a.high


def _better(gap: float) -> str:
    # The report shows three decimals: a smaller gap would read as 0.000.
    if math.isclose(gap, 0, abs_tol=5e-4):
        return "the same loss"
    word = "worse" if gap > 0 else "better"
    return f"the grown model is {word} by {abs(gap):.3f} nats per token"
