"""What examples lack of thinking and response, written by the model itself; cached, so that a killed run goes on.

In come a model, its markers and examples; out come the examples with thinking, closing template and response. Batches
hold prompts of like length, padded on the left. With temperature 0 every token is the likeliest one; whatever else a
model's generation_config.json says (temperature, top_p, penalties) is not applied, only its end tokens are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from probes.data.examples import MAX_REPORTED, Example
from probes.data.generation_cache import Completion, GenerationCache
from probes.data.markers import Markers, never_closed, split_completion, split_responses, validate_split
from probes.data.tokenization import encode, text_before_answer
from surgery.errors import ErrorList, SurgeryError, usage_error
from surgery.io.hashing import hash_text
from surgery.models.loading import ModelAndTokenizer
from surgery.runtime.collectives import barrier, map_over_ranks
from surgery.runtime.environment import n_processes
from surgery.runtime.progress import Progress, silent
from surgery.runtime.quiet import quiet

Engine = Literal["transformers", "vllm"]
# Where nobody says how long thinking and response may be together.
DEFAULT_MAX_NEW_TOKENS = 1024
# vLLM makes batches of its own, and is fast only with many prompts at a time.
VLLM_PROMPTS = 256


@dataclass(frozen=True)
class GenerationSettings:
    """How completions are made.

    model_id: names the model in the cache: its reference and hash, so that another model's are not taken for its own.
    max_new_tokens: of thinking and response together.
    temperature: 0 takes the likeliest token; above it tokens are drawn from softmax(logits / temperature).
    seed: of the draws. Each prompt has its own generator, seeded by (seed, prompt), so that batches change nothing.
    batch_size: prompts at a time; vLLM chooses for itself.

    Raises:
        SurgeryError: a value is out of its range.
    """

    model_id: str
    max_new_tokens: int = 1024
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 16
    engine: Engine = "transformers"

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise usage_error(f"got {getattr(self, name)}, expected {least} or more", where=name)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise usage_error(f"got {self.temperature}, expected 0 or more", where="temperature")
        if self.engine not in get_args(Engine):
            raise usage_error(f"got {self.engine!r}, expected {' or '.join(get_args(Engine))}", where="engine")

    def key(self, prompt: str) -> str:
        """What the completion of `prompt` is cached by: all that it depends on."""
        drawn = (self.temperature, self.seed) if self.temperature else (0.0, 0)
        return hash_text(repr((self.model_id, self.engine, self.max_new_tokens, *drawn, prompt)))


@dataclass(frozen=True)
class _Job:
    """A prompt to be completed; `key` is what its completion is cached by."""

    key: str
    ids: tuple[int, ...]


# Prompts → the new tokens of each, with the end token if it came to one.
_Complete = Callable[[Sequence[_Job]], list[list[int]]]


def complete_examples(
    loaded: ModelAndTokenizer,
    examples: Sequence[Example],
    *,
    markers: Markers | None,
    cache: Path,
    settings: GenerationSettings,
    progress: Progress = silent,
) -> list[Example]:
    """Examples with what they lacked, in their order.

    A missing response is written by the model, after the thinking and closing template where a thinking is given. Where
    it lacks too, the text is split at the closing marker, whose white space is kept. An example that never closes its
    thinking before it ends or reaches `max_new_tokens` gets closing and response `""`: `never_closed` lists these, and
    they are to be counted and left out. Responses that are given with their thinking are split, others are kept.

    Equal prompts share one completion. Under `accelerate launch` the processes share the batches, and each gets all
    results; `vllm` runs in one process, loads the folder that the tokenizer is from, and needs no `loaded.model`.

    Args:
        cache: a file of completions, made if need be; its folder too.

    Raises:
        SurgeryError: all examples that cannot be completed: the conversation does not fit the chat template, the
            context has no room for `max_new_tokens` more, a response came without its thinking; or vLLM is missing, or
            the memory too small.
    """
    found = split_responses(examples, markers)
    jobs = _jobs(loaded, found, markers, settings)
    store = GenerationCache(cache)
    missing = {job.key: job for job in jobs.values() if store.get(job.key) is None}
    made = {job.key: kept for job in jobs.values() if (kept := store.get(job.key))}
    barrier()  # all processes must have seen the same cache before one of them adds to it
    if missing:
        made |= _make(loaded, list(missing.values()), store, settings, progress)
    return [
        _filled(example, markers, made[jobs[at].key]) if at in jobs else example for at, example in enumerate(found)
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
    """The likeliest continuation of each prompt (token ids), token by token, as text without its end token.

    Raises:
        SurgeryError: a batch does not fit the memory.
    """
    jobs = [_Job(str(number), ids) for number, ids in enumerate(prompts)]
    settings = GenerationSettings(loaded.name, max_new_tokens=max_new_tokens, batch_size=batch_size)
    made = _make(loaded, jobs, None, settings, progress, label=label)
    return [made[job.key].text for job in jobs]


def context_length(model: Any) -> int | None:
    """How many tokens the model reads, None where nobody says."""
    config = getattr(model, "config", None)
    return None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)


def remaining_tokens(model: Any, prompt: int, most: int = DEFAULT_MAX_NEW_TOKENS) -> int:
    """How many tokens may follow a prompt of `prompt` tokens: `most`, or what the model's context has left."""
    context = context_length(model)
    return most if context is None else max(1, min(most, context - prompt))


