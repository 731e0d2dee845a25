"""The causal proof: what the probe says at the last token before the answer when a head is put out of action.

In come sequences, heads and an `Ablation`; out comes the probe's logit for every sequence and head. Heads are folded
into the batch, and nothing below their layer is computed again: at the last few positions the prefix is cached once and
each layer resumed with a row per head, (layers + 1) short passes instead of layers × heads long ones; at all positions
(what an edit of the weights does) the prefix changes too, and each layer is resumed on the whole sequence.

Shapes: N sequences, B rows of a batch, T tokens, K last positions, D width, W = heads · head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from probes.data.examples import TokenSequence
from probes.model.activations import CPU_TOKENS, GPU_TOKENS
from probes.model.cached_forward import ProbeForward, prefill, restore_cache, why_not_cacheable, why_not_resumable
from surgery.checkpoint.selectors import Head
from surgery.errors import SurgeryError, usage_error
from surgery.models.loaded_model import LoadedModel, OutputProjection, hidden_in, hooks
from surgery.models.partial_forward import replace_input
from surgery.runtime.collectives import map_over_ranks
from surgery.runtime.progress import Progress, silent

Method = Literal["cached prefix", "resumed layers", "one forward per head"]
METHODS: tuple[Method, ...] = get_args(Method)  # the fastest first


@dataclass(frozen=True)
class Ablation:
    """What becomes of an ablated head's output z (its slice of the output projection's input).

    z ← scale · z; or, with `values` (layer → (N, K or 1, W)), z ← the slice of what is given for the sequence.
    """

    scale: float = 0.0
    values: Mapping[int, Tensor] | None = None


@dataclass(frozen=True)
class AblationSweep:
    """The probe's logit without and with each head ablated: base (N,), ablated (N, heads), fp32 on the CPU."""

    heads: tuple[Head, ...]
    base: Tensor
    ablated: Tensor
    method: Method

    @property
    def effects(self) -> Tensor:
        """(N, heads): ablated − base. Above 0: the head holds refusal down."""
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
    """Ablates every head of `heads` by itself, on every sequence.

    Args:
        weight, bias: the probe on the final norm's output; (D,) and a number.
        last: ablate at so many last positions before the answer; None for all positions.
        method: None takes the fastest that is right for the model: a cached prefix only counts where every layer
            keeps keys and values, and both it and resuming a layer only where they give the plain forward's state.
        max_tokens: rows × tokens of a batch.

    Raises:
        SurgeryError: a head is not there; `last` is longer than a sequence; values do not fit; `method` is wrong here.
    """
    _check(live, sequences, heads, ablation, last)
    budget = max_tokens or (GPU_TOKENS if live.device.type == "cuda" else CPU_TOKENS)
    reader = ProbeForward(live, weight.float(), bias)
    chosen = _method(reader, sequences, last, method)
    run = {"cached prefix": _over_prefix, "resumed layers": _resumed, "one forward per head": _plainly}[chosen]
    work = partial(_one_sequence, run, reader, sequences, tuple(heads), ablation, last, budget)
    rows = map_over_ranks(
        range(len(sequences)), work, label=f"Ablating {len(heads)} heads", progress=progress
    )  # one sequence at a time: its heads are the batch
    base = torch.stack([row[0] for row in rows])
    return AblationSweep(tuple(heads), base, torch.stack([row[1] for row in rows]), chosen)


