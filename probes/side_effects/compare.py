"""Compare an edited model with its original: answers to the same prompts, KL divergence, perplexity, and a table."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from probes.data.examples import Example
from probes.data.generation import complete_examples, context_length
from probes.data.markers import Markers
from probes.data.preparation import GenerationOptions, generation_settings
from probes.data.tokenization import build_sequences
from probes.side_effects.effects import ComparedModel, Rate, measure_divergence
from surgery.engine.options import ExecutionOptions
from surgery.errors import usage_error
from surgery.io.json_io import jsonable
from surgery.models.loaded_model import LoadedModel
from surgery.reporting.report import Column, Table
from surgery.runtime.environment import n_processes

TOPICS = ("harmful", "harmless")
EffectRow = tuple[str, str, str, str | None]  # measure, original, edited, prompts
ALL = "all"  # the topic of examples without one


def bare_prompts(examples: Sequence[Example], most: int, *, any_topic: bool = False) -> list[Example]:
    """Return the examples without thinking and response, each prompt once, the first `most` of each topic.

    Examples without a topic are left out unless `any_topic`.
    """
    seen: set[tuple[str | None, str]] = set()
    n_of_topic: Counter[str | None] = Counter()
    prompts: list[Example] = []
    for example in examples:
        # Data may have the same prompt several times, with different responses.
        key = (example.topic, str(example.messages))
        if (example.topic is None and not any_topic) or key in seen or n_of_topic[example.topic] >= most:
            continue
        seen.add(key)
        n_of_topic[example.topic] += 1
        literal = tuple(name for name in example.literal if name == "messages")
        bare = replace(example, thinking=None, closing=None, response=None, refused=None, literal=literal)
        prompts.append(bare)
    return prompts


def generate_answers(
    live: LoadedModel,
    prompts: Sequence[Example],
    generation: GenerationOptions,
    markers: Markers | None,
    options: ExecutionOptions,
) -> list[Example]:
    """Return the prompts completed by the model, with thinking and response."""
    settings = generation_settings(live, prompts, markers, generation, model_id=live.name)
    # `complete_examples` needs a cache; these answers belong to weights that may never be committed.
    with tempfile.TemporaryDirectory() as folder:
        return complete_examples(
            live.loaded,
            prompts,
            markers=markers,
            cache=Path(folder) / "answers.jsonl",
            settings=settings,
            progress=options.progress,
        )


def divergence_by_topic(
    before: LoadedModel,
    after: LoadedModel,
    answered: Sequence[Example],
    markers: Markers | None,
    options: ExecutionOptions,
) -> tuple[dict[str, tuple[float, float, float]], dict[str, tuple[float, float]]]:
    """Compare the models on the original's answers.

    Returns:
        Topic → KL(original ‖ edited) in nats per token with its interval; topic → perplexities of both models.
    """
    kl: dict[str, tuple[float, float, float]] = {}
    perplexity: dict[str, tuple[float, float]] = {}
    for topic in (*TOPICS, ALL):
        rows = [example for example in answered if (example.topic or ALL) == topic and example.response]
        if not rows:
            continue
        sequences = build_sequences(
            before.tokenizer, rows, markers, max_tokens=context_length(before.model), where=before.name
        )
        # One topic at a time, so that each has its own interval; examples without one are a topic of their own.
        divergence = measure_divergence(
            ComparedModel(before), {"edit": ComparedModel(after)}, sequences, progress=options.progress
        )["edit"]
        mean = divergence.mean_kl([example.group for example in rows])
        kl[topic] = (mean.value, mean.low, mean.high)
        perplexity[topic] = divergence.perplexities
    return kl, perplexity


def manifest_record(effects: Any) -> dict[str, Any]:
    """Return measured effects, a dataclass, as they are written to the manifest."""
    record = jsonable(effects)
    assert isinstance(record, dict)
    return record


def counts_text(before: Rate, after: Rate) -> str:
    """Return the number of prompts of two rates, or both numbers where they differ."""
    # They differ where a model left some answers unfinished.
    return f"{before.n}" if before.n == after.n else f"{before.n} / {after.n}"


def share_text(rate: Rate) -> str:
    """Return a share with its interval in percent, or a dash where it is of no prompts."""
    if not rate.n:
        return "–"
    return f"{100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def divergence_rows(
    kl: Mapping[str, tuple[float, float, float]], perplexity: Mapping[str, tuple[float, float]]
) -> list[EffectRow]:
    """Return the results of `divergence_by_topic` as rows of `effects_table`."""
    rows: list[EffectRow] = []
    for topic, (value, low, high) in kl.items():
        rows.append((f"KL on {_answers_on(topic)} (nats/token)", "0", f"{value:.4g} [{low:.4g}, {high:.4g}]", None))
    for topic, (before, after) in perplexity.items():
        rows.append((f"perplexity of {_answers_on(topic)}", f"{before:.4g}", f"{after:.4g}", None))
    return rows


def effects_table(rows: Sequence[EffectRow]) -> Table:
    """Return a table of the original beside the edited model, a row per measure."""
    columns = [Column("measure"), Column("original"), Column("edited"), Column("prompts")]
    note = (
        "In brackets: 95 % intervals. Answers are the models' own, greedy, from the prompt on; KL and perplexity are "
        "taken on the original's answers."
    )
    return Table("Side effects", columns, rows, note=note)


def _answers_on(topic: str) -> str:
    return "its answers" if topic == ALL else f"its {topic} answers"


def should_measure(command: str, *, wanted: bool, dry_run: bool, run: Path | None, data: str | None) -> bool:
    """Return whether an edit is measured before it is committed: if that is `wanted` and there are prompts.

    Raises:
        SurgeryError: `data` are given though measuring is not wanted; the job runs in several processes.
    """
    measured = wanted and not dry_run and (run is not None or data is not None)
    if measured and n_processes() > 1:
        raise usage_error(
            "runs in one process where it measures",
            where=command,
            hint="Start it without accelerate launch, or add --no-measure.",
        )
    if data is not None and not wanted:
        raise usage_error("--data says what to measure on, --no-measure not to measure: give one of them.")
    return measured
