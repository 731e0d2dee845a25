"""Score models by measurements, with each model loaded once.

`harness.on_tasks` and `perplexity.on_texts` provide the measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.errors import usage_error
from surgery.models.loading import ModelAndTokenizer, load_model
from surgery.runtime.progress import Advance, Progress, silent


@dataclass(frozen=True)
class Score:
    """One metric of one model on one task or text, with its 95 % interval.

    `low` and `high` are Wilson's for a mean of zeros and ones, else `value` ± 1.96 standard errors as the harness
    estimates them (from the samples, by bootstrap for metrics that are no means, pooled for groups); NaN if it
    gives none. `metric` names the harness's filter too where the task has more than one. `n` counts samples.
    `higher_is_better` is None if it is not known.
    """

    model: str
    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    higher_is_better: bool | None = None


Measure = Callable[[ModelAndTokenizer], Sequence[Score]]


def score_models(
    models: Mapping[str, Checkpoint | Path | str],
    measures: Sequence[Measure],
    *,
    device: str = "cpu",
    dtype: str = "auto",
    progress: Progress = silent,
) -> list[Score]:
    """Take every measurement of every model, with one model in memory at a time; return the scores model by model.

    Args:
        models: display name → a model, opened or its folder, with its tokenizer.
        dtype: that the models compute in; `auto` is the one they are stored in.

    Raises:
        SurgeryError: no model was given, or one cannot be loaded; else as the measurements.
    """
    if not models:
        raise usage_error("no model to evaluate was given.")
    scores = []
    with progress("Scoring", len(models) * len(measures), "steps") as advance:
        for name, model in models.items():
            scores += _score_model(model, name, measures, device, dtype, advance)
    return scores


def _score_model(
    model: Checkpoint | Path | str, name: str, measures: Sequence[Measure], device: str, dtype: str, advance: Advance
) -> list[Score]:
    # A function of its own, so that the model's memory is free before the next one is loaded.
    loaded = load_model(model, name, device=device, dtype=dtype)
    scores: list[Score] = []
    for measure in measures:
        scores += measure(loaded)
        advance(1)
    return scores