def _jobs(
    loaded: ModelAndTokenizer, examples: Sequence[Example], markers: Markers | None, settings: GenerationSettings
) -> dict[int, _Job]:
    """Number of the example → what is to be completed for it. Raises SurgeryError with all examples that are wrong."""
    context = context_length(loaded.model)
    errors = ErrorList()
    jobs = {}
    with quiet():
        for at, example in enumerate(examples):
            with errors.collect(f"example {example.key}", usage=True):
                if markers and not never_closed([example]):
                    validate_split(example, markers)
                if example.response is not None:
                    continue
                text = text_before_answer(loaded.tokenizer, example, markers)
                ids = encode(loaded.tokenizer, text)
                if not ids:
                    raise usage_error("its prompt has no tokens")
                if context is not None and len(ids) + settings.max_new_tokens > context:
                    raise usage_error(
                        f"has {len(ids):,} tokens, and {settings.max_new_tokens:,} more do not fit the model's "
                        f"context of {context:,}",
                        hint="Leave it out, or ask for fewer new tokens.",
                    )
                jobs[at] = _Job(settings.key(text), ids)
    errors.raise_if_any(limit=MAX_REPORTED)
    return jobs


def _filled(example: Example, markers: Markers | None, made: Completion) -> Example:
    if markers is None:
        return replace(example, response=made.text)
    if example.thinking is not None:
        return replace(example, closing=example.closing or markers.closing, response=made.text)
    thinking, closing, response = split_completion(made.text, markers)
    return replace(example, thinking=thinking, closing=closing, response=response)


def _make(
    loaded: ModelAndTokenizer,
    jobs: Sequence[_Job],
    store: GenerationCache | None,
    settings: GenerationSettings,
    progress: Progress,
    *,
    label: str | None = None,
) -> dict[str, Completion]:
    stops = end_token_ids(loaded)
    work = _with_vllm(loaded, settings, stops) if settings.engine == "vllm" else _with_model(loaded, settings, stops)
    size = max(settings.batch_size, VLLM_PROMPTS) if settings.engine == "vllm" else settings.batch_size
    # The longest first: what does not fit the memory shows at once.
    order = sorted(jobs, key=lambda job: (-len(job.ids), job.key))
    batches = [order[start : start + size] for start in range(0, len(order), size)]

    def run(batch: Sequence[_Job]) -> dict[str, Completion]:
        made = {}
        for job, new in zip(batch, work(batch), strict=True):
            end = next((at for at, token in enumerate(new) if token in stops), None)
            made[job.key] = Completion(_text_after(loaded.tokenizer, job.ids, new[:end]), end is not None)
        if store:
            store.add(made)
        return made

    done = map_over_ranks(batches, run, label=label or f"{loaded.name}: completing", size=len, progress=progress)
    return {key: completion for made in done for key, completion in made.items()}


