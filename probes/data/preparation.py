"""Rows of data made ready for probing: completed by the model, cut at its markers, judged, and turned into tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from probes.data.examples import MAX_REPORTED, DataSet, Example, TokenSequence
from probes.data.generation import GenerationSettings, complete_examples, context_length, remaining_tokens
from probes.data.labels import REFUSAL_PHRASES, label_by_guard, label_by_keywords, read_phrases
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
from probes.data.tokenization import build_sequences, encode, template_hash, text_before_answer, tokenizer_hash
from surgery.checkpoint.checkpoint import loadable_folder
from surgery.checkpoint.resolve import open_checkpoint
from surgery.checkpoint.tokenizer_files import TOKENIZER_FILES
from surgery.errors import ErrorList, SurgeryError, usage_error
from surgery.io.atomic import commit_folder, partial_path
from surgery.models.loaded_model import LoadedModel, load_with_structure
from surgery.models.loading import ModelAndTokenizer, load_model
from surgery.runtime.progress import Progress, silent

# Completions of the data, and of the second data set, until a run is whole.
GENERATIONS = "generations.jsonl"
CACHES = (GENERATIONS, f"transfer-{GENERATIONS}")


@dataclass(frozen=True)
class GenerationOptions:
    """How a model is asked for what the data lack, and how its answers are judged.

    Args:
        think_open, think_close: the markers around its thinking; None finds them.
        no_thinking: the model does not think: answers follow the prompt.
        max_new_tokens, temperature, seed, batch_size, engine: of generation; see `GenerationSettings`. None: 1,024 new
            tokens, or what the model's context leaves the longest prompt.
        phrases: phrases that mark a refusal, or a file with one per line; None for the documented list.
        guard: a guard model that judges answers instead.
    """

    think_open: str | None = None
    think_close: str | None = None
    no_thinking: bool = False
    max_new_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 16
    engine: Literal["transformers", "vllm"] = "transformers"
    phrases: Path | Sequence[str] | None = None
    guard: str | None = None


def options_from_findings(settings: Mapping[str, Any]) -> GenerationOptions:
    """The `GenerationOptions` that a run was made with, from its findings' settings."""
    return GenerationOptions(**settings["asking"])


@dataclass(frozen=True)
class PreparedData:
    """Examples with thinking, response and verdict, and their tokens, in the order of the data.

    markers: None where the model does not think. unfinished: examples whose thinking never closed; they are left out.
    generated: how many were completed by the model.
    """

    examples: tuple[Example, ...]
    sequences: tuple[TokenSequence, ...]
    markers: Markers | None
    unfinished: tuple[Example, ...]
    generated: int


def open_model(ref: str | Path, *, device: str = "cpu", dtype: str = "auto", name: str | None = None) -> LoadedModel:
    """`live.open_live`, once it is clear that there is a tokenizer beside the weights.

    Raises:
        SurgeryError: there is none; else as `load_with_structure`.
    """
    checkpoint = open_checkpoint(ref)
    if not {path.name for path in checkpoint.side_files} & set(TOKENIZER_FILES):
        raise usage_error(
            "has no tokenizer beside its weights", where=name or ref, hint="Copy its tokenizer.json into the folder."
        )
    return load_with_structure(ref, device=device, dtype=dtype, name=name)


def resolve_markers(live: LoadedModel, asking: GenerationOptions) -> Markers | None:
    """The model's thinking markers; None where it is said not to think. Raises SurgeryError where none are found."""
    if asking.no_thinking:
        if asking.think_open is not None or asking.think_close is not None:
            raise usage_error(
                f"{NONE_OPTION} says that there are no markers, {OPEN_OPTION} or {CLOSE_OPTION} names one."
            )
        return None
    return find_markers(live.tokenizer, opening=asking.think_open, closing=asking.think_close, where=live.name)


def make_labeler(
    asking: GenerationOptions, *, device: str, progress: Progress
) -> Callable[[Sequence[Example]], list[Example]]:
    """What fills in missing verdicts. Faults of a phrase file, or of a guard's folder, show at once."""
    if asking.guard is not None:
        if asking.phrases is not None:
            raise usage_error("--guard and --refusal-phrases are two ways to judge: give one of them.")
        name, folder = asking.guard, loadable_folder(open_checkpoint(asking.guard))
        loaded: list[ModelAndTokenizer] = []

        def by_guard(examples: Sequence[Example]) -> list[Example]:
            if not loaded:
                loaded.append(load_model(folder, name, device=device))
            return label_by_guard(examples, loaded[0], batch_size=asking.batch_size, progress=progress)

        return by_guard
    phrases = refusal_phrases(asking)
    return lambda examples: label_by_keywords(examples, phrases)


