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
from typing import Any, Literal

import torch
from torch import Tensor, nn

from probes.activations import CPU_TOKENS, GPU_TOKENS
from probes.examples import TokenSequence
from probes.live import LiveModel, Projection, hidden_in, hidden_out, hooks
from probes.parallel import share
from surgery.errors import SurgeryError, usage_error
from surgery.heads import Head
from surgery.progress import Progress, silent

Method = Literal["cached prefix", "resumed layers", "one forward per head"]
# How far the logit that is read over a cached prefix may be from the plain one, relative to its size.
AGREEMENT = {torch.float32: 1e-4, torch.float64: 1e-8}


@dataclass(frozen=True)
class Ablation:
    """What becomes of an ablated head's output z (its slice of the output projection's input).

    z ← scale · z; or, with `values` (layer → (N, K or 1, W)), z ← the slice of what is given for the sequence.
    """

    scale: float = 0.0
    values: Mapping[int, Tensor] | None = None


@dataclass(frozen=True)
class Sweep:
    """The probe's logit without and with each head ablated: base (N,), ablated (N, heads), fp32 on the CPU."""

    heads: tuple[Head, ...]
    base: Tensor
    ablated: Tensor
    method: Method

    @property
    def effects(self) -> Tensor:
        """(N, heads): ablated − base. Above 0: the head holds refusal down."""
        return self.ablated - self.base.unsqueeze(1)


def sweep(
    live: LiveModel,
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
) -> Sweep:
    """Ablates every head of `heads` by itself, on every sequence.

    Args:
        weight, bias: the probe on the final norm's output; (D,) and a number.
        last: ablate at so many last positions before the answer; None for all positions.
        method: None takes the fastest that is right for the model: a cached prefix only counts where every layer
            keeps keys and values, and where it gives the plain forward's logit.
        max_tokens: rows × tokens of a batch.

    Raises:
        SurgeryError: a head is not there; `last` is longer than a sequence; values do not fit.
    """
    _check(live, sequences, heads, ablation, last)
    budget = max_tokens or (GPU_TOKENS if live.device.type == "cuda" else CPU_TOKENS)
    reader = _Reader(live, weight.float(), bias)
    chosen = method or _fastest(reader, sequences[0], last)
    if chosen == "cached prefix" and last is None:
        raise usage_error("a cached prefix only serves ablation at the last positions", where="method")
    run = {"cached prefix": _over_prefix, "resumed layers": _resumed, "one forward per head": _plainly}[chosen]
    work = partial(_one_sequence, run, reader, sequences, tuple(heads), ablation, last, budget)
    rows = share(
        range(len(sequences)), work, label=f"Ablating {len(heads)} heads", progress=progress
    )  # one sequence at a time: its heads are the batch
    base = torch.stack([row[0] for row in rows])
    return Sweep(tuple(heads), base, torch.stack([row[1] for row in rows]), chosen)


@contextmanager
def heads_edited(
    live: LiveModel, scales: Mapping[Head, float], means: Mapping[int, Tensor] | None = None
) -> Iterator[None]:
    """Inside, every forward pass runs with z ← scale · z of these heads, at all positions: what baking does.

    means: layer → (W,); with it, the slices of these heads are replaced by its, and scales are not used.
    """
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


def all_heads(live: LiveModel) -> list[Head]:
    """Every head that can be ablated, layer by layer."""
    return [Head(layer, index) for layer, p in sorted(live.projections.items()) for index in range(p.n_heads)]


