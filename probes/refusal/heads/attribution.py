"""What every attention head writes along the refusal probe: all heads of all layers scored in one forward pass.

Paper form (arXiv 2510.06036): s_{l,h} = W_O^l[:, block h] · z_{l,h} · ŵ, with ŵ = w/‖w‖. Taken as z_{l,h} · (W_Oᵀ ŵ)_h
it needs one vector per layer, made once. Exact form: the final norm is folded in, w⊙g/rms(h_L), as are norms that stand
behind attention; then heads, biases, feed-forward blocks and the embedding sum to the probe's logit, which is checked.
Never is an output projection's bias counted as a head's.

Shapes: N sequences, D width, H heads of a layer, W = H · head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

    paper, exact: layer → (N, H); exact in units of the probe's logit. `exact` and what follows are empty where the
        residual stream was not taken apart.
    logit: (N,) the probe's logit there. embedding: (N,). biases, blocks: (N, layers): what output projections' and
        norms' biases, and feed-forward blocks, write. constant: what the final norm's bias and the probe's add.
    inputs: layer → (N, W): z, what went into the output projection.
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
        """(N,) the sum of all parts: the logit, but for rounding."""
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
    """Scores all heads of all layers at the last token before the answer, in one pass over `sequences`.

    Args:
        weight, bias: the probe on the final norm's output; (D,) and a number.
        stream: how the residual stream is made (`residual.read_stream`); without it only the paper's form is given.

    Raises:
        SurgeryError: there is no sequence; or as `activations.token_budget`.
    """
    if not sequences:
        raise SurgeryError("no example is left to score heads on", where=live.name)
    ids = [sequence.before_answer for sequence in sequences]
    sight = _Sight(live, weight.float(), bias, stream)
    work = partial(_attribute, sight)
    batches = fitting_batches(live, ids, work, max_tokens=max_tokens)
    found = map_over_ranks(
        batches, work, label="Scoring heads", size=lambda batch: len(batch.numbers), progress=progress
    )
    order = torch.tensor([number for batch in batches for number in batch.numbers]).argsort()

    def joined(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))[order]

    return HeadAttribution(
        logit=joined([part.logit for part in found]),
        paper={layer: joined([part.paper[layer] for part in found]) for layer in live.projections},
        inputs={layer: joined([part.inputs[layer] for part in found]) for layer in live.projections},
        exact={layer: joined([part.exact[layer] for part in found]) for layer in found[0].exact},
        embedding=joined([part.embedding for part in found]),
        biases=joined([part.biases for part in found]),
        blocks=joined([part.blocks for part in found]),
        constant=found[0].constant,
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
    """z at the last positions before the answer: layer → (N, last, W) fp32 on the CPU.

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
        seen: dict[int, Tensor] = {}

        def keeping(layer: int) -> Any:
            def keep(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                z = hidden_in(arguments, keywords)
                seen[layer] = z[rows_N1.to(z.device), columns_NK.to(z.device)].float().cpu()

            return keep

        handles = [
            projection.module.register_forward_pre_hook(keeping(layer), with_kwargs=True)
            for layer, projection in live.projections.items()
        ]
        with hooks(*handles):
            live.body(**batch.inputs(live.device), use_cache=False)
        return seen

    found = map_over_ranks(
        batches, work, label="Reading heads", size=lambda batch: len(batch.numbers), progress=progress
    )
    order = torch.tensor([number for batch in batches for number in batch.numbers]).argsort()
    return {layer: torch.cat([part[layer] for part in found])[order] for layer in live.projections}


class _Sight:
    """The probe as seen from every place that writes to the residual stream; made once, used for every batch."""

    def __init__(self, live: LoadedModel, weight: Tensor, bias: float, stream: ResidualStream | None) -> None:
        self.live, self.stream = live, stream
        self.weight, self.bias = weight, bias
        self.direction = stream.final.pull_back(weight) if stream else weight
        unit = weight / weight.norm()
        self.paper: dict[int, Tensor] = {}
        self.exact: dict[int, Tensor] = {}
        for layer, projection in live.projections.items():
            matrix = projection.matrix
            self.paper[layer] = matrix.T @ unit.to(matrix.device)
            if stream:
                inner, _ = _through(stream.attention[layer], self.direction)
                self.exact[layer] = matrix.T @ inner.to(matrix.device)


def _through(piece: ResidualWrite, direction: Tensor) -> tuple[Tensor, list[float]]:
    """`direction` as seen from inside a piece's norms, and what each norm's bias adds, inner to outer."""
    constants = []
    for fold in reversed(piece.folds):
        constants.append(float(fold.bias @ direction))
        direction = fold.pull_back(direction)
    return direction, constants[::-1]


@torch.inference_mode()
def _attribute(sight: _Sight, batch: TokenBatch) -> HeadAttribution:
    live, stream = sight.live, sight.stream
    columns = batch.mask.sum(1) - 1 + batch.firsts
    rows = torch.arange(len(columns))
    seen: dict[tuple[nn.Module, str], Tensor] = {}

    def pick(values: Tensor) -> Tensor:
        return values[rows.to(values.device), columns.to(values.device)].float()

    def keep_input(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen[module, "in"] = pick(hidden_in(arguments, keywords))

    def keep_output(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        made = hidden_out(output)
        seen[module, "out"] = pick(made if made.dim() > 2 else made.view(*batch.ids.shape, -1))

    inputs = {p.module for p in live.projections.values()}
    outputs = {live.final_norm}
    if stream:
        inputs |= {live.final_norm, live.layers[0]}
        chains = [module for pieces in stream.writes for piece in pieces for module in piece.modules]
        outputs |= set(chains)
    handles = [m.register_forward_pre_hook(keep_input, with_kwargs=True) for m in inputs]
    handles += [m.register_forward_hook(keep_output) for m in outputs]
    with hooks(*handles):
        live.body(**batch.inputs(live.device), use_cache=False)

    z = {layer: seen[p.module, "in"] for layer, p in live.projections.items()}
    paper = {layer: _by_head(z[layer] * sight.paper[layer], live.projections[layer].n_heads) for layer in z}
    after = seen[live.final_norm, "out"].cpu()
    logit = after @ sight.weight + sight.bias
    count, n_layers = len(rows), len(live.layers)
    inputs_cpu = {layer: values.cpu() for layer, values in z.items()}
    paper_cpu = {layer: values.cpu() for layer, values in paper.items()}
    zeros = torch.zeros(count, n_layers)
    if stream is None:
        return HeadAttribution(logit, paper_cpu, inputs_cpu, {}, torch.zeros(count), zeros, zeros)

    scale = stream.final.scale(seen[live.final_norm, "in"].cpu(), after)
    embedding = scale * (seen[live.layers[0], "in"].cpu() @ sight.direction)
    biases, blocks, exact = zeros.clone(), zeros.clone(), {}
    for layer, pieces in enumerate(stream.writes):
        for piece in pieces:
            strength = scale * stream.factors[layer]
            if piece is not stream.attention.get(layer):
                blocks[:, layer] += strength * (seen[piece.end, "out"].cpu() @ sight.direction)
                continue
            projection = live.projections[layer]
            _, constants = _through(piece, sight.direction)
            for at in reversed(range(len(piece.folds))):
                # The bias of a norm is not scaled by that norm, only by those behind it.
                biases[:, layer] += strength * constants[at]
                before, behind = seen[piece.modules[at], "out"], seen[piece.modules[at + 1], "out"]
                strength = strength * piece.folds[at].scale(before, behind).cpu()
            if projection.bias is not None:
                inner, _ = _through(piece, sight.direction)
                biases[:, layer] += strength * float(projection.bias.cpu() @ inner)
            scores = _by_head(z[layer] * sight.exact[layer], projection.n_heads)
            exact[layer] = scores.cpu() * strength.unsqueeze(1)
    constant = float(stream.final.bias @ sight.weight) + sight.bias
    return HeadAttribution(logit, paper_cpu, inputs_cpu, exact, embedding, biases, blocks, constant)


def _by_head(values: Tensor, n_heads: int) -> Tensor:
    """(N, W) → (N, H), summed within each head's block."""
    return values.view(len(values), n_heads, -1).sum(-1)
