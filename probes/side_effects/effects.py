"""What an edit does to a model besides what it is for: refusals, divergence from the original, perplexity.

In come two subjects (a model, with or without heads ablated) and sequences with the original's own answers; out come
refusal rates by topic with Wilson intervals, KL(original ‖ edited) over the answers' first tokens, and the perplexity
of those answers under both.

Shapes: N sequences, T tokens, M answer tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probes.data.examples import Example, TokenSequence
from probes.data.generation import generate_texts
from probes.model.ablation import ablated_heads
from probes.model.activations import CPU_TOKENS, TokenBatch, make_batches
from surgery.checkpoint.selectors import Head
from surgery.errors import SurgeryError
from surgery.evaluation.statistics import EstimateWithInterval, Floats, bootstrap_mean, wilson_interval
from surgery.models.loaded_model import LoadedModel
from surgery.runtime.collectives import map_over_ranks
from surgery.runtime.progress import Progress, silent

TOKENS = 32  # of an answer that KL is taken over
ANSWER_TOKENS = 32  # enough to see whether an answer refuses
ANSWERS = 16  # at a time


@dataclass(frozen=True)
class ComparedModel:
    """A model, with heads scaled while it runs; none for the model as it is."""

    live: LoadedModel
    scales: Mapping[Head, float] = field(default_factory=dict)
    means: Mapping[int, Tensor] | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """The edit is on inside."""
        with ablated_heads(self.live, self.scales, self.means):
            yield


@dataclass(frozen=True)
class Rate:
    """A share of examples with Wilson's 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, flags: Sequence[bool]) -> Rate:
        """The share of `flags` that are true; NaN of none."""
        if not flags:
            return cls(math.nan, math.nan, math.nan, 0)
        low, high = wilson_interval(float(sum(flags)), len(flags))
        return cls(sum(flags) / len(flags), low, high, len(flags))


@dataclass(frozen=True, eq=False)
class Divergence:
    """Per example, over the answer's first tokens: mean KL(original ‖ edited) in nats per token, summed negative
    log-likelihoods of those tokens under both, and how many tokens: each (N,)."""

    kl: Floats
    nll_before: Floats
    nll_after: Floats
    tokens: Floats

    def mean_kl(self, groups: Sequence[str]) -> EstimateWithInterval:
        """The mean over examples with a bootstrap interval over groups."""
        band = bootstrap_mean(self.kl[:, None], groups=groups)
        return EstimateWithInterval(float(band.mean[0]), float(band.low[0]), float(band.high[0]))

    @property
    def perplexities(self) -> tuple[float, float]:
        """e^(mean negative log-likelihood of a token), of the original and of the edited model."""
        total = float(self.tokens.sum())
        return math.exp(float(self.nll_before.sum()) / total), math.exp(float(self.nll_after.sum()) / total)


def measure_divergence(
    before: ComparedModel,
    afters: Mapping[str, ComparedModel],
    sequences: Sequence[TokenSequence],
    *,
    tokens: int = TOKENS,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> dict[str, Divergence]:
    """How far each of `afters` is from `before` on the first `tokens` tokens of the answers in `sequences`.

    Sequences without an answer must be left out. The original's logits are made once per batch and shared.

    Raises:
        SurgeryError: a sequence has no answer, there is none at all, or the logits are not finite.
    """
    if not sequences:
        raise SurgeryError("no answer is left to compare on", where=before.live.name)
    cut = [sequence.ids[: min(sequence.ends[2] + tokens, sequence.ends[3])] for sequence in sequences]
    answers = [len(ids) - sequence.ends[2] for ids, sequence in zip(cut, sequences, strict=True)]
    if 0 in answers:
        raise SurgeryError("has no answer to compare on", where=sequences[answers.index(0)].key)
    batches = make_batches(cut, max_tokens=max_tokens or CPU_TOKENS, padding="left")
    work = partial(_compare, before, afters, answers)
    found = map_over_ranks(
        batches, work, label="Comparing answers", size=lambda batch: len(batch.numbers), progress=progress
    )
    order = np.argsort([number for batch in batches for number in batch.numbers])
    return {
        name: Divergence(*(np.concatenate([part[name][at] for part in found])[order] for at in range(4)))
        for name in afters
    }


def greedy_answers(
    subject: ComparedModel,
    sequences: Sequence[TokenSequence],
    *,
    tokens: int = ANSWER_TOKENS,
    progress: Progress = silent,
) -> list[str]:
    """What the subject answers, greedily, behind the given thinking and closing template: `tokens` tokens at most."""
    with subject.active():
        return generate_texts(
            subject.live.loaded,
            [sequence.before_answer for sequence in sequences],
            max_new_tokens=tokens,
            batch_size=ANSWERS,
            label="Answering",
            progress=progress,
        )


def refusal_rates(examples: Sequence[Example]) -> dict[str, Rate]:
    """Topic → the share of its examples that are refused, of those with a verdict."""
    topics = sorted({example.topic for example in examples if example.topic})
    return {
        topic: Rate.of([bool(e.refused) for e in examples if e.topic == topic and e.refused is not None])
        for topic in topics
    }


@torch.inference_mode()
def _compare(
    before: ComparedModel, afters: Mapping[str, ComparedModel], answers: Sequence[int], batch: TokenBatch
) -> dict[str, tuple[Floats, Floats, Floats, Floats]]:
    counts = [answers[number] for number in batch.numbers]
    original = _answer_logits(before, batch, max(counts))
    found = {}
    for name, after in afters.items():
        edited = _answer_logits(after, batch, max(counts))
        rows = []
        for row, count in enumerate(counts):
            targets = batch.ids[row, -count:].to(original.device)
            p, q = original[row, -count - 1 : -1].double(), edited[row, -count - 1 : -1].double().to(original.device)
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            # Tokens that the model rules out (a logit of -inf) add nothing; -inf - -inf would be NaN.
            kl = torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1).mean()
            losses = [-x.gather(-1, targets[:, None]).sum() for x in (p, q)]
            rows.append([float(kl), float(losses[0]), float(losses[1]), float(count)])
            if math.isnan(sum(rows[-1])):  # no budget would ever stop a NaN
                raise SurgeryError(
                    f"the logits of {name} are not numbers", where=before.live.name, hint="Try --dtype float32."
                )
        columns = np.array(rows, dtype=np.float64).T
        found[name] = (columns[0], columns[1], columns[2], columns[3])
    return found


def _answer_logits(subject: ComparedModel, batch: TokenBatch, count: int) -> Tensor:
    """(N, count + 1, V): the logits at the last positions, those before each answer token among them."""
    live = subject.live
    with subject.active():
        output: Any = live.model(**batch.inputs(live.device), use_cache=False, logits_to_keep=count + 1)
    logits = output.logits
    assert isinstance(logits, Tensor)
    return logits
