"""Complete examples with the thinking and responses that the model itself generates.

Completions are cached on disk, so that a killed run continues where it stopped. How they are generated is the work of
`probes.data.generation_engines`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from probes.data.examples import MAX_REPORTED, Example
from probes.data.generation_cache import Completion, GenerationCache
from probes.data.generation_engines import GenerationSettings, Request, make_engine
from probes.data.markers import Markers, never_closed, split_completion, split_responses, validate_split
from probes.data.tokenization import encode_before_answer
from surgery.errors import ErrorList, usage_error
from surgery.models.loading import ModelAndTokenizer
from surgery.runtime.collectives import barrier, map_over_ranks
from surgery.runtime.progress import Progress, silent
from surgery.runtime.quiet_libraries import quiet

# Tokens of thinking and response together, unless the user sets a limit.
DEFAULT_MAX_NEW_TOKENS = 1024


def complete_examples(
    loaded: ModelAndTokenizer,
    examples: Sequence[Example],
    *,
    markers: Markers | None,
    cache: Path,
    settings: GenerationSettings,
    progress: Progress = silent,
) -> list[Example]:
    """Return the examples with the thinking and responses that they lacked, in their order.

    A missing response is generated after the given thinking and the closing template. If the thinking is missing too,
    the generated text is split at the closing marker, whose white space is kept. An example that does not close its
    thinking before it ends or reaches `max_new_tokens` gets closing and response `""`: `never_closed` lists these, and
    callers must count them and leave them out. Given responses that contain their thinking are split; other examples
    are returned as they are.

    Equal prompts share one completion. Under `accelerate launch` the processes share the batches, and each gets all
    results; `vllm` runs in one process, loads the folder that the tokenizer is from, and does not use `loaded.model`.

    Args:
        cache: a file of completions; created, with its folder, if it does not exist.

    Raises:
        SurgeryError: all examples that cannot be completed: the conversation does not fit the chat template, the
            context has no room for `max_new_tokens` more, a response came without its thinking; or vLLM is missing, or
            the memory too small.
    """
    # First, so that a given response with its thinking inside counts as complete.
    examples = split_responses(examples, markers)
    requests = _requests(loaded, examples, markers, settings)
    store = GenerationCache(cache)
    completions: dict[str, Completion] = {}
    missing: dict[str, Request] = {}
    for request in requests.values():
        if (cached := store.get(request.key)) is not None:
            completions[request.key] = cached
        else:
            missing[request.key] = request
    barrier()  # all processes must have seen the same cache before one of them adds to it
    if missing:
        completions |= _generate(loaded, list(missing.values()), store, settings, progress)
    return [
        _completed(example, markers, completions[requests[index].key]) if index in requests else example
        for index, example in enumerate(examples)
    ]


def generate_texts(
    loaded: ModelAndTokenizer,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_new_tokens: int,
    batch_size: int,
    label: str,
    progress: Progress = silent,
) -> list[str]:
    """Return the greedy continuation of each prompt (token ids), as text without its end token.

    Raises:
        SurgeryError: a batch does not fit the memory.
    """
    requests = [Request(str(number), ids) for number, ids in enumerate(prompts)]
    settings = GenerationSettings(loaded.name, max_new_tokens=max_new_tokens, batch_size=batch_size)
    completions = _generate(loaded, requests, None, settings, progress, label=label)
    return [completions[request.key].text for request in requests]


def context_length(model: Any) -> int | None:
    """Return how many tokens the model reads; None if its config does not say."""
    config = getattr(model, "config", None)
    return None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)


def remaining_tokens(model: Any, prompt: int, limit: int = DEFAULT_MAX_NEW_TOKENS) -> int:
    """Return how many tokens may follow a prompt of `prompt` tokens: `limit`, or what the model's context leaves."""
    context = context_length(model)
    # At least 1: a prompt that fills the context is reported where it is encoded, not as a wrong limit.
    return limit if context is None else max(1, min(limit, context - prompt))


