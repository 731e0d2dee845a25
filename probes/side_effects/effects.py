"""Measure side effects of an edit: refusal rates, KL divergence from the original model, perplexity.

Models are compared on sequences with the original's own answers: KL(original ‖ edited) over the first tokens of the
answers, and the perplexity of those tokens under both. A model may run with heads ablated, without an edited copy.

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

KL_TOKENS = 32  # of an answer: whether it refuses shows at its start, and each token costs V logits
ANSWER_TOKENS = 32  # enough to see whether an answer refuses
ANSWER_BATCH = 16


@dataclass(frozen=True)
class ComparedModel:
    """A model, and the heads that are scaled, or replaced by means, while it is active; none for the model as it is.

    scales: head → γ. means: layer → (W,); with them scales are not used. See `ablated_heads`.
    """

    live: LoadedModel
    scales: Mapping[Head, float] = field(default_factory=dict)
    means: Mapping[int, Tensor] | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Ablate the heads inside the block."""
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
        """Return the share of `flags` that are true; NaN if there are none."""
        if not flags:
            return cls(math.nan, math.nan, math.nan, 0)
        low, high = wilson_interval(float(sum(flags)), len(flags))
        return cls(sum(flags) / len(flags), low, high, len(flags))


@dataclass(frozen=True, eq=False)
class Divergence:
    """Divergence of an edited model over the first tokens of each answer; each (N,).

    kl: mean KL(original ‖ edited) in nats per token.
    nll_before, nll_after: summed negative log-likelihood of the tokens under the original and the edited model.
    tokens: their number.
    """

    kl: Floats
    nll_before: Floats
    nll_after: Floats
    tokens: Floats

    def mean_kl(self, groups: Sequence[str]) -> EstimateWithInterval:
        """Return the mean over examples, with a bootstrap interval over groups."""
        return bootstrap_mean(self.kl[:, None], groups=groups).at(0)

    @property
    def perplexities(self) -> tuple[float, float]:
        """e^(mean negative log-likelihood of a token) of the original and of the edited model."""
        total = float(self.tokens.sum())
        return math.exp(float(self.nll_before.sum()) / total), math.exp(float(self.nll_after.sum()) / total)


def measure_divergence(
    before: ComparedModel,
    afters: Mapping[str, ComparedModel],
    sequences: Sequence[TokenSequence],
    *,
    tokens: int = KL_TOKENS,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> dict[str, Divergence]:
    """Compare each of `afters` with `before` on the first `tokens` tokens of the answers in `sequences`.

    The original's logits are computed once for each batch and shared.

    Raises:
        SurgeryError: a sequence has no answer, there is none at all, or the logits are not finite.
    """
    if not sequences:
        raise SurgeryError("no answer is left to compare on", where=before.live.name)
    # The prompt and thinking in full, and only the first tokens of the answer.
    cut = [sequence.ids[: min(sequence.ends[2] + tokens, sequence.ends[3])] for sequence in sequences]
    n_answer_tokens = [len(ids) - sequence.ends[2] for ids, sequence in zip(cut, sequences, strict=True)]
    if 0 in n_answer_tokens:
        raise SurgeryError("has no answer to compare on", where=sequences[n_answer_tokens.index(0)].key)
    # Padded on the left, so that the answers end together and `logits_to_keep` drops everything before them.
    batches = make_batches(cut, max_tokens=max_tokens or CPU_TOKENS, padding="left")
    work = partial(_compare, before, afters, n_answer_tokens)
    results = map_over_ranks(
        batches, work, label="Comparing answers", size=lambda batch: len(batch.numbers), progress=progress
    )
    # Batches are made by length: this puts the examples back into their own order.
    order = np.argsort([number for batch in batches for number in batch.numbers])
    return {
        name: Divergence(*(np.concatenate([part[name][at] for part in results])[order] for at in range(4)))
        for name in afters
    }


def greedy_answers(
    model: ComparedModel,
    sequences: Sequence[TokenSequence],
    *,
    tokens: int = ANSWER_TOKENS,
    progress: Progress = silent,
) -> list[str]:
    """Return the model's greedy answers, up to `tokens` tokens, after the given thinking and closing template."""
    # Thinking is given and not generated: what is compared is the decision that follows it.
    with model.active():
        return generate_texts(
            model.live.loaded,
            [sequence.before_answer for sequence in sequences],
            max_new_tokens=tokens,
            batch_size=ANSWER_BATCH,
            label="Answering",
            progress=progress,
        )


def refusal_rates(examples: Sequence[Example]) -> dict[str, Rate]:
    """Return topic → the share of refused examples among those with a verdict."""
    topics = sorted({example.topic for example in examples if example.topic})
    return {
        topic: Rate.of([bool(e.refused) for e in examples if e.topic == topic and e.refused is not None])
        for topic in topics
    }


@torch.inference_mode()
def _compare(
    before: ComparedModel, afters: Mapping[str, ComparedModel], n_answer_tokens: Sequence[int], batch: TokenBatch
) -> dict[str, tuple[Floats, Floats, Floats, Floats]]:
    counts = [n_answer_tokens[number] for number in batch.numbers]
    original = _answer_logits(before, batch, max(counts))
    columns_of = {}
    for name, after in afters.items():
        edited = _answer_logits(after, batch, max(counts))
        rows = []
        for row, count in enumerate(counts):
            targets = batch.ids[row, -count:].to(original.device)
            # Logits at a position are for the token after it: the last ones are for what follows the answer.
            # In fp64: between similar models KL is a small difference of large logarithms.
            p = original[row, -count - 1 : -1].double().log_softmax(-1)
            q = edited[row, -count - 1 : -1].double().to(original.device).log_softmax(-1)
            # Tokens that the model rules out (a logit of -inf) add nothing; -inf - -inf would be NaN.
            kl = torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1).mean()
            losses = [-x.gather(-1, targets[:, None]).sum() for x in (p, q)]
            rows.append([float(kl), float(losses[0]), float(losses[1]), float(count)])
            if math.isnan(sum(rows[-1])):  # a NaN is above no budget, and so no budget would stop it
                raise SurgeryError(
                    f"the logits of {name} are not numbers", where=before.live.name, hint="Try --dtype float32."
                )
        columns = np.array(rows, dtype=np.float64).T
        columns_of[name] = (columns[0], columns[1], columns[2], columns[3])
    return columns_of


def _answer_logits(model: ComparedModel, batch: TokenBatch, count: int) -> Tensor:
    """Return the logits (N, count + 1, V) at the last positions, from that before the first answer token on."""
    live = model.live
    with model.active():
        output: Any = live.model(**batch.inputs(live.device), use_cache=False, logits_to_keep=count + 1)
    logits = output.logits
    assert isinstance(logits, Tensor)
    return logits