class _Reader:
    """Reads the probe's logit at the last position of every row, and what layers are resumed from."""

    def __init__(self, live: LiveModel, weight: Tensor, bias: float) -> None:
        self.live, self.weight, self.bias = live, weight, bias

    def logits(self, ids: Tensor, cache: Any = None) -> Tensor:
        """(B,) of a run over `ids` (B, T), behind `cache` where there is one."""
        found: list[Tensor] = []

        def see(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            found.append(hidden_out(output)[:, -1].float() @ self.weight.to(ids.device) + self.bias)

        with hooks(self.live.final_norm.register_forward_hook(see)):
            self._run(ids, cache)
        return found[0]

    def inputs(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, list[Tensor], list[bool]]:
        """The logit; every layer's input (1, T, D); and whether each layer's output comes in a tuple."""
        entering: list[Tensor] = []
        tupled: list[bool] = []

        def see_in(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            entering.append(hidden_in(arguments, keywords))

        def see_out(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            tupled.append(isinstance(output, tuple))

        handles = [layer.register_forward_pre_hook(see_in, with_kwargs=True) for layer in self.live.layers]
        handles += [layer.register_forward_hook(see_out) for layer in self.live.layers]
        with hooks(*handles):
            logit = self.logits(ids, cache)
        return logit, entering, tupled

    def _run(self, ids: Tensor, cache: Any) -> None:
        before = cache.get_seq_length() if cache is not None else 0
        length = before + ids.shape[1]
        positions = torch.arange(before, length, device=ids.device).expand(len(ids), -1)
        mask = torch.ones(len(ids), length, dtype=torch.long, device=ids.device)
        self.live.body(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=cache is not None,
        )  # fmt: skip


_Run = Callable[..., tuple[Tensor, Tensor]]


@torch.inference_mode()
def _one_sequence(
    run: _Run,
    reader: _Reader,
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

    def hook(self, projection: Projection, heads: Sequence[Head]) -> Any:
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
    reader: _Reader, ids: Tensor, heads: tuple[Head, ...], edit: _Edit, budget: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of all but the last positions once; then, layer by layer, those positions with a row a head."""
    assert edit.last is not None
    prefix, tail = ids[:, : -edit.last], ids[:, -edit.last :]
    cache = _prefix_cache(reader, prefix)
    kept = [dict(vars(layer)) for layer in cache.layers]
    base, entering, tupled = reader.inputs(tail, cache)

    def logits(rows: Tensor) -> Tensor:
        _restore(cache, kept, len(rows))
        return reader.logits(rows, cache)

    return base[0], _each_layer(reader, tail, heads, edit, entering, tupled, budget // ids.shape[1], logits)


def _resumed(reader: _Reader, ids: Tensor, heads: tuple[Head, ...], edit: _Edit, budget: int) -> tuple[Tensor, Tensor]:
    """Every layer resumed on the whole sequence, with a row a head."""
    base, entering, tupled = reader.inputs(ids)
    return base[0], _each_layer(reader, ids, heads, edit, entering, tupled, budget // ids.shape[1], reader.logits)


def _plainly(reader: _Reader, ids: Tensor, heads: tuple[Head, ...], edit: _Edit, budget: int) -> tuple[Tensor, Tensor]:
    """The reference: a whole forward pass for every head."""
    base = reader.logits(ids)
    found = []
    for head in heads:
        with hooks(edit.hook(reader.live.projections[head.layer], [head])):
            found.append(reader.logits(ids)[0])
    return base[0], torch.stack(found)


def _each_layer(
    reader: _Reader,
    ids: Tensor,
    heads: tuple[Head, ...],
    edit: _Edit,
    entering: Sequence[Tensor],
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
            with _resume_at(reader.live, layer, entering[layer], tupled, len(part)), hooks(edited):
                found[part] = logits(ids.expand(len(part), -1)).to(found)
    return found


@contextmanager
def _resume_at(live: LiveModel, layer: int, entering: Tensor, tupled: Sequence[bool], rows: int) -> Iterator[None]:
    """Inside, the layers below `layer` are not computed: the last of them puts out `entering`, in so many rows."""
    skipped = live.layers[:layer]
    before = {module: vars(module).get("forward") for module in skipped}
    held = entering.expand(rows, -1, -1)

    def standing_in(at: int) -> Callable[..., Any]:
        def forward(*arguments: Any, **keywords: Any) -> Any:
            out = held if at == layer - 1 else hidden_in(arguments, keywords)
            return (out,) if tupled[at] else out

        return forward

    for at, module in enumerate(skipped):
        module.forward = standing_in(at)
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:  # accelerate's hooks on models that are spread over devices stand here
                module.forward = forward


def _prefix_cache(reader: _Reader, prefix: Tensor) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache(config=reader.live.model.config.get_text_config())
    reader.live.body(input_ids=prefix, attention_mask=torch.ones_like(prefix), past_key_values=cache, use_cache=True)
    return cache


def _restore(cache: Any, kept: Sequence[dict[str, Any]], rows: int) -> None:
    """The cache as it was behind the prefix, in so many rows. Updates make new tensors, so the old ones are whole."""
    for layer, state in zip(cache.layers, kept, strict=True):
        vars(layer).clear()
        vars(layer).update(state)
        layer.keys = state["keys"].expand(rows, *state["keys"].shape[1:])
        layer.values = state["values"].expand(rows, *state["values"].shape[1:])


@torch.inference_mode()
def _fastest(reader: _Reader, sequence: TokenSequence, last: int | None) -> Method:
    """A cached prefix where it can be used and gives the plain forward's logit, else resumed layers."""
    from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

    ids = torch.tensor([sequence.before_answer], device=reader.live.device)
    if last is None or last >= ids.shape[1] or reader.live.skipped:
        return "resumed layers"
    cache = _prefix_cache(reader, ids[:, :-last])
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or isinstance(layer, LinearAttentionCacheLayerMixin):
            return "resumed layers"
        if not layer.is_initialized:  # layers that share another's keys and values
            return "resumed layers"
    plain, behind = reader.logits(ids), reader.logits(ids[:, -last:], cache)
    dtype = reader.live.model.dtype
    size = float(reader.weight.norm()) if dtype not in AGREEMENT else max(1.0, float(plain.abs()))
    near = float((plain - behind).abs()) <= AGREEMENT.get(dtype, 5e-2) * size
    return "cached prefix" if near else "resumed layers"


def _check(
    live: LiveModel, sequences: Sequence[TokenSequence], heads: Sequence[Head], ablation: Ablation, last: int | None
) -> None:
    if not sequences:
        raise SurgeryError("no example is left to ablate on", where=live.name)
    if not heads:
        raise usage_error("no head was given.")
    missing = [head for head in heads if head.layer not in live.projections]
    missing += [h for h in heads if h.layer in live.projections and h.index >= live.projections[h.layer].n_heads]
    if missing:
        raise usage_error(f"has no head {missing[0]}", where=live.name)
    shortest = min(len(sequence.before_answer) for sequence in sequences)
    if last is not None and not 0 < last <= shortest:
        raise usage_error(f"got {last}, expected 1 to {shortest}, the tokens of the shortest example", where="last")
    if ablation.values is not None and last is None and any(rows.shape[1] != 1 for rows in ablation.values.values()):
        raise usage_error("values for the last positions cannot stand for all positions", where="ablation")


def _editing(factor: Tensor, addend: Tensor | None) -> Callable[..., Any]:
    def edit(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        z = hidden_in(arguments, keywords)
        z = z * factor.to(z)
        return (z if addend is None else z + addend.to(z), *arguments[1:]), keywords

    return edit
