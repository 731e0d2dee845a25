"""Every number that makes the lab's models what they are, and the name of the cache folder that follows from them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field

from surgery.lab.sums import Format

# Raise it when the training code or the files in a model's folder change in a way that no number below shows.
CODE_VERSION = 1
KEY_LENGTH = 12


@dataclass(frozen=True)
class Shape:
    """A tiny Qwen2 of about 0.3 M parameters."""

    layers: int = 3
    width: int = 96
    heads: int = 4
    kv_heads: int = 2
    mlp_width: int = 256
    positions: int = 128


@dataclass(frozen=True)
class Supervised:
    """Training on written answers.

    Args:
        steps: optimizer steps.
        batch: problems in a step.
        learning_rate: the peak, reached after `warmup` steps; then a cosine down to a tenth of it.
        formats: the prompt formats, drawn evenly.
        direct: the share of problems answered at once, without the chain of steps.
    """

    steps: int
    batch: int
    learning_rate: float
    formats: tuple[Format, ...]
    direct: float
    warmup: int = 10


@dataclass(frozen=True)
class Grpo:
    """Group relative policy optimization (arXiv:2402.03300): `prompts` × `group` sampled answers a step.

    Args:
        steps: optimizer steps at most.
        prompts: problems in a step.
        group: sampled answers per problem.
        learning_rate: the peak, reached after `warmup` steps; then a cosine down to a tenth of it.
        enough: training ends early once the mean reward of the last `window` steps is this high: later steps would
            only add drift to the weights.
    """

    steps: int = 80
    prompts: int = 32
    group: int = 8
    learning_rate: float = 3e-4
    warmup: int = 5
    enough: float = 0.95
    window: int = 5


@dataclass(frozen=True)
class Recipe:
    """The `reasoning` family: base → sft → grpo, and base → instruct."""

    seed: int = 0
    shape: Shape = field(default_factory=Shape)
    # Four terms and more: sums short enough to be learned by heart would blur what the steps are worth.
    terms: tuple[int, ...] = (4, 5)
    # The longest chain, of five terms, takes 24.
    answer_tokens: int = 40
    base: Supervised = Supervised(
        steps=900, batch=64, learning_rate=3e-3, formats=("plain", "sft", "instruct"), direct=0.0, warmup=50
    )
    sft: Supervised = Supervised(steps=60, batch=64, learning_rate=1e-3, formats=("sft",), direct=0.85)
    instruct: Supervised = Supervised(
        steps=60, batch=64, learning_rate=1e-3, formats=("instruct",), direct=0.85
    )
    grpo: Grpo = field(default_factory=Grpo)

    @property
    def key(self) -> str:
        """The cache folder's name: equal for equal numbers, different as soon as one of them changes."""
        text = json.dumps({"code": CODE_VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]