def refusal_phrases(asking: GenerationOptions) -> Sequence[str]:
    """The phrases that mark a refusal. Raises SurgeryError where their file cannot be read."""
    if asking.phrases is None:
        return REFUSAL_PHRASES
    return read_phrases(asking.phrases) if isinstance(asking.phrases, Path) else asking.phrases


def generation_settings(
    live: LoadedModel, rows: Sequence[Example], markers: Markers | None, asking: GenerationOptions, *, model_id: str
) -> GenerationSettings:
    """How what `rows` lack is generated by `live`. Raises SurgeryError with all rows that cannot be asked."""
    limit = asking.max_new_tokens
    if limit is None:
        errors, longest = ErrorList(), 0
        for row in rows:
            if row.response is None:
                with errors.collect(f"example {row.key}", usage=True):
                    longest = max(
                        longest, len(encode(live.tokenizer, text_before_answer(live.tokenizer, row, markers)))
                    )
        errors.raise_if_any(limit=MAX_REPORTED)
        limit = remaining_tokens(live.model, longest)
    return GenerationSettings(model_id, limit, asking.temperature, asking.seed, asking.batch_size, asking.engine)


def prepare(
    live: LoadedModel,
    data: DataSet,
    asking: GenerationOptions,
    *,
    model_id: str,
    cache: Path,
    device: str = "cpu",
    progress: Progress = silent,
) -> PreparedData:
    """Completes, judges and encodes the examples of `data`.

    Args:
        model_id: what the cached completions belong to: the hash of the model's weights and its dtype.
        cache: the file of finished completions; a run that was killed goes on with it.

    Raises:
        SurgeryError: markers are missing; rows do not fit the model; no example is left with an answer.
    """
    markers = resolve_markers(live, asking)
    judge = make_labeler(asking, device=device, progress=progress)
    rows = split_responses(data.examples, markers)
    settings = generation_settings(live, rows, markers, asking, model_id=model_id)
    missing = sum(row.response is None or (row.thinking is None and markers is not None) for row in rows)
    done = complete_examples(live.loaded, rows, markers=markers, cache=cache, settings=settings, progress=progress)
    lost = {example.key for example in never_closed(done)}
    whole = judge([example for example in done if example.key not in lost])
    if not whole:
        raise SurgeryError(
            f"none of its {len(done)} examples came to an answer: their thinking never closed within "
            f"{settings.max_new_tokens} tokens",
            where=data.ref,
            hint="Raise --max-new-tokens as far as the model's context allows.",
        )
    sequences = build_sequences(live.tokenizer, whole, markers, max_tokens=context_length(live.model), where=data.ref)
    left_out = tuple(example for example in done if example.key in lost)
    return PreparedData(tuple(whole), tuple(sequences), markers, left_out, missing)


def model_record(live: LoadedModel, identity: str) -> ModelRecord:
    """What findings say of a model; `identity` is the hash of its weights."""
    checkpoint = live.checkpoint
    return ModelRecord(
        ref=checkpoint.ref,
        repo_id=checkpoint.repo_id,
        revision=checkpoint.revision,
        xxh3=identity,
        tokenizer=tokenizer_hash(live.tokenizer),
        template=template_hash(live.tokenizer),
        dtype=str(live.model.dtype).removeprefix("torch."),
    )


def data_record(data: DataSet) -> DataRecord:
    """What findings say of a data set."""
    return DataRecord(ref=data.ref, revision=data.revision, xxh3=data.digest)


@contextmanager
def run_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """The folder in which a run is written; at the end of the block it is made durable, and becomes `out`.

    What a run that was killed while writing left in it is removed first, but for the completions, and these last.
    """
    partial = partial_path(out)
    partial.mkdir(parents=True, exist_ok=True)
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in CACHES:
            path.unlink()
    yield partial
    for name in CACHES:
        (partial / name).unlink(missing_ok=True)
    commit_folder(partial, out, overwrite=overwrite)