def end_token_ids(loaded: ModelAndTokenizer) -> tuple[int, ...]:
    """Return the tokens that end a completion: those of the generation config, and the tokenizer's."""
    config = getattr(loaded.model, "generation_config", None)
    # A number, a list or None: chat models often have a second end token that their tokenizer does not declare.
    configured = getattr(config, "eos_token_id", None)
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    return tuple(sorted({int(token) for token in (*ids, loaded.tokenizer.eos_token_id) if token is not None}))


def _requests(
    loaded: ModelAndTokenizer, examples: Sequence[Example], markers: Markers | None, settings: GenerationSettings
) -> dict[int, Request]:
    """Return, by the example's number, the prompts to complete. Raises SurgeryError for all wrong ones."""
    context = context_length(loaded.model)
    errors = ErrorList()
    requests = {}
    with quiet():
        for index, example in enumerate(examples):
            with errors.collect(f"example {example.key}", usage=True):
                # A thinking that never closed is a known outcome, not an error of the data.
                if markers and not never_closed([example]):
                    validate_split(example, markers)
                if example.response is not None:
                    continue
                text, ids = encode_before_answer(loaded.tokenizer, example, markers)
                if not ids:
                    raise usage_error("its prompt has no tokens")
                if context is not None and len(ids) + settings.max_new_tokens > context:
                    raise usage_error(
                        f"has {len(ids):,} tokens, and {settings.max_new_tokens:,} more do not fit the model's "
                        f"context of {context:,}",
                        hint="Leave it out, or ask for fewer new tokens.",
                    )
                requests[index] = Request(settings.key(text), ids)
    errors.raise_if_any(limit=MAX_REPORTED)
    return requests


def _completed(example: Example, markers: Markers | None, completion: Completion) -> Example:
    # What the model writes has its own tokens in it.
    given = ("messages",) if example.thinking is None else ("messages", "thinking", "closing")
    example = replace(example, literal=tuple(name for name in example.literal if name in given))
    if markers is None:
        return replace(example, response=completion.text)
    # The prompt ended with the closing template: the text is the response alone.
    if example.thinking is not None:
        return replace(example, closing=example.closing or markers.closing, response=completion.text)
    thinking, closing, response = split_completion(completion.text, markers)
    return replace(example, thinking=thinking, closing=closing, response=response)


def _generate(
    loaded: ModelAndTokenizer,
    requests: Sequence[Request],
    store: GenerationCache | None,
    settings: GenerationSettings,
    progress: Progress,
    *,
    label: str | None = None,
) -> dict[str, Completion]:
    """Return the completions by key; each batch is added to `store` once it is finished."""
    stop_ids = end_token_ids(loaded)
    complete_batch = make_engine(loaded, settings, stop_ids)
    # The longest first: what does not fit the memory fails at once, not after hours.
    order = sorted(requests, key=lambda request: (-len(request.ids), request.key))
    size = settings.prompts_per_batch
    batches = [order[start : start + size] for start in range(0, len(order), size)]

    def generate_batch(batch: Sequence[Request]) -> dict[str, Completion]:
        completions = {}
        for request, new_ids in zip(batch, complete_batch(batch), strict=True):
            end = next((index for index, token in enumerate(new_ids) if token in stop_ids), None)
            text = _text_after(loaded.tokenizer, request.ids, new_ids[:end])
            completions[request.key] = Completion(text, end is not None)
        # Stored batch by batch: a killed run loses one batch at most.
        if store:
            store.add(completions)
        return completions

    label = label or f"{loaded.name}: completing"
    results = map_over_ranks(batches, generate_batch, label=label, size=len, progress=progress)
    return {key: completion for completions in results for key, completion in completions.items()}


def _text_after(tokenizer: Any, prompt: Sequence[int], new_ids: Sequence[int]) -> str:
    """Return the text of `new_ids`, decoded after the prompt: decoded alone it could lose a space at its beginning."""

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    # Decoding may merge bytes across the border; then the new ids are decoded alone after all.
    before, whole = decode(prompt), decode([*prompt, *new_ids])
    return whole[len(before) :] if whole.startswith(before) else decode(new_ids)
