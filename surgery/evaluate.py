"""Scores of models on tasks, through lm-evaluation-harness (the extra `eval`): means with 95 % intervals.

Tasks go by the harness's own names; the lab's, `lab_sums` and `lab_sorting`, come with this package and need no
network.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError, listing, usage_error

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

TASK_FOLDER = Path(__file__).parent / "lab" / "tasks"
# The 97.5 % quantile of the normal distribution: the half-width of a 95 % interval in standard errors.
Z = 1.959963984540054
# Only for metrics that are no means, such as BLEU; the harness's own default of 100,000 takes minutes.
BOOTSTRAPS = 1000
STDERR = "_stderr"
NEAREST = 3


@dataclass(frozen=True)
class Score:
    """One metric of one model on one task, with its 95 % interval.

    `low` and `high` are Wilson's for a mean of zeros and ones, else `value` ± 1.96 standard errors as the harness
    estimates them (from the samples, by bootstrap for metrics that are no means, pooled for groups); NaN where it
    gives none. `metric` names the harness's filter too where the task has more than one. `n` counts samples.
    `higher_is_better` is None where nobody says.
    """

    model: str
    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    higher_is_better: bool | None = None


def evaluate(
    models: Mapping[str, Path | str],
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 64,
    device: str = "cpu",
    dtype: str = "auto",
    chat: bool | None = None,
    seed: int = 0,
) -> list[Score]:
    """Scores every model on every task, one model in memory at a time.

    Args:
        models: display name → folder with a model and its tokenizer.
        tasks: names of tasks, groups or tags; a tag stands for its tasks.
        limit: only the first samples of each task, at most this many.
        batch_size: samples at a time.
        dtype: that the model computes in; `auto` is the one it is stored in.
        chat: whether prompts go through the tokenizer's chat template. None follows the task: on where its metadata
            says `chat_template: true` and the tokenizer has a template, else off, as the harness does by default, so
            that scores compare with published ones.
        seed: of few-shot examples, sampling and bootstrap.

    Raises:
        SurgeryError: the extra `eval` is missing; a task is unknown; a model cannot be loaded; `chat` is asked of a
            tokenizer without template.
    """
    if not models:
        raise usage_error("no model to evaluate was given.")
    manager = _find_tasks(tasks)
    scores = []
    for name, folder in models.items():
        model, tokenizer = load_model(folder, name, device=device, dtype=dtype)
        scores += _score(
            model, tokenizer, name, tasks, manager, limit=limit, batch_size=batch_size, chat=chat, seed=seed
        )
    return scores


def load_model(folder: Path | str, name: str, *, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """The transformers model in `folder`, ready to be scored, and its tokenizer.

    Raises:
        SurgeryError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
            model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).to(device).eval()
        except (OSError, ValueError) as fault:
            raise SurgeryError(f"cannot be loaded to be evaluated: {fault}", where=name) from fault
    return model, tokenizer


def evaluate_loaded(
    model: Any,
    tokenizer: Any,
    name: str,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 64,
    chat: bool | None = None,
    seed: int = 0,
) -> list[Score]:
    """Scores a transformers model that is in memory, where it is; the arguments are those of `evaluate`.

    Raises:
        SurgeryError: as `evaluate`.
    """
    manager = _find_tasks(tasks)
    return _score(model, tokenizer, name, tasks, manager, limit=limit, batch_size=batch_size, chat=chat, seed=seed)


