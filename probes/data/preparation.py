"""Prepare the user's examples for probing: complete them with the model, label them, and tokenise them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes.data.choices import Engine
from probes.data.examples import MAX_REPORTED, DataSet, Example, TokenSequence
from probes.data.generation import complete_examples, context_length, remaining_tokens
from probes.data.generation_engines import GenerationSettings
from probes.data.labels import REFUSAL_PHRASES, label_by_guard, label_by_keywords, read_phrases
from probes.data.literal_text import without_idle_literals
from probes.data.markers import (
    CLOSE_OPTION,
    NONE_OPTION,
    OPEN_OPTION,
    Markers,
    find_markers,
    never_closed,
    split_responses,
)
from probes.data.records import DataRecord, ModelRecord
from probes.data.tokenization import build_sequences, encode_before_answer, template_hash, tokenizer_hash
from surgery.checkpoint.checkpoint import loadable_folder
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.tokenizer_files import TOKENIZER_FILES
from surgery.errors import ErrorList, SurgeryError, usage_error
from surgery.models.loaded_model import LoadedModel, load_with_structure
from surgery.models.loading import ModelAndTokenizer, load_model
from surgery.runtime.progress import Progress, silent

# Caches of completions of the data, and of the second data set. They stay in the staging folder until a run is whole.
GENERATIONS = "generations.jsonl"
CACHES = (GENERATIONS, f"transfer-{GENERATIONS}")

Labeler = Callable[[Sequence[Example]], list[Example]]


@dataclass(frozen=True)
class GenerationOptions:
    """How the model generates what the data lack, and how its responses are labelled.

    Stored in findings as the setting `asking`.

    Args:
        think_open, think_close: the markers around the model's thinking; None finds them.
        no_thinking: the model does not think: answers follow the prompt.
        max_new_tokens: of thinking and response together; None for 1,024, or what the model's context leaves the
            longest prompt.
        temperature, seed, batch_size, engine: see `GenerationSettings`.
        phrases: phrases that mark a refusal, or a file with one per line; None for the documented list.
        guard: a guard model that labels responses instead of the phrases.
    """

    think_open: str | None = None
    think_close: str | None = None
    no_thinking: bool = False
    max_new_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 16
    engine: Engine = "transformers"
    phrases: Path | Sequence[str] | None = None
    guard: str | None = None


def options_from_findings(settings: Mapping[str, Any]) -> GenerationOptions:
    """Return the `GenerationOptions` of an earlier run, from the settings in its findings."""
    return GenerationOptions(**settings["asking"])


@dataclass(frozen=True)
class PreparedData:
    """Examples with thinking, response and verdict, and their tokens, in the order of the data.

    markers: None if the model does not think.
    unfinished: examples whose thinking never closed; they are not among `examples`.
    generated: how many examples the model completed.
    """

    examples: tuple[Example, ...]
    sequences: tuple[TokenSequence, ...]
    markers: Markers | None
    unfinished: tuple[Example, ...]
    generated: int


def open_model(ref: str | Path, *, device: str = "cpu", dtype: str = "auto", name: str | None = None) -> LoadedModel:
    """Load a model as `load_with_structure` does, after checking that it has a tokenizer.

    Raises:
        SurgeryError: there is no tokenizer; otherwise as `load_with_structure`.
    """
    checkpoint = open_checkpoint(ref)
    # Before the weights are loaded, which takes minutes.
    if not checkpoint.side_files.keys() & set(TOKENIZER_FILES):
        raise usage_error(
            "has no tokenizer beside its weights", where=name or ref, hint="Copy its tokenizer.json into the folder."
        )
    return load_with_structure(ref, device=device, dtype=dtype, name=name)


def resolve_markers(live: LoadedModel, generation: GenerationOptions) -> Markers | None:
    """Return the model's thinking markers, None for a model without thinking. Raises SurgeryError if none are found."""
    if generation.no_thinking:
        if generation.think_open is not None or generation.think_close is not None:
            raise usage_error(
                f"{NONE_OPTION} says that there are no markers, {OPEN_OPTION} or {CLOSE_OPTION} names one."
            )
        return None
    return find_markers(live.tokenizer, opening=generation.think_open, closing=generation.think_close, where=live.name)


