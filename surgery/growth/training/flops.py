"""Floating-point operations per token of training a growing model, computed from the shapes of its matrices.

A matrix of P entries costs 2·P per token forward, 2·P for the gradient of its input and 2·P for its own (Kaplan et al.,
arXiv 2001.08361, section 2.1), and attention over T tokens 2·T·W forward in a layer whose heads are W wide together (of
the T that a token could see, a causal one sees half), and twice that for the gradients of what it multiplies. So what
trains costs 6·P, what is frozen above it 4·P, and what is frozen below it 2·P, or nothing once it is cached. Norms,
activations and the loss are left out.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.structure import ModelStructure

FORWARD, INPUT_GRADIENT, OWN_GRADIENT = 2, 2, 2
_MATRIX = 2  # axes


@dataclass(frozen=True)
class TrainingCost:
    """Operations per token of a training step.

    below: of the frozen layers below the first that trains. above: of everything else.
    """

    below: float
    above: float

    @property
    def whole(self) -> float:
        """The sum, as if nothing were cached."""
        return self.below + self.above


@dataclass(frozen=True)
class ForwardCost:
    """Operations per token of a forward pass: of every layer, of its attention alone, and of the output head."""

    layers: tuple[float, ...]
    attention: tuple[float, ...]
    head: float


def forward_cost(checkpoint: Checkpoint, structure: ModelStructure, *, sequence: int) -> ForwardCost:
    """Return the forward cost of a model's parts on windows of `sequence` tokens.

    Of routed experts only those count that a token is sent to.
    """
    layers, attention = [], []
    for layer in structure.blocks:
        entries = 0.0
        for name in layer.names:
            shape = checkpoint.tensors[name].shape
            if len(shape) >= _MATRIX:
                # Norms and biases are vectors, and cost next to nothing.
                entries += checkpoint.tensors[name].n_elements * _used_fraction(structure, layer.index, name)
        heads = layer.heads
        width = heads.n_heads * heads.head_dim if heads and heads.n_heads and heads.head_dim else 0
        attention.append(2.0 * sequence * width)
        layers.append(FORWARD * entries + attention[-1])
    vocabulary = [checkpoint.tensors[name] for name in structure.lm_heads or structure.token_embeddings]
    return ForwardCost(
        tuple(layers), tuple(attention), FORWARD * float(vocabulary[0].n_elements) if vocabulary else 0.0
    )


def training_cost(
    forward: ForwardCost, *, depth: int, trained: Collection[int], head: bool, norm: bool = False
) -> TrainingCost:
    """Return the cost of training the layers `trained`, the head if `head`, and the final norm if `norm`.

    depth: index of the first layer in which something trains, even if only a low-rank update, whose own cost is not
    counted; the number of layers where only what follows them trains.
    """
    # Attention has no matrix of its own: the gradients of both factors of its products are those of inputs.
    above = sum(
        flops / FORWARD * (FORWARD + INPUT_GRADIENT)
        + (flops if index in trained else forward.attention[index]) / FORWARD * OWN_GRADIENT
        for index, flops in enumerate(forward.layers)
        if index >= depth
    )
    # With only the head in training, no gradient flows out of it.
    gradient = INPUT_GRADIENT if norm or depth < len(forward.layers) else 0
    above += forward.head / FORWARD * (FORWARD + gradient + (OWN_GRADIENT if head else 0))
    return TrainingCost(sum(forward.layers[:depth]), above)


def _used_fraction(structure: ModelStructure, layer: int, name: str) -> float:
    """Return the fraction of a tensor that a token uses: of routed experts, those it is sent to."""
    experts = structure.experts.get(layer)
    if experts is None or structure.roles.get(name) != "expert" or not structure.experts_per_token:
        return 1.0
    return structure.experts_per_token / experts.n_experts if experts.n_experts else 1.0
