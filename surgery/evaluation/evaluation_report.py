"""Score models on tasks and texts side by side, as `surgery eval` does, and put the scores into model cards."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.checkpoint.checkpoint import Checkpoint, loadable_folder
from surgery.checkpoint.resolve import open_checkpoint
from surgery.errors import usage_error
from surgery.evaluation import scorecard
from surgery.evaluation.harness import on_tasks
from surgery.evaluation.perplexity import on_texts, read_text
from surgery.evaluation.scoring import Measure, Score, score_models
from surgery.io.command_line import option_words
from surgery.models.choices import SpecialTokens
from surgery.reporting.report import Figure, Table
from surgery.runtime.progress import Progress, silent

OpenedModels = Mapping[str, Checkpoint]
ModelFolders = Mapping[str, Path]


@dataclass(frozen=True)
class EvaluationVariant:
    """A change to what is scored, such as each model also with experts scaled while it runs.

    extend: takes the opened models and the measurements, and returns models and measurements in their place.
    options: the command line's options that ask for it, for the command on model cards.
    """

    extend: Callable[[OpenedModels, Sequence[Measure]], tuple[OpenedModels, Sequence[Measure]]]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationReport:
    """Scores of models side by side. folders: of those models that surgery wrote. command: that gives these scores."""

    scores: Sequence[Score]
    folders: ModelFolders
    command: str

    def table(self) -> Table:
        """Return one row per task and metric, with a column per model."""
        return scorecard.score_table(self.scores)

    def figure(self) -> Figure:
        """Return the table as bars."""
        return scorecard.score_figure(self.scores)

    def losses(self, model: str) -> list[str]:
        """Return a sentence for each row in which `model` is worse than the best, beyond the intervals."""
        return scorecard.losses(self.scores, model)

    def write_card(self, model: str) -> Path:
        """Put the scores into the card of `model`, one of `folders`, and return its path. Raises SurgeryError."""
        return scorecard.write_scores(self.folders[model], self.scores, self.command)


def evaluate(
    models: Sequence[str],
    *,
    tasks: Sequence[str] = (),
    texts: Sequence[Path] = (),
    special_tokens: SpecialTokens = "text",
    limit: int | None = None,
    batch_size: int = 64,
    device: str = "cpu",
    prepare: Callable[[OpenedModels], None] = lambda opened: None,
    variant: EvaluationVariant | None = None,
    progress: Progress = silent,
) -> EvaluationReport:
    """Score every one of `models` on `tasks` and on the perplexity of `texts`; nothing is written.

    Example:
        report = surgery.evaluate(["lab:sft", "lab:grpo"], tasks=["lab_sums"])

    Args:
        tasks: of the evaluation harness, or of the lab.
        texts: files to predict, see `perplexity.read_text`.
        special_tokens: what special tokens in `texts` are, see `perplexity.read_text`.
        limit: only the first samples of each task or text.
        prepare: called with the opened models before any is loaded, to register model classes with transformers.

    Raises:
        SurgeryError: there is nothing to score on; a model, text or task is missing or damaged; as the measurements.
    """
    if not tasks and not texts:
        raise usage_error("nothing to score the models on.", hint="Add --task TASK, --perplexity TEXT, or both.")
    documents = [read_text(path, special_tokens=special_tokens) for path in texts]
    opened: OpenedModels = {model: open_checkpoint(model) for model in models}
    folders = {model: loadable_folder(checkpoint) for model, checkpoint in opened.items()}
    results = {model: folders[model] for model, checkpoint in opened.items() if scorecard.is_result(checkpoint)}
    # After the models' own errors, which show at once: finding a task takes the harness seconds.
    measures: Sequence[Measure] = on_tasks(tasks, limit=limit, batch_size=batch_size) if tasks else []
    if documents:
        measures = [*measures, *on_texts(documents, limit=limit, batch_size=batch_size, progress=progress)]
    prepare(opened)
    if variant is not None:
        opened, measures = variant.extend(opened, measures)
    scores = score_models(opened, measures, device=device, progress=progress)
    options = {
        "task": list(tasks),
        "perplexity": list(texts),
        "special_tokens": None if special_tokens == "text" else special_tokens,
        "limit": limit,
        **(variant.options if variant else {}),
    }
    return EvaluationReport(scores, results, shlex.join(["surgery", "eval", *models, *option_words(options)]))