def make_labeler(generation: GenerationOptions, *, device: str, progress: Progress) -> Labeler:
    """Return the function that fills in missing verdicts.

    Raises:
        SurgeryError: at once, not when the function is called, if the phrase file or the guard's folder is wrong.
    """
    # Everything that can be wrong is checked here: labelling comes after hours of generation.
    if generation.guard is None:
        phrases = refusal_phrases(generation)
        return lambda examples: label_by_keywords(examples, phrases)
    if generation.phrases is not None:
        raise usage_error("--guard and --refusal-phrases are two ways to judge: give one of them.")
    name, checkpoint = generation.guard, open_checkpoint(generation.guard)
    loadable_folder(checkpoint)
    loaded: list[ModelAndTokenizer] = []

    def by_guard(examples: Sequence[Example]) -> list[Example]:
        # Loaded at the first call: until then generation needs the memory.
        if not loaded:
            loaded.append(load_model(checkpoint, name, device=device))
        return label_by_guard(examples, loaded[0], batch_size=generation.batch_size, progress=progress)

    return by_guard


def refusal_phrases(generation: GenerationOptions) -> Sequence[str]:
    """Return the phrases that mark a refusal. Raises SurgeryError if their file cannot be read."""
    if generation.phrases is None:
        return REFUSAL_PHRASES
    return read_phrases(generation.phrases) if isinstance(generation.phrases, Path) else generation.phrases


def generation_settings(
    live: LoadedModel, rows: Sequence[Example], markers: Markers | None, generation: GenerationOptions, *, model_id: str
) -> GenerationSettings:
    """Return the settings by which `live` completes `rows`, with the room that the longest leaves.

    Raises:
        SurgeryError: all rows that do not fit the chat template or the markers.
    """
    limit = generation.max_new_tokens
    if limit is None:
        errors, longest = ErrorList(), 0
        for row in rows:
            if row.response is None:
                with errors.collect(f"example {row.key}", usage=True):
                    longest = max(longest, len(encode_before_answer(live.tokenizer, row, markers)[1]))
        errors.raise_if_any(limit=MAX_REPORTED)
        # One limit for all prompts, so that long ones are not cut earlier than short ones.
        limit = remaining_tokens(live.model, longest)
    return GenerationSettings(
        model_id, limit, generation.temperature, generation.seed, generation.batch_size, generation.engine
    )


def prepare(
    live: LoadedModel,
    data: DataSet,
    generation: GenerationOptions,
    *,
    model_id: str,
    cache: Path,
    device: str = "cpu",
    progress: Progress = silent,
) -> PreparedData:
    """Complete, label and tokenise the examples of `data`.

    Args:
        model_id: what cached completions belong to: the hash of the model's weights and its dtype.
        cache: the file of finished completions; a run that was killed continues with it.
        device: of the guard model, if there is one.

    Raises:
        SurgeryError: markers are missing; rows do not fit the model; no example is left with an answer.
    """
    markers = resolve_markers(live, generation)
    label = make_labeler(generation, device=device, progress=progress)
    rows = split_responses(data.examples, markers)
    settings = generation_settings(live, rows, markers, generation, model_id=model_id)
    incomplete = sum(row.response is None or (row.thinking is None and markers is not None) for row in rows)
    completed = complete_examples(live.loaded, rows, markers=markers, cache=cache, settings=settings, progress=progress)
    # Left out rather than labelled: without an answer there is neither a refusal nor a compliance.
    unfinished = {example.key for example in never_closed(completed)}
    examples = label([example for example in completed if example.key not in unfinished])
    if not examples:
        raise SurgeryError(
            f"none of its {len(completed)} examples came to an answer: their thinking never closed within "
            f"{settings.max_new_tokens} tokens",
            where=data.ref,
            hint="Raise --max-new-tokens as far as the model's context allows.",
        )
    max_tokens = context_length(live.model)
    sequences = build_sequences(live.tokenizer, examples, markers, max_tokens=max_tokens, where=data.ref)
    left_out = tuple(example for example in completed if example.key in unfinished)
    examples = [without_idle_literals(live.tokenizer, example, markers) for example in examples]
    return PreparedData(tuple(examples), tuple(sequences), markers, left_out, incomplete)


def model_record(live: LoadedModel, weights_hash: str) -> ModelRecord:
    """Return the record of a model in findings; `weights_hash` is the hash of all its weights."""
    checkpoint = live.checkpoint
    return ModelRecord(
        ref=checkpoint.ref,
        repo_id=checkpoint.repo_id,
        revision=checkpoint.revision,
        xxh3=weights_hash,
        tokenizer=tokenizer_hash(live.tokenizer),
        template=template_hash(live.tokenizer),
        dtype=str(live.model.dtype).removeprefix("torch."),
    )


def data_record(data: DataSet) -> DataRecord:
    """Return the record of a data set in findings."""
    return DataRecord(ref=data.ref, revision=data.revision, xxh3=data.digest)
