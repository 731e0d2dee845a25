"""Direct logit attribution of attention heads to the refusal probe: all heads of all layers in one forward pass.

Paper form (arXiv 2510.06036): s_{l,h} = W_O^l[:, block h] · z_{l,h} · ŵ, with ŵ = w/‖w‖. Computed as
z_{l,h} · (W_Oᵀ ŵ)_h, which needs one vector for each layer, made once.

Exact form: the final norm is folded in, w⊙g/rms(h_L), and so are norms after attention. Heads, biases, feed-forward
blocks and the embedding then sum to the probe's logit, which callers check.

In both forms the bias of an output projection is not counted as a head's.

Shapes: N sequences, D width, H heads of a layer, W = H · head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from probes.data.examples import TokenSequence
from probes.model.activations import CPU_TOKENS, TokenBatch, fitting_batches, make_batches
from probes.model.residual_stream import ResidualStream, ResidualWrite
from surgery.errors import SurgeryError, usage_error
from surgery.models.loaded_model import LoadedModel, hidden_in, hidden_out, hooks
from surgery.runtime.collectives import map_over_ranks
from surgery.runtime.progress import Progress, silent


@dataclass(frozen=True)
class HeadAttribution:
    """What each part of the model writes along the probe at the last token before the answer.

    logit: (N,) the probe's logit there.
    paper: layer → (N, H), along the unit probe. inputs: layer → (N, W): z, the input of the output projection.
    exact: layer → (N, H), in units of the probe's logit; empty, as all that follows is 0, without a residual stream.
    embedding: (N,). biases: (N, layers), of output projections and of norms. blocks: (N, layers), of feed-forward
        blocks. constant: what the biases of the final norm and of the probe add.
    """

    logit: Tensor
    paper: Mapping[int, Tensor]
    inputs: Mapping[int, Tensor]
    exact: Mapping[int, Tensor]
    embedding: Tensor
    biases: Tensor
    blocks: Tensor
    constant: float = 0.0

    @property
    def total(self) -> Tensor:
        """(N,): the sum of all parts, which is the logit up to rounding."""
        heads = sum((scores.sum(1) for scores in self.exact.values()), torch.zeros_like(self.logit))
        return heads + self.embedding + self.biases.sum(1) + self.blocks.sum(1) + self.constant


def attribute_heads(
    live: LoadedModel,
    sequences: Sequence[TokenSequence],
    weight: Tensor,
    bias: float,
    *,
    stream: ResidualStream | None,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> HeadAttribution:
    """Score all heads of all layers at the last token before the answer, in one pass over `sequences`.

    Args:
        weight, bias: the probe on the final norm's output; (D,) and a number.
        stream: how the residual stream is made (`trace_residual_stream`); None leaves the exact form out.

    Raises:
        SurgeryError: there is no sequence; or as `fitting_batches`.
    """
    if not sequences:
        raise SurgeryError("no example is left to score heads on", where=live.name)
    ids = [sequence.before_answer for sequence in sequences]
    directions = _ProbeDirections(live, weight.float(), bias, stream)
    work = partial(_attribute_batch, directions)
    batches = fitting_batches(live, ids, work, max_tokens=max_tokens)
    results = map_over_ranks(
        batches, work, label="Scoring heads", size=lambda batch: len(batch.numbers), progress=progress
    )
    # Batches are made by length: this puts the examples back into their own order.
    order = torch.tensor([number for batch in batches for number in batch.numbers]).argsort()

    def join(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))[order]

    return HeadAttribution(
        logit=join([part.logit for part in results]),
        paper={layer: join([part.paper[layer] for part in results]) for layer in live.projections},
        inputs={layer: join([part.inputs[layer] for part in results]) for layer in live.projections},
        exact={layer: join([part.exact[layer] for part in results]) for layer in results[0].exact},
        embedding=join([part.embedding for part in results]),
        biases=join([part.biases for part in results]),
        blocks=join([part.blocks for part in results]),
        constant=results[0].constant,
    )


@torch.inference_mode()
def head_inputs(
    live: LoadedModel,
    sequences: Sequence[TokenSequence],
    last: int,
    *,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> dict[int, Tensor]:
    """Return z at the last positions before the answer: layer → (N, last, W) fp32 on the CPU.

    Raises:
        SurgeryError: there is no sequence, or one has fewer than `last` tokens before its answer.
    """
    if not sequences:
        raise SurgeryError("no example is left to read heads on", where=live.name)
    shortest = min(len(sequence.before_answer) for sequence in sequences)
    if not 0 < last <= shortest:
        raise usage_error(f"got {last}, expected 1 to {shortest}, the tokens of the shortest example", where="last")
    ids = [sequence.before_answer for sequence in sequences]
    batches = make_batches(ids, max_tokens=max_tokens or CPU_TOKENS)

    def work(batch: TokenBatch) -> dict[int, Tensor]:
        ends_N1 = (batch.mask.sum(1) + batch.firsts).unsqueeze(1)
        columns_NK = ends_N1 - last + torch.arange(last)
        rows_N1 = torch.arange(len(columns_NK)).unsqueeze(1)
        inputs: dict[int, Tensor] = {}

        def recorder(layer: int) -> Any:
            def record(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                z = hidden_in(arguments, keywords)
                inputs[layer] = z[rows_N1.to(z.device), columns_NK.to(z.device)].float().cpu()

            return record

        handles = [
            projection.module.register_forward_pre_hook(recorder(layer), with_kwargs=True)
            for layer, projection in live.projections.items()
        ]
        with hooks(*handles):
            live.body(**batch.inputs(live.device), use_cache=False)
        return inputs

    results = map_over_ranks(
        batches, work, label="Reading heads", size=lambda batch: len(batch.numbers), progress=progress
    )
    order = torch.tensor([number for batch in batches for number in batch.numbers]).argsort()
    return {layer: torch.cat([part[layer] for part in results])[order] for layer in live.projections}


class _ProbeDirections:
    """The probe's direction as it is at every place that writes to the residual stream; made once for all batches.

    direction: (D,) at the residual stream, through the final norm. unit: layer → (W,) and exact: layer → (W,), the
    directions at the inputs of the output projections, for the two forms.
    """

    def __init__(self, live: LoadedModel, weight: Tensor, bias: float, stream: ResidualStream | None) -> None:
        self.live, self.stream = live, stream
        self.weight, self.bias = weight, bias
        self.direction = stream.final.pull_back(weight) if stream else weight
        unit = weight / weight.norm()
        self.unit: dict[int, Tensor] = {}
        self.exact: dict[int, Tensor] = {}
        for layer, projection in live.projections.items():
            matrix = projection.matrix
            self.unit[layer] = matrix.T @ unit.to(matrix.device)
            if stream:
                inner, _ = _pull_back(stream.attention[layer], self.direction)
                self.exact[layer] = matrix.T @ inner.to(matrix.device)


def _pull_back(write: ResidualWrite, direction: Tensor) -> tuple[Tensor, list[float]]:
    """Return `direction` as it is inside a write's norms, and what each norm's bias adds, inner to outer."""
    constants = []
    for fold in reversed(write.folds):
        constants.append(float(fold.bias @ direction))
        direction = fold.pull_back(direction)
    return direction, constants[::-1]


@dataclass(frozen=True, eq=False)
class _Recording:
    """Inputs and outputs of modules at the last token before the answer: (N, D) or (N, W), fp32, where they ran."""

    inputs: dict[nn.Module, Tensor]
    outputs: dict[nn.Module, Tensor]


@torch.inference_mode()
def _attribute_batch(directions: _ProbeDirections, batch: TokenBatch) -> HeadAttribution:
    live, stream = directions.live, directions.stream
    recording = _record(live, stream, batch)
    z = {layer: recording.inputs[p.module] for layer, p in live.projections.items()}
    paper = {layer: _sum_by_head(z[layer] * directions.unit[layer], live.projections[layer].n_heads) for layer in z}
    logit = recording.outputs[live.final_norm].cpu() @ directions.weight + directions.bias
    n, n_layers = len(logit), len(live.layers)
    attribution = HeadAttribution(
        logit=logit,
        paper={layer: values.cpu() for layer, values in paper.items()},
        inputs={layer: values.cpu() for layer, values in z.items()},
        exact={},
        embedding=torch.zeros(n),
        biases=torch.zeros(n, n_layers),
        blocks=torch.zeros(n, n_layers),
    )
    return attribution if stream is None else _add_exact_form(attribution, directions, stream, recording)


def _record(live: LoadedModel, stream: ResidualStream | None, batch: TokenBatch) -> _Recording:
    """Run the model on a batch, and record what the attribution needs of the last token before each answer."""
    columns = batch.mask.sum(1) - 1 + batch.firsts
    rows = torch.arange(len(columns))
    recording = _Recording({}, {})

    def last_token(values: Tensor) -> Tensor:
        return values[rows.to(values.device), columns.to(values.device)].float()

    def record_input(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        recording.inputs[module] = last_token(hidden_in(arguments, keywords))

    def record_output(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        states = hidden_out(output)
        # Some mixture-of-experts blocks return all tokens in one dimension.
        recording.outputs[module] = last_token(states if states.dim() > 2 else states.view(*batch.ids.shape, -1))

    inputs = {projection.module for projection in live.projections.values()}
    outputs = {live.final_norm}
    if stream:
        inputs |= {live.final_norm, live.layers[0]}
        outputs |= {module for writes in stream.writes for write in writes for module in write.modules}
    handles = [module.register_forward_pre_hook(record_input, with_kwargs=True) for module in inputs]
    handles += [module.register_forward_hook(record_output) for module in outputs]
    with hooks(*handles):
        live.body(**batch.inputs(live.device), use_cache=False)
    return recording


def _add_exact_form(
    attribution: HeadAttribution, directions: _ProbeDirections, stream: ResidualStream, recording: _Recording
) -> HeadAttribution:
    """Return the attribution with the logit split into heads, embedding, biases and feed-forward blocks."""
    live = directions.live
    before = recording.inputs[live.final_norm].cpu()
    scale = stream.final.scale(before, recording.outputs[live.final_norm].cpu())
    biases, blocks, exact = torch.zeros_like(attribution.biases), torch.zeros_like(attribution.blocks), {}
    for layer, writes in enumerate(stream.writes):
        for write in writes:
            # Some families scale what a layer adds; the final norm scales everything.
            factor = scale * stream.factors[layer]
            # By identity: writes contain tensors, whose comparison has no single truth value.
            if write is stream.attention.get(layer):
                exact[layer], biases[:, layer] = _attribute_attention(layer, write, factor, directions, recording)
            else:
                blocks[:, layer] += factor * (recording.outputs[write.end].cpu() @ directions.direction)
    return replace(
        attribution,
        exact=exact,
        embedding=scale * (recording.inputs[live.layers[0]].cpu() @ directions.direction),
        biases=biases,
        blocks=blocks,
        constant=float(stream.final.bias @ directions.weight) + directions.bias,
    )


def _attribute_attention(
    layer: int, write: ResidualWrite, factor: Tensor, directions: _ProbeDirections, recording: _Recording
) -> tuple[Tensor, Tensor]:
    """Return what a layer's heads (N, H) and the biases after them (N,) write; `factor` (N,) scales the write."""
    projection = directions.live.projections[layer]
    inner, constants = _pull_back(write, directions.direction)
    biases = torch.zeros_like(factor)
    for at in reversed(range(len(write.folds))):
        # The bias of a norm is not scaled by that norm, only by those after it.
        biases += factor * constants[at]
        before, after = recording.outputs[write.modules[at]], recording.outputs[write.modules[at + 1]]
        factor = factor * write.folds[at].scale(before, after).cpu()
    if projection.bias is not None:
        biases += factor * float(projection.bias.cpu() @ inner)
    # Without the projection's bias, which belongs to no head.
    z = recording.inputs[projection.module]
    scores = _sum_by_head(z * directions.exact[layer], projection.n_heads)
    return scores.cpu() * factor.unsqueeze(1), biases


def _sum_by_head(values: Tensor, n_heads: int) -> Tensor:
    """(N, W) → (N, H): the sum within each head's block."""
    return values.view(len(values), n_heads, -1).sum(-1)
