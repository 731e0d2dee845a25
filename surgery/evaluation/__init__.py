"""Scores of models on tasks and texts, with 95 % intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from surgery.evaluation.evaluation_report import EvaluationReport, evaluate
    from surgery.evaluation.harness import on_tasks
    from surgery.evaluation.perplexity import on_texts
    from surgery.evaluation.scoring import Score, score_models

__all__ = [
    "EvaluationReport",
    "Score",
    "evaluate",
    "on_tasks",
    "on_texts",
    "score_models",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "surgery.evaluation.evaluation_report": ["EvaluationReport", "evaluate"],
        "surgery.evaluation.harness": ["on_tasks"],
        "surgery.evaluation.perplexity": ["on_texts"],
        "surgery.evaluation.scoring": ["Score", "score_models"],
    },
)
