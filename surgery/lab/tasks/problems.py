"""Documents of the tasks `lab_sums` and `lab_sorting`, for lm-evaluation-harness."""

from __future__ import annotations

from datasets import Dataset

from surgery.lab.catalogue import REASONING, SPECIALISTS
from surgery.lab.sorting import sorting_evaluation_problems
from surgery.lab.sums import evaluation_problems


def documents(**_metadata: object) -> dict[str, Dataset]:
    """Return the lab's test problems on sums, as `question` and `answer`; the harness passes the task's metadata."""
    problems = evaluation_problems(REASONING.terms)
    rows = [{"question": problem.question, "answer": str(problem.answer)} for problem in problems]
    return {"test": Dataset.from_list(rows)}


def sorting_documents(**_metadata: object) -> dict[str, Dataset]:
    """Return the test problems on sorting, as `documents` does those on sums."""
    problems = sorting_evaluation_problems(SPECIALISTS.jumbles)
    rows = [{"question": problem.question, "answer": problem.answer} for problem in problems]
    return {"test": Dataset.from_list(rows)}