@contextmanager
def ablated_heads(
    live: LoadedModel, scales: Mapping[Head, float], means: Mapping[int, Tensor] | None = None
) -> Iterator[None]:
    """Inside, every forward pass runs with z ← scale · z of these heads, at all positions: what baking does.

    means: layer → (W,); with it, the slices of these heads are replaced by its, and scales are not used.

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
        addend = None if means is None else means[layer].cpu() * (factor == 0)
        module = live.projections[layer].module
        handles.append(module.register_forward_pre_hook(_editing(factor, addend), with_kwargs=True))
    with hooks(*handles):
        yield


def all_heads(live: LoadedModel) -> list[Head]:
    """Every head that can be ablated, layer by layer."""
    return [Head(layer, index) for layer, p in sorted(live.projections.items()) for index in range(p.n_heads)]


_Run = Callable[..., tuple[Tensor, Tensor]]


@torch.inference_mode()
def _one_sequence(
    run: _Run,
    reader: ProbeForward,
    sequences: Sequence[TokenSequence],
    heads: tuple[Head, ...],
    ablation: Ablation,
    last: int | None,
    budget: int,
    number: int,
) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([sequences[number].before_answer], device=reader.live.device)
    values = None
    if ablation.values is not None:
        values = {layer: rows[number] for layer, rows in ablation.values.items()}
    base, ablated = run(reader, ids, heads, _Edit(ablation.scale, values, last), budget)
    return base.cpu(), ablated.cpu()


@dataclass(frozen=True)
class _Edit:
    """An `Ablation` of one sequence: values are layer → (K or 1, W)."""

    scale: float
    values: Mapping[int, Tensor] | None
    last: int | None

    def hook(self, projection: OutputProjection, heads: Sequence[Head]) -> Any:
        """Row i of the batch loses head i."""

        def edit(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            z = hidden_in(arguments, keywords).clone()
            first = 0 if self.last is None else max(z.shape[1] - self.last, 0)
            for row, head in enumerate(heads):
                block = projection.block(head.index)
                if self.values is None:
                    z[row, first:, block] *= self.scale
                else:
                    z[row, first:, block] = self.values[projection.layer][:, block].to(z)
            return (z, *arguments[1:]), keywords

        return projection.module.register_forward_pre_hook(edit, with_kwargs=True)


def _over_prefix(
    reader: ProbeForward, ids: Tensor, heads: tuple[Head, ...], edit: _Edit, budget: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of all but the last positions once; then, layer by layer, those positions with a row a head."""
    assert edit.last is not None
    prefix, tail = ids[:, : -edit.last], ids[:, -edit.last :]
    cache = prefill(reader.live, prefix)
    kept = [dict(vars(layer)) for layer in cache.layers]
    base, inputs, tupled = reader.inputs(tail, cache)

    def logits(rows: Tensor) -> Tensor:
        restore_cache(cache, kept, len(rows))
        return reader.logits(rows, cache)

    return base[0], _each_layer(reader, tail, heads, edit, inputs, tupled, budget // ids.shape[1], logits)


def _resumed(
    reader: ProbeForward, ids: Tensor, heads: tuple[Head, ...], edit: _Edit, budget: int
) -> tuple[Tensor, Tensor]:
    """Every layer resumed on the whole sequence, with a row a head."""
    base, inputs, tupled = reader.inputs(ids)
    return base[0], _each_layer(reader, ids, heads, edit, inputs, tupled, budget // ids.shape[1], reader.logits)


def _plainly(
    reader: ProbeForward, ids: Tensor, heads: tuple[Head, ...], edit: _Edit, budget: int
) -> tuple[Tensor, Tensor]:
    """The reference: a whole forward pass for every head."""
    base = reader.logits(ids)
    found = []
    for head in heads:
        with hooks(edit.hook(reader.live.projections[head.layer], [head])):
            found.append(reader.logits(ids)[0])
    return base[0], torch.stack(found)


def _each_layer(
    reader: ProbeForward,
    ids: Tensor,
    heads: tuple[Head, ...],
    edit: _Edit,
    inputs: Sequence[Tensor],
    tupled: Sequence[bool],
    rows_at_most: int,
    logits: Callable[[Tensor], Tensor],
) -> Tensor:
    found = torch.empty(len(heads), device=ids.device)
    for layer in sorted({head.layer for head in heads}):
        numbers = [number for number, head in enumerate(heads) if head.layer == layer]
        for start in range(0, len(numbers), max(1, rows_at_most)):
            part = numbers[start : start + max(1, rows_at_most)]
            edited = edit.hook(reader.live.projections[layer], [heads[number] for number in part])
            rows = inputs[layer].expand(len(part), -1, -1).contiguous()
            with replace_input(reader.live, layer, rows, tupled), hooks(edited):
                found[part] = logits(ids.expand(len(part), -1)).to(found)
    return found


def _method(reader: ProbeForward, sequences: Sequence[TokenSequence], last: int | None, asked: Method | None) -> Method:
    """What is asked for, or the fastest that is right. Raises SurgeryError where what is asked for is wrong."""
    if asked is not None and asked not in METHODS:
        raise usage_error(f"got {asked!r}, expected {' or '.join(METHODS)}", where="method")
    for method in METHODS if asked is None else (asked,):
        fault = _fault(reader, sequences, last, method)
        if fault is None:
            return method
        if asked is not None:
            raise usage_error(
                f"{method!r} would be wrong: {fault}", where=reader.live.name, hint="Leave the method to choose itself."
            )
    raise AssertionError("the last method has no fault")


def _fault(reader: ProbeForward, sequences: Sequence[TokenSequence], last: int | None, method: Method) -> str | None:
    """Why `method` would not give what plain forward passes give, or None where it does."""
    if method == "one forward per head":
        return None
    lengths = [len(sequence.before_answer) for sequence in sequences]
    # The longest: what lies outside a sliding window shows nowhere else.
    ids = torch.tensor([sequences[lengths.index(max(lengths))].before_answer], device=reader.live.device)
    if method == "resumed layers":
        return why_not_resumable(reader, ids)
    if last is None:
        return "a cached prefix only serves ablation at the last positions"
    if last >= min(lengths):
        return f"nothing stands before the last {last} tokens of the shortest example"
    return why_not_cacheable(reader, ids, last)


def _check(
    live: LoadedModel, sequences: Sequence[TokenSequence], heads: Sequence[Head], ablation: Ablation, last: int | None
) -> None:
    if not sequences:
        raise SurgeryError("no example is left to ablate on", where=live.name)
    if not heads:
        raise usage_error("no head was given.")
    _check_heads(live, heads)
    shortest = min(len(sequence.before_answer) for sequence in sequences)
    if last is not None and not 0 < last <= shortest:
        raise usage_error(f"got {last}, expected 1 to {shortest}, the tokens of the shortest example", where="last")
    if ablation.values is None:
        return
    if last is None and any(rows.shape[1] != 1 for rows in ablation.values.values()):
        raise usage_error("values for the last positions cannot stand for all positions", where="ablation")
    for layer in sorted({head.layer for head in heads}):
        width = live.projections[layer].n_heads * live.projections[layer].head_dim
        found = None if layer not in ablation.values else tuple(ablation.values[layer].shape)
        if found not in ((len(sequences), 1, width), (len(sequences), last or 1, width)):
            raise usage_error(
                f"the values of layer {layer} have shape {found}, expected {(len(sequences), last or 1, width)}",
                where="ablation",
            )


def _check_heads(live: LoadedModel, heads: Sequence[Head]) -> None:
    missing = [head for head in heads if head.layer not in live.projections]
    missing += [h for h in heads if h.layer in live.projections and h.index >= live.projections[h.layer].n_heads]
    if missing:
        raise usage_error(f"has no head {missing[0]}", where=live.name)


def _editing(factor: Tensor, addend: Tensor | None) -> Callable[..., Any]:
    def edit(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        z = hidden_in(arguments, keywords)
        z = z * factor.to(z)
        return (z if addend is None else z + addend.to(z), *arguments[1:]), keywords

    return edit
