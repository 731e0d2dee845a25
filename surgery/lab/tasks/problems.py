"""The documents of the tasks `lab_sums` and `lab_sorting`, for lm-evaluation-harness."""

from __future__ import annotations

from datasets import Dataset

from surgery.lab.builder import RECIPE, SPECIALISTS
from surgery.lab.sorting import sorting_test_problems
from surgery.lab.sums import test_problems


def documents(**_metadata: object) -> dict[str, Dataset]:
    """The lab's test problems as `question` and `answer`; the harness hands over the task's metadata, unused."""
    problems = test_problems(RECIPE.terms)
    rows = [{"question": problem.question, "answer": str(problem.answer)} for problem in problems]
    return {"test": Dataset.from_list(rows)}


def sorting_documents(**_metadata: object) -> dict[str, Dataset]:
    """As `documents`, with digits to be put in order."""
    problems = sorting_test_problems(SPECIALISTS.jumbles)
    rows = [{"question": problem.question, "answer": problem.answer} for problem in problems]
    return {"test": Dataset.from_list(rows)}
