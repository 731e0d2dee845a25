"""Engines that complete prompts token by token: transformers, and vLLM.

Batches contain prompts of similar length, padded on the left. At temperature 0 every token is the likeliest one; of a
model's generation_config.json only the end tokens are used, not its temperature, top_p or penalties: the same settings
must mean the same for every model.

Shapes: N prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from probes.data.choices import Engine
from surgery.checkpoint.checkpoint import read_folder
from surgery.errors import SurgeryError, usage_error
from surgery.io.hashing import hash_text
from surgery.models.loading import ModelAndTokenizer
from surgery.models.staging import keep_while_used, stage_model
from surgery.runtime.environment import n_processes
from surgery.runtime.quiet_libraries import quiet

# vLLM makes batches of its own, and is fast only with many prompts at a time.
VLLM_PROMPTS = 256


@dataclass(frozen=True)
class GenerationSettings:
    """Everything that decides how a prompt is completed.

    model_id: identifies the model in the cache, by reference and hash: completions of another model are not reused.
    max_new_tokens: of thinking and response together.
    temperature: 0 takes the likeliest token; above it tokens are drawn from softmax(logits / temperature).
    seed: of the draws. Each prompt has its own generator, seeded by (seed, prompt): batches do not change the draws.
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

    @property
    def prompts_per_batch(self) -> int:
        """How many prompts the engine is given at a time."""
        return max(self.batch_size, VLLM_PROMPTS) if self.engine == "vllm" else self.batch_size

    def key(self, prompt: str) -> str:
        """Return the key of the completion of `prompt` in the cache: a hash of all that the completion depends on."""
        # At temperature 0 nothing is drawn, so the seed must not separate equal completions.
        drawn = (self.temperature, self.seed) if self.temperature else (0.0, 0)
        return hash_text(repr((self.model_id, self.engine, self.max_new_tokens, *drawn, prompt)))


@dataclass(frozen=True)
class Request:
    """A prompt to complete: token ids, and the key of its completion in the cache."""

    key: str
    ids: tuple[int, ...]


# A batch of requests → the new tokens of each, up to the first end token or the limit.
CompleteBatch = Callable[[Sequence[Request]], list[list[int]]]


def make_engine(loaded: ModelAndTokenizer, settings: GenerationSettings, stop_ids: Sequence[int]) -> CompleteBatch:
    """Return the function that completes a batch of prompts.

    Raises:
        SurgeryError: vLLM is not installed, or several processes run; later, a batch does not fit the memory.
    """
    if settings.engine == "vllm":
        return _vllm_engine(loaded, settings, stop_ids)
    return _transformers_engine(loaded, settings, stop_ids)


def _transformers_engine(
    loaded: ModelAndTokenizer, settings: GenerationSettings, stop_ids: Sequence[int]
) -> CompleteBatch:
    from transformers import GenerationConfig

    pad = loaded.tokenizer.pad_token_id
    # Any token will do: padding is masked before the prompt, and cut off behind an end token.
    pad = next(iter(stop_ids), 0) if pad is None else pad
    # Never `do_sample`: transformers draws from one generator per batch, so results would depend on the batches.
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens, do_sample=False, eos_token_id=list(stop_ids) or None, pad_token_id=pad
    )

    def complete_batch(batch: Sequence[Request]) -> list[list[int]]:
        ids_NT, mask_NT = _left_padded([request.ids for request in batch], pad)
        sampler = [_GumbelSampler(settings, [request.key for request in batch])] if settings.temperature else []
        model = loaded.model
        try:
            with torch.inference_mode(), quiet(), _generation_config(model, config):
                output = model.generate(
                    ids_NT.to(model.device), attention_mask=mask_NT.to(model.device), logits_processor=sampler
                )
        except torch.OutOfMemoryError as error:
            raise SurgeryError(
                f"{len(batch)} prompts of {ids_NT.shape[1]:,} tokens do not fit the memory",
                where=loaded.name,
                hint="Take a smaller batch size; what is finished is kept.",
            ) from error
        new_ids: list[list[int]] = output[:, ids_NT.shape[1] :].tolist()
        return new_ids

    return complete_batch


def _vllm_engine(loaded: ModelAndTokenizer, settings: GenerationSettings, stop_ids: Sequence[int]) -> CompleteBatch:
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise usage_error("vllm is not installed", where="engine", hint="Install it: pip install vllm") from error
    if n_processes() > 1:
        raise usage_error("vllm makes processes of its own", where="engine", hint="Start it in one process.")
    # vLLM cannot take a loaded model: it reads the folder again, with kernels of its own.
    staged = stage_model(read_folder(Path(loaded.tokenizer.name_or_path)))
    engine = LLM(model=str(staged), seed=settings.seed, load_format="safetensors", trust_remote_code=False)
    keep_while_used(engine, staged)

    def complete_batch(batch: Sequence[Request]) -> list[list[int]]:
        sampling = [
            SamplingParams(
                temperature=settings.temperature,
                max_tokens=settings.max_new_tokens,
                seed=_seed(settings, request.key) if settings.temperature else None,
                stop_token_ids=list(stop_ids),
                detokenize=False,
            )
            for request in batch
        ]
        prompts = [{"prompt_token_ids": list(request.ids)} for request in batch]
        return [list(output.outputs[0].token_ids) for output in engine.generate(prompts, sampling, use_tqdm=False)]

    return complete_batch


class _GumbelSampler:
    """A logits processor that turns the argmax into a draw: argmax(logits / τ + g), g ~ Gumbel(0, 1), is a draw from
    softmax(logits / τ).

    Every prompt draws from a generator of its own, on the CPU, so that neither batches nor devices change the draws.
    """

    def __init__(self, settings: GenerationSettings, keys: Sequence[str]) -> None:
        self.temperature = settings.temperature
        self.generators = [torch.Generator().manual_seed(_seed(settings, key)) for key in keys]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(N, T) ids and (N, V) logits → (N, V)."""
        # On the CPU: generators of different devices draw different numbers.
        noise = torch.empty(scores.shape)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        # −log of an exponential variable is a Gumbel variable.
        return scores.float() / self.temperature - noise.log().to(scores.device)


def _seed(settings: GenerationSettings, key: str) -> int:
    return int(hash_text(f"{settings.seed} {key}")[:15], 16)  # 60 bits: both torch and vLLM take so large a seed


@contextmanager
def _generation_config(model: Any, config: Any) -> Iterator[None]:
    """Make `config` the model's own generation config in the block.

    Passed to generate() it would not be enough: what a config leaves open is filled in from the model's own.
    """
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask of N prompts, both (N, T) int64."""
    width = max(map(len, prompts))
    ids_NT = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask_NT = torch.zeros_like(ids_NT)
    for row, prompt in enumerate(prompts):
        ids_NT[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_NT[row, width - len(prompt) :] = 1
    return ids_NT, mask_NT