def wilson(successes: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n)."""
    share, spread = successes / n, Z * Z / n
    centre = share + spread / 2
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4)
    # At shares of 0 and 1 a bound is the share itself; rounding must not carry it past.
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return max(0.0, min(share, low)), min(1.0, max(share, high))


def _score(
    model: Any,
    tokenizer: Any,
    name: str,
    tasks: Sequence[str],
    manager: TaskManager,
    *,
    limit: int | None,
    batch_size: int,
    chat: bool | None,
    seed: int,
) -> list[Score]:
    templated = getattr(tokenizer, "chat_template", None) is not None
    if chat and not templated:
        raise usage_error("the tokenizer has no chat template.", where=name, hint="Leave the option out.")
    scores = []
    with quiet(), _seeded(seed):
        from lm_eval.evaluator import evaluate as run
        from lm_eval.models.huggingface import HFLM

        # Computing on the model's own device: the harness moves a model only if it loads it itself.
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))
        for asked in dict.fromkeys(tasks):
            loaded = manager.load([asked])
            for task in loaded["tasks"].values():
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=seed)
            results = run(
                lm=wrapped,
                task_dict=loaded,
                limit=limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=True,
                apply_chat_template=chat if chat is not None else templated and _wants_chat(loaded["tasks"]),
                fewshot_as_multiturn=True,
            )
            scores += _read(name, asked, results)
    return scores


def _read(model: str, asked: str, results: Mapping[str, Any]) -> list[Score]:
    """The scores of the task or group itself; of the tasks in it where it has none of its own."""
    rows = dict(results["results"])
    if group := results.get("groups", {}).get(asked):
        rows[asked] = group
    chosen = [asked] if _metrics(rows.get(asked, {})) else [task for task in rows if _metrics(rows[task])]
    if not chosen:
        raise SurgeryError("the task gave no number.", where=asked)
    return [score for task in chosen for score in _task_scores(model, task, rows[task], results)]


def _task_scores(model: str, task: str, row: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[Score]:
    metrics = _metrics(row)
    several = len({key.partition(",")[2] for key in metrics}) > 1
    n = int(row.get("sample_len") or sum(count["effective"] for count in results["n-samples"].values()))
    better = results.get("higher_is_better", {}).get(task, {})
    for key in metrics:
        metric, _, sieve = key.partition(",")
        value, error = float(row[key]), row.get(f"{metric}{STDERR},{sieve}")
        samples = [
            sample[metric]
            for sample in results["samples"].get(task, ())
            if sample["filter"] == sieve and metric in sample
        ]
        if _is_share(samples, value):
            low, high = wilson(float(sum(samples)), len(samples))
        else:
            spread = Z * float(error) if isinstance(error, int | float) else math.nan
            low, high = value - spread, value + spread
        shown = f"{metric} ({sieve})" if several else metric
        yield Score(model, task, shown, value, low, high, n, better.get(metric))


def _is_share(samples: Sequence[Any], value: float) -> bool:
    binary = bool(samples) and all(isinstance(s, int | float) and s in (0, 1) for s in samples)
    return binary and math.isclose(sum(samples) / len(samples), value, abs_tol=1e-9)


def _metrics(row: Mapping[str, Any]) -> list[str]:
    """The keys `metric,filter` of a result row."""
    return [
        key
        for key, value in row.items()
        if "," in key and not key.partition(",")[0].endswith(STDERR) and isinstance(value, int | float)
    ]


def _wants_chat(tasks: Mapping[str, Any]) -> bool:
    return all(bool((task.get_config("metadata") or {}).get("chat_template")) for task in tasks.values())


def _find_tasks(tasks: Sequence[str]) -> TaskManager:
    """The index that knows all of `tasks`: the lab's own if that will do, else the harness's many thousands too."""
    if not tasks:
        raise usage_error("no task was given.", hint="Name one, such as lab_sums or gsm8k.")
    manager = _index(False)
    if all(task in manager.all_tasks for task in tasks):
        return manager
    manager = _index(True)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if not unknown:
        return manager
    near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=NEAREST)
    hint = f"Did you mean {listing(near)}?" if near else "`lm_eval ls tasks` lists them all."
    raise usage_error(f"no such task: {listing(repr(task) for task in unknown)}.", hint=hint)


@lru_cache(maxsize=2)
def _index(defaults: bool) -> TaskManager:
    # Reading the harness's own tasks takes seconds; a sweep would pay that at every α.
    with quiet():
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as fault:
            raise SurgeryError(
                "evaluation needs lm-evaluation-harness, which is not installed.",
                hint="Install it: pip install 'model-surgery[eval]'.",
            ) from fault
        return TaskManager(include_path=str(TASK_FOLDER), include_defaults=defaults)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the harness's and its libraries' logs, bars and warnings off the terminal; errors still get out."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Sets the generators that tasks draw from, and gives back their states."""
    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
