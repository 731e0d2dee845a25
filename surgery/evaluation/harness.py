"""Score models on tasks through lm-evaluation-harness (the extra `eval`): means with 95 % intervals.

Tasks have the harness's own names. Those of the lab, `lab_sums` and `lab_sorting`, come with this package and need no
network.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError, did_you_mean, listing, usage_error
from surgery.evaluation.scoring import Measure, Score
from surgery.evaluation.statistics import Z, wilson_interval
from surgery.models.chat_template import render_chat
from surgery.models.loading import ModelAndTokenizer
from surgery.runtime.quiet_libraries import quiet

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

TASK_FOLDER = Path(__file__).parents[1] / "lab" / "tasks"
# Bootstrap samples for metrics that are not means, such as BLEU; the harness's default of 100,000 takes minutes.
BOOTSTRAPS = 1000
STDERR = "_stderr"
NEAREST = 3


def on_tasks(
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 64,
    chat: bool | None = None,
    seed: int = 0,
    part: tuple[int, int] | None = None,
) -> list[Measure]:
    """Return a measurement per task, for `score_models`.

    Args:
        tasks: names of tasks, groups or tags; a tag stands for its tasks.
        limit: only the first samples of each task, at most this many.
        batch_size: samples at a time.
        chat: whether prompts go through the tokenizer's chat template. None follows the task: on where its metadata
            says `chat_template: true` and the tokenizer has a template, else off, as the harness does by default, so
            that scores compare with published ones.
        seed: of few-shot examples, sampling and bootstrap; each task begins with it.
        part: (number, of): only every of-th sample, from `number` on, so that what is chosen on one part can be tested
            on another.

    Raises:
        SurgeryError: the extra `eval` is missing; a task is unknown; once measured, `chat` is asked of a tokenizer
            without template.
    """
    manager = _find_tasks(tasks)
    options = _TaskOptions(manager, limit, batch_size, chat, seed, part)
    return [partial(_score, task=task, options=options) for task in dict.fromkeys(tasks)]


@dataclass(frozen=True)
class _TaskOptions:
    """How tasks are run; see `on_tasks`."""

    manager: TaskManager
    limit: int | None
    batch_size: int
    chat: bool | None
    seed: int
    part: tuple[int, int] | None


def _score(loaded: ModelAndTokenizer, *, task: str, options: _TaskOptions) -> list[Score]:
    model, tokenizer = loaded.model, loaded.tokenizer
    templated = getattr(tokenizer, "chat_template", None) is not None
    if options.chat and not templated:
        raise usage_error("the tokenizer has no chat template.", where=loaded.name, hint="Leave the option out.")
    with quiet(), _seeded(options.seed):
        from lm_eval.evaluator import evaluate as run

        wrapped = _harness_model(model, tokenizer, options.batch_size)
        loaded_tasks = options.manager.load([task])
        for one in loaded_tasks["tasks"].values():
            if one.get_config("num_fewshot") is None:
                one.set_config(key="num_fewshot", value=0)
            one.set_fewshot_seed(seed=options.seed)
        chat = options.chat
        if chat is None:
            chat = templated and _wants_chat(loaded_tasks["tasks"])
        results = run(
            lm=wrapped,
            task_dict=loaded_tasks,
            limit=None if options.part else options.limit,
            samples=None if options.part is None else _samples(loaded_tasks["tasks"], options.limit, *options.part),
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=True,
        )
    return _read_scores(loaded.name, task, results)


def _harness_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """Return the harness's form of a model, which renders chat templates within bounds."""
    from lm_eval.models.huggingface import HFLM

    class BoundedModel(HFLM):  # type: ignore[misc]  # the harness is untyped here
        def apply_chat_template(
            self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
        ) -> str:
            asked = {
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": not add_generation_prompt,
                "settings": self.chat_template_args,
            }
            try:
                return render_chat(self.tokenizer, chat_history, **asked)
            except SurgeryError:
                # As the harness does: some templates take no system message.
                without = [message for message in chat_history if message["role"] != "system"]
                if len(without) == len(chat_history):
                    raise
                return render_chat(self.tokenizer, without, **asked)

    # The device must be named: the harness moves a model only if it loads it itself, but sends inputs to this one.
    return BoundedModel(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))