def _with_model(loaded: ModelAndTokenizer, settings: GenerationSettings, stops: Sequence[int]) -> _Complete:
    from transformers import GenerationConfig

    pad = loaded.tokenizer.pad_token_id
    pad = next(iter(stops), 0) if pad is None else pad  # any token will do: it is masked, and cut off behind an end
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens, do_sample=False, eos_token_id=list(stops) or None, pad_token_id=pad
    )

    def work(batch: Sequence[_Job]) -> list[list[int]]:
        ids_NT, mask_NT = _left_padded([job.ids for job in batch], pad)
        draw = [_Draw(settings, [job.key for job in batch])] if settings.temperature else []
        model = loaded.model
        try:
            with torch.inference_mode(), quiet(), _configured(model, config):
                found = model.generate(
                    ids_NT.to(model.device), attention_mask=mask_NT.to(model.device), logits_processor=draw
                )
        except torch.OutOfMemoryError as error:
            raise SurgeryError(
                f"{len(batch)} prompts of {ids_NT.shape[1]:,} tokens do not fit the memory",
                where=loaded.name,
                hint="Take a smaller batch size; what is finished is kept.",
            ) from error
        rows: list[list[int]] = found[:, ids_NT.shape[1] :].tolist()
        return rows

    return work


def _with_vllm(loaded: ModelAndTokenizer, settings: GenerationSettings, stops: Sequence[int]) -> _Complete:
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise usage_error("vllm is not installed", where="engine", hint="Install it: pip install vllm") from error
    if n_processes() > 1:
        raise usage_error("vllm makes processes of its own", where="engine", hint="Start it in one process.")
    engine = LLM(model=loaded.tokenizer.name_or_path, seed=settings.seed)

    def work(batch: Sequence[_Job]) -> list[list[int]]:
        asked = [
            SamplingParams(
                temperature=settings.temperature,
                max_tokens=settings.max_new_tokens,
                seed=_seed(settings, job.key) if settings.temperature else None,
                stop_token_ids=list(stops),
                detokenize=False,
            )
            for job in batch
        ]
        prompts = [{"prompt_token_ids": list(job.ids)} for job in batch]
        return [list(found.outputs[0].token_ids) for found in engine.generate(prompts, asked, use_tqdm=False)]

    return work


class _Draw:
    """Makes the likeliest token a draw: argmax(logits / τ + g), g from Gumbel(0, 1), is one from softmax(logits / τ).

    Every prompt draws from a generator of its own, on the CPU, so that neither batches nor devices change the draws.
    """

    def __init__(self, settings: GenerationSettings, keys: Sequence[str]) -> None:
        self.temperature = settings.temperature
        self.generators = [torch.Generator().manual_seed(_seed(settings, key)) for key in keys]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(N, T) ids and (N, V) logits → (N, V)."""
        noise = torch.empty(scores.shape)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self.temperature - noise.log().to(scores.device)


def _seed(settings: GenerationSettings, key: str) -> int:
    return int(hash_text(f"{settings.seed} {key}")[:15], 16)  # 60 bits: what both torch and vLLM take


@contextmanager
def _configured(model: Any, config: Any) -> Iterator[None]:
    """Within, `model` generates by `config` alone: generate() fills what a config leaves open from the model's own."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """N prompts → ids and mask, both (N, T) int64."""
    width = max(map(len, prompts))
    ids_NT = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask_NT = torch.zeros_like(ids_NT)
    for row, prompt in enumerate(prompts):
        ids_NT[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_NT[row, width - len(prompt) :] = 1
    return ids_NT, mask_NT


def _text_after(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of `new`. Decoded alone it could lose a space at its beginning."""

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    before, whole = decode(prompt), decode([*prompt, *new])
    return whole[len(before) :] if whole.startswith(before) else decode(new)


def end_token_ids(loaded: ModelAndTokenizer) -> tuple[int, ...]:
    """The tokens that end a completion: the generation config's, and the tokenizer's."""
    config = getattr(loaded.model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ids = named if isinstance(named, (list, tuple)) else [named]
    return tuple(sorted({int(token) for token in (*ids, loaded.tokenizer.eos_token_id) if token is not None}))
