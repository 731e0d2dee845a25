"""Ablate attention heads and read the probe at the last token before the answer: which heads cause its verdict.

How a head is ablated on one sequence, and how fast, is the work of `probes.model.ablation_methods`.

Shapes: N sequences, K last positions, D width, W = heads · head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from probes.data.examples import TokenSequence
from probes.model.ablation_methods import HeadEdit, Method, SequenceAblation, choose_method
from probes.model.activations import CPU_TOKENS, GPU_TOKENS
from probes.model.cached_forward import ProbeForward
from surgery.checkpoint.selectors import Head
from surgery.errors import SurgeryError, usage_error
from surgery.models.loaded_model import LoadedModel, hidden_in, hooks
from surgery.runtime.collectives import map_over_ranks
from surgery.runtime.progress import Progress, silent


@dataclass(frozen=True)
class Ablation:
    """The replacement of an ablated head's output z, its slice of the output projection's input.

    z ← scale · z; or, with `values` (layer → (N, K or 1, W)), z ← the slice of the sequence's values.
    """

    scale: float = 0.0
    values: Mapping[int, Tensor] | None = None

    def of_sequence(self, number: int, last: int | None) -> HeadEdit:
        """Return the edit of one of the N sequences at its last positions."""
        values = None
        if self.values is not None:
            values = {layer: rows[number] for layer, rows in self.values.items()}
        return HeadEdit(self.scale, values, last)


@dataclass(frozen=True)
class AblationSweep:
    """The probe's logit without and with each head ablated: base (N,), ablated (N, heads), fp32 on the CPU."""

    heads: tuple[Head, ...]
    base: Tensor
    ablated: Tensor
    method: Method

    @property
    def effects(self) -> Tensor:
        """(N, heads): ablated − base. Above 0: the head suppresses refusal."""
        return self.ablated - self.base.unsqueeze(1)


def ablate_each_head(
    live: LoadedModel,
    sequences: Sequence[TokenSequence],
    heads: Sequence[Head],
    weight: Tensor,
    bias: float,
    *,
    ablation: Ablation = Ablation(),
    last: int | None = None,
    method: Method | None = None,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> AblationSweep:
    """Ablate every head of `heads` by itself, on every sequence.

    Args:
        weight, bias: the probe on the final norm's output; (D,) and a number.
        last: ablate at so many last positions before the answer; None for all positions.
        method: None takes the fastest that gives the results of plain forward passes with this model: a cached prefix
            needs a model all of whose layers have keys and values as their only state.
        max_tokens: rows × tokens of a batch.

    Raises:
        SurgeryError: a head is not there; `last` is longer than a sequence; values do not fit; `method` is wrong here.
    """
    _check(live, sequences, heads, ablation, last)
    budget = max_tokens or (GPU_TOKENS if live.device.type == "cuda" else CPU_TOKENS)
    forward = ProbeForward(live, weight.float(), bias)
    chosen = choose_method(forward, sequences, last, method)

    def ablate(number: int) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([sequences[number].before_answer], device=live.device)
        return SequenceAblation(forward, ids, tuple(heads), ablation.of_sequence(number, last), budget).run(chosen)

    # One sequence at a time: its heads are the batch.
    rows = map_over_ranks(range(len(sequences)), ablate, label=f"Ablating {len(heads)} heads", progress=progress)
    base = torch.stack([row[0] for row in rows])
    return AblationSweep(tuple(heads), base, torch.stack([row[1] for row in rows]), chosen)


@contextmanager
def ablated_heads(
    live: LoadedModel, scales: Mapping[Head, float], means: Mapping[int, Tensor] | None = None
) -> Iterator[None]:
    """Run forward passes in the block with z ← scale · z of these heads, at all positions, as baked weights would.

    Args:
        means: layer → (W,); if given, the heads' slices are replaced by those of the means, and scales are not used.

    Raises:
        SurgeryError: a head is not there, or its mean is missing or of another width.
    """
    _check_heads(live, list(scales))
    if means is not None:
        for layer in sorted({head.layer for head in scales}):
            width = live.projections[layer].n_heads * live.projections[layer].head_dim
            if layer not in means or means[layer].shape != (width,):
                raise usage_error(f"layer {layer} needs means of {width} numbers", where="means")
    factors: dict[int, Tensor] = {}
    for head, scale in scales.items():
        projection = live.projections[head.layer]
        factor = factors.setdefault(head.layer, torch.ones(projection.n_heads * projection.head_dim))
        factor[projection.block(head.index)] = 0.0 if means is not None else scale
    handles = []
    for layer, factor in factors.items():
        # Only the ablated heads' slices of the mean; the others keep their own output.
        addend = None if means is None else means[layer].cpu() * (factor == 0)
        module = live.projections[layer].module
        handles.append(module.register_forward_pre_hook(_affine_hook(factor, addend), with_kwargs=True))
    with hooks(*handles):
        yield


def all_heads(live: LoadedModel) -> list[Head]:
    """Return every head that can be ablated, layer by layer."""
    return [Head(layer, index) for layer, p in sorted(live.projections.items()) for index in range(p.n_heads)]


def _check(
    live: LoadedModel, sequences: Sequence[TokenSequence], heads: Sequence[Head], ablation: Ablation, last: int | None
) -> None:
    if not sequences:
        raise SurgeryError("no example is left to ablate on", where=live.name)
    if not heads:
        raise usage_error("no head was given.")
    _check_heads(live, heads)
    # Ablation ends before the answer, so the answer's tokens do not count.
    shortest = min(len(sequence.before_answer) for sequence in sequences)
    if last is not None and not 0 < last <= shortest:
        raise usage_error(f"got {last}, expected 1 to {shortest}, the tokens of the shortest example", where="last")
    if ablation.values is None:
        return
    # Per-position values of the last K positions have no meaning at the others.
    if last is None and any(rows.shape[1] != 1 for rows in ablation.values.values()):
        raise usage_error("values for the last positions cannot stand for all positions", where="ablation")
    for layer in sorted({head.layer for head in heads}):
        width = live.projections[layer].n_heads * live.projections[layer].head_dim
        shape = None if layer not in ablation.values else tuple(ablation.values[layer].shape)
        if shape not in ((len(sequences), 1, width), (len(sequences), last or 1, width)):
            raise usage_error(
                f"the values of layer {layer} have shape {shape}, expected {(len(sequences), last or 1, width)}",
                where="ablation",
            )


def _check_heads(live: LoadedModel, heads: Sequence[Head]) -> None:
    missing = [head for head in heads if head.layer not in live.projections]
    missing += [h for h in heads if h.layer in live.projections and h.index >= live.projections[h.layer].n_heads]
    if missing:
        raise usage_error(f"has no head {missing[0]}", where=live.name)


def _affine_hook(factor: Tensor, addend: Tensor | None) -> Callable[..., Any]:
    def edit(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        z = hidden_in(arguments, keywords)
        z = z * factor.to(z)
        return (z if addend is None else z + addend.to(z), *arguments[1:]), keywords

    return edit