def _samples(tasks: Mapping[str, Any], limit: int | None, number: int, of: int) -> dict[str, list[int]]:
    """Return, for each task, the numbers of its samples that are in a part."""
    samples: dict[str, list[int]] = {}
    for name, task in tasks.items():
        count = len(task.eval_docs)
        samples[name] = list(range(number, min(count, limit or count), of))
        if not samples[name]:
            raise usage_error(f"has {min(count, limit or count)} samples, too few for {of} parts", where=name)
    return samples


def _read_scores(model: str, requested: str, results: Mapping[str, Any]) -> list[Score]:
    """Return the scores of the task or group itself, or of the tasks in it if it has none of its own."""
    rows = dict(results["results"])
    if group := results.get("groups", {}).get(requested):
        rows[requested] = group
    chosen = [requested] if _metrics(rows.get(requested, {})) else [task for task in rows if _metrics(rows[task])]
    if not chosen:
        raise SurgeryError("the task gave no number.", where=requested)
    return [score for task in chosen for score in _task_scores(model, task, rows[task], results)]


def _task_scores(model: str, task: str, row: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[Score]:
    metrics = _metrics(row)
    several = len({key.partition(",")[2] for key in metrics}) > 1
    n = int(row.get("sample_len") or sum(count["effective"] for count in results["n-samples"].values()))
    better = results.get("higher_is_better", {}).get(task, {})
    for key in metrics:
        metric, _, filter_name = key.partition(",")
        value, error = float(row[key]), row.get(f"{metric}{STDERR},{filter_name}")
        samples = [
            sample[metric]
            for sample in results["samples"].get(task, ())
            if sample["filter"] == filter_name and metric in sample
        ]
        if _is_share(samples, value):
            low, high = wilson_interval(float(sum(samples)), len(samples))
        else:
            spread = Z * float(error) if isinstance(error, int | float) else math.nan
            low, high = value - spread, value + spread
        title = f"{metric} ({filter_name})" if several else metric
        yield Score(model, task, title, value, low, high, n, better.get(metric))


def _is_share(samples: Sequence[Any], value: float) -> bool:
    # Only a mean of zeros and ones has Wilson's interval: scores between them, or group means, do not.
    binary = bool(samples) and all(isinstance(s, int | float) and s in (0, 1) for s in samples)
    return binary and math.isclose(sum(samples) / len(samples), value, abs_tol=1e-9)


def _metrics(row: Mapping[str, Any]) -> list[str]:
    """Return the keys `metric,filter` of a result row whose values are numbers."""
    return [
        key
        for key, value in row.items()
        if "," in key and not key.partition(",")[0].endswith(STDERR) and isinstance(value, int | float)
    ]


def _wants_chat(tasks: Mapping[str, Any]) -> bool:
    return all(bool((task.get_config("metadata") or {}).get("chat_template")) for task in tasks.values())


def task_names() -> Collection[str]:
    """Return the names of all tasks, groups and tags, which takes seconds. Raises SurgeryError without `eval`."""
    names: Collection[str] = _index(True).all_tasks
    return names


def lab_task_names() -> set[str]:
    """Return the names of the lab's tasks, without asking the harness."""
    return {path.stem for path in TASK_FOLDER.glob("*.yaml")}


def _find_tasks(tasks: Sequence[str]) -> TaskManager:
    """Return an index of all of `tasks`: of the lab's alone if possible, else of the harness's many thousands too."""
    if not tasks:
        raise usage_error("no task was given.", hint="Name one, such as lab_sums or gsm8k.")
    manager = _index(False)
    if all(task in manager.all_tasks for task in tasks):
        return manager
    manager = _index(True)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if not unknown:
        return manager
    hint = did_you_mean(unknown[0], manager.all_tasks, most=NEAREST) or "`lm_eval ls tasks` lists them all."
    raise usage_error(f"no such task: {listing(repr(task) for task in unknown)}.", hint=hint)


@lru_cache(maxsize=2)
def _index(defaults: bool) -> TaskManager:
    # Cached, because reading the harness's own tasks takes seconds: a sweep would pay that at every α.
    with quiet():
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise SurgeryError(
                "evaluation needs lm-evaluation-harness, which is not installed.",
                hint="Install it: pip install 'model-surgery[eval]'.",
            ) from error
        return TaskManager(include_path=str(TASK_FOLDER), include_defaults=defaults)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the generators that tasks draw from; restore their states at the end."""
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
