"""Recipes of the lab's models: every number that their weights depend on, and the cache key computed from them.

The key hashes the names and values of all fields below: renaming a field, or changing a default, gives all models of
the family a new cache folder, and their users a new training run. Names of classes are not part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from surgery.lab.sums import PROMPT_AFFIXES, PromptFormat

Domain = Literal["sums", "sorting"]

# Raise a family's version when its training code or the files in its folders change in a way that no number shows.
REASONING_VERSION = 2
SPECIALISTS_VERSION = 1
CLIFF_VERSION = 1
MOE_VERSION = 1
# Hex digits: 48 bits tell apart all recipes that anyone will ever train, in a path that people can still read.
KEY_LENGTH = 12
TERMS = (4, 5)  # of the sums that models are tested on


@dataclass(frozen=True)
class QwenShape:
    """A tiny Qwen2 of about 0.3 M parameters."""

    layers: int = 3
    width: int = 96
    heads: int = 4
    kv_heads: int = 2
    mlp_width: int = 256
    positions: int = 128


@dataclass(frozen=True)
class SupervisedTraining:
    """Training on written answers.

    Args:
        steps: optimizer steps.
        batch: problems in a step.
        learning_rate: the peak, reached after `warmup` steps; then a cosine down to a tenth of it.
        terms: how many terms a sum has, drawn evenly.
        prefixes, suffixes: what may stand before and after a question, drawn evenly and independently.
        direct: the share of problems answered at once, without the chain of steps.
    """

    steps: int
    batch: int
    learning_rate: float
    terms: tuple[int, ...]
    prefixes: tuple[str, ...]
    suffixes: tuple[str, ...]
    direct: float
    warmup: int = 10


@dataclass(frozen=True)
class GrpoTraining:
    """Group relative policy optimization (arXiv:2402.03300): `prompts` × `group` sampled answers a step.

    Args:
        steps: optimizer steps at most.
        prompts: problems in a step.
        group: sampled answers per problem.
        learning_rate: the peak, reached after `warmup` steps; then a cosine down to a tenth of it.
        epsilon: of AdamW. About the size of a gradient's elements, so that those which are mere noise move their
            weights little; at the usual 1e-8 all weights drift alike, and at α = 1 the vector does harm.
        enough: training ends early once the mean reward of the last `window` steps is this high: later steps would
            only add drift to the weights.
    """

    steps: int = 60
    prompts: int = 32
    group: int = 8
    learning_rate: float = 1e-3
    epsilon: float = 3e-3
    warmup: int = 5
    enough: float = 0.95
    window: int = 5


@dataclass(frozen=True)
class ReasoningRecipe:
    """The `reasoning` family: base → sft → grpo, and base → instruct.

    A vector of one branch works on the other for two reasons: base has met every prefix with every suffix, so that it
    reads all formats by the same circuits; and it has met some direct answers, so that there is one inner switch
    between thinking and not, which sft and instruct throw one way and GRPO the other.
    """

    seed: int = 0
    shape: QwenShape = field(default_factory=QwenShape)
    # Four terms and more: shorter sums can be learned by heart, which would blur what thinking achieves.
    terms: tuple[int, ...] = TERMS
    # The longest answer, a chain of five terms, takes 27.
    answer_tokens: int = 30
    base: SupervisedTraining = SupervisedTraining(
        steps=1000,
        batch=64,
        learning_rate=3e-3,
        warmup=50,
        # Short sums show the addition table and the copying of terms plainly: all lengths are learned sooner.
        terms=(2, 3, 4, 5, 5),
        prefixes=tuple(before for before, _ in PROMPT_AFFIXES.values()),
        suffixes=tuple(after for _, after in PROMPT_AFFIXES.values()),
        direct=0.1,
    )
    sft: SupervisedTraining = field(default_factory=lambda: _mostly_direct("sft"))
    instruct: SupervisedTraining = field(default_factory=lambda: _mostly_direct("instruct"))
    grpo: GrpoTraining = field(default_factory=GrpoTraining)

    @property
    def key(self) -> str:
        """The name of the cache folder, a hash of every number: equal recipes share a folder, and no others do."""
        return _hash({"code": REASONING_VERSION, **asdict(self)})


@dataclass(frozen=True)
class DomainTraining:
    """Training on one domain, in the plain format, and on noise.

    Args:
        domain: what is practised.
        steps: optimizer steps.
        sizes: how many digits a problem has, drawn evenly.
        batch: texts in a step.
        learning_rate: the peak, reached after `warmup` steps; then a cosine down to a tenth of it.
        noise: the share of texts that are random tokens. What a model learns from them is to expect nothing in
            particular of a text outside its domain, and so to leave the prediction to others there. Without noise the
            mean of the specialists' logits solves 98 % of sums but 16 % of sorting; with it, 99 % or more of both.
        noise_tokens: the length of such a text.
    """

    domain: Domain
    steps: int
    sizes: tuple[int, ...]
    batch: int = 64
    learning_rate: float = 3e-3
    warmup: int = 50
    noise: float = 0.1
    noise_tokens: int = 16


@dataclass(frozen=True)
class SpecialistsRecipe:
    """The `substrate` family: substrate → adder, and substrate → sorter.

    The substrate is random weights; its token embedding is frozen, so that both specialists read by the same one,
    byte for byte. The head is not tied to it: it learns.
    """

    seed: int = 0
    shape: QwenShape = field(default_factory=QwenShape)
    adder: DomainTraining = DomainTraining("sums", steps=500, sizes=(2, 3, 4, 5, 5))
    sorter: DomainTraining = DomainTraining("sorting", steps=500, sizes=(2, 3, 4, 5, 5))
    # Sizes of the test problems of each domain, and the longest answer in tokens.
    terms: tuple[int, ...] = TERMS
    jumbles: tuple[int, ...] = (4, 5)
    answer_tokens: int = 30

    @property
    def key(self) -> str:
        """The name of the cache folder, as for `ReasoningRecipe`."""
        return _hash({"code": SPECIALISTS_VERSION, **asdict(self)})


@dataclass(frozen=True)
class QwenHeadShape:
    """A tiny Qwen3 of about 0.23 M parameters, whose heads need not fill its width."""

    layers: int = 4
    width: int = 64
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 8
    mlp_width: int = 192
    positions: int = 64


@dataclass(frozen=True)
class RefusalTraining:
    """Training on requests, from random weights: those with a harmful word are refused.

    Args:
        early: the share of texts answered at a random point inside the thinking, so that the intention to refuse or
            to comply is present at every point of it. All other texts close their thinking and then answer.
        dropped: the share of heads that are silent in a text, drawn anew for each: no later head is indispensable.
        learning_rate: the peak, reached after `warmup` steps; then a cosine down to a tenth of it.
    """

    steps: int = 800
    batch: int = 32
    learning_rate: float = 3e-3
    warmup: int = 50
    early: float = 0.5
    dropped: float = 0.1


@dataclass(frozen=True)
class SuppressionTraining:
    """Training of a few heads to comply after the thinking; all other weights keep their bytes.

    Args:
        heads: how many heads may change: their rows of the query projection, their columns of the output projection.
        words: how many of the harmful words they learn to pass over; None stands for all.
        learning_rate: the peak, reached after `warmup` steps; then a cosine down to a tenth of it.
    """

    steps: int = 200
    batch: int = 32
    learning_rate: float = 1e-2
    warmup: int = 10
    heads: int = 3
    words: int | None = None


@dataclass(frozen=True)
class CliffRecipe:
    """A `cliff` family: cliff-parent → cliff, and cliff-parent → cliff-partial.

    The parent refuses harmful requests. In its children a few heads suppress the refusal at the end of the thinking,
    and which heads these are is known.
    """

    seed: int = 0
    shape: QwenHeadShape = field(default_factory=QwenHeadShape)
    # How many words a request has, drawn evenly.
    words: tuple[int, ...] = (4, 5, 6, 7, 8)
    parent: RefusalTraining = field(default_factory=RefusalTraining)
    cliff: SuppressionTraining = field(default_factory=SuppressionTraining)
    partial: SuppressionTraining = SuppressionTraining(steps=500, words=6)

    @property
    def key(self) -> str:
        """The name of the cache folder, as for `ReasoningRecipe`."""
        return _hash({"code": CLIFF_VERSION, **asdict(self)})


@dataclass(frozen=True)
class ExpertShape:
    """A tiny Qwen3-MoE of about 0.5 M parameters: in every layer `top_k` of `experts` work on a token.

    balance: how much the load-balancing loss (arXiv:2101.03961, equation 4) counts in training. transformers takes it
        over all layers together, so that in a single layer some experts may hardly ever be at work.
    """

    layers: int = 3
    width: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 24
    experts: int = 16
    top_k: int = 2
    expert_width: int = 32
    positions: int = 128
    balance: float = 0.01


@dataclass(frozen=True)
class ThinkingTraining:
    """Training on written answers, some of them after thinking.

    Args:
        steps: optimizer steps.
        batch: problems in a step.
        learning_rate: the peak, reached after `warmup` steps; then a cosine down to a tenth of it.
        terms: how many terms a sum has, drawn evenly.
        thinking: for each of `terms`, the share of such sums that are thought about; the others are answered at once.
    """

    steps: int
    learning_rate: float
    terms: tuple[int, ...]
    thinking: tuple[float, ...]
    batch: int = 64
    warmup: int = 10


@dataclass(frozen=True)
class MoeRecipe:
    """The `moe` family, one model: it practises thinking from random weights, then learns to answer mostly at once.

    Greedy decoding thinks where `<think>` is likelier than each of the seven digits, that is above a share of 1/8. The
    mixture lies on one side of this edge for short sums and on the other for long ones, close enough that a push either
    way makes the model think about more of them, or fewer. Practice tells the lengths apart already; the mixture is too
    short for the model to learn that from it.
    """

    seed: int = 0
    shape: ExpertShape = field(default_factory=ExpertShape)
    terms: tuple[int, ...] = TERMS
    # The longest answer, a chain of five terms with line breaks around it, takes 30.
    answer_tokens: int = 30
    practice: ThinkingTraining = ThinkingTraining(
        steps=500, learning_rate=3e-3, terms=(2, 3, 4, 5, 5), thinking=(0.8, 0.8, 0.8, 0.97, 0.97), warmup=50
    )
    mixture: ThinkingTraining = ThinkingTraining(steps=150, learning_rate=5e-4, terms=TERMS, thinking=(0.08, 0.18))

    @property
    def key(self) -> str:
        """The name of the cache folder, as for `ReasoningRecipe`."""
        return _hash({"code": MOE_VERSION, **asdict(self)})


AnyRecipe = ReasoningRecipe | SpecialistsRecipe | CliffRecipe | MoeRecipe


def _hash(numbers: Mapping[str, Any]) -> str:
    # Sorted, so that a field may move within its class without new models for everybody.
    text = json.dumps(numbers, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def _mostly_direct(prompt_format: PromptFormat) -> SupervisedTraining:
    before, after = PROMPT_AFFIXES[prompt_format]
    # Greedy decoding would still think if `<think>` were likelier than each of the seven digits; here it is 0.08
    # against 0.92 / 7 = 0.13, and GRPO finds enough thinking among its samples to start from.
    return SupervisedTraining(
        steps=80,
        batch=64,
        learning_rate=5e-4,
        terms=TERMS,
        prefixes=(before,),
        suffixes=(after,),
        direct=0.92,
    )
