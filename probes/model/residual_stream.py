"""How what a layer's parts write reaches the probe: the residual stream taken apart by watching one short run.

In comes a live model, out comes a `ResidualStream`: for every layer the chain of modules whose output is added to the
residual stream (attention, the feed-forward block, with a norm behind them where the family has one), and the final
norm as a linear map given its scale. With those, w·norm(h_L) is a sum over heads, blocks and the embedding, exactly.

No family is listed. Which output goes into which input is seen from the tensors' identity; what is seen is checked:
a layer's output must be its input plus its pieces (times one factor, where the family scales its branches).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError, listing
from surgery.models.loaded_model import LoadedModel, hidden_in, hidden_out, hooks

# Relative errors that rounding may leave; another structure leaves errors of the size of the values.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.float16: 2e-2, torch.bfloat16: 6e-2}
# How many roundings a sum of a layer's parts may be off by.
ROUNDINGS = 4
TRIAL_TOKENS = 5


@dataclass(frozen=True)
class FoldedNorm:
    """norm(h) = s(h) · g ⊙ c(h) + bias, where c subtracts the mean if `centred` (LayerNorm) and s is one number.

    gain, bias: (D,) fp32 on the CPU.
    """

    gain: Tensor
    bias: Tensor
    centred: bool

    def back(self, direction: Tensor) -> Tensor:
        """The direction u with direction·norm(h) = s(h)·u·h + direction·bias.   (…, D) → (…, D)"""
        scaled = direction * self.gain.to(direction.device)
        return scaled - scaled.mean(-1, keepdim=True) if self.centred else scaled

    def scale(self, before: Tensor, after: Tensor) -> Tensor:
        """s of each row, from the norm's input and output by least squares.   (…, D), (…, D) → (…,)"""
        centred = before - before.mean(-1, keepdim=True) if self.centred else before
        expected = self.gain.to(before.device) * centred
        return ((after - self.bias.to(before.device)) * expected).sum(-1) / expected.square().sum(-1)

    def fits(self, before: Tensor, after: Tensor, tolerance: float) -> bool:
        """Whether the norm is what this says, on these inputs."""
        centred = before - before.mean(-1, keepdim=True) if self.centred else before
        bias = self.bias.to(before.device)
        found = self.scale(before, after).unsqueeze(-1) * self.gain.to(before.device) * centred + bias
        return bool((found - after).norm() <= tolerance * after.norm())


@dataclass(frozen=True)
class ResidualWrite:
    """One thing that a layer adds to the residual stream.

    modules: the chain that makes it, inner to outer: the block itself, then the norms behind it. The last one's
        output is what is added.
    folds: those norms as linear maps, in the same order.
    """

    modules: tuple[nn.Module, ...]
    folds: tuple[FoldedNorm, ...]

    @property
    def block(self) -> nn.Module:
        return self.modules[0]

    @property
    def end(self) -> nn.Module:
        return self.modules[-1]


@dataclass(frozen=True)
class ResidualStream:
    """The residual stream: h_{l+1} = h_l + factor_l · Σ pieces_l, and the final norm.

    attention: layer → the piece that its heads write.
    """

    pieces: tuple[tuple[ResidualWrite, ...], ...]
    factors: tuple[float, ...]
    attention: Mapping[int, ResidualWrite]
    final: FoldedNorm


@dataclass(frozen=True)
class _Call:
    """One run of a part. Who made and who takes in a tensor is told by `inputs` and `output` themselves; their values
    by copies, because some families add to an output in place (Falcon)."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    output: Tensor
    given: tuple[Tensor, ...]
    made: Tensor


@torch.inference_mode()
def trace_residual_stream(live: LoadedModel) -> ResidualStream:
    """Watches one short run and says how the residual stream is made.

    Raises:
        SurgeryError: some layer's output is not its input plus what its parts put out, or the final norm is none that
            is linear but for its scale.
    """
    calls: dict[int, list[_Call]] = {index: [] for index in range(len(live.layers))}
    entering: dict[int, Tensor] = {}
    starts: dict[int, Tensor] = {}
    ends: dict[int, Tensor] = {}
    norms: list[tuple[Tensor, Tensor]] = []
    outputs: dict[int, Tensor] = {}

    def watch(index: int) -> Any:
        def see(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            given = tuple(x for x in (*arguments, *keywords.values()) if isinstance(x, Tensor))
            made = hidden_out(output)
            calls[index].append(_Call(module, given, made, tuple(x.clone() for x in given), made.clone()))

        return see

    def watch_start(index: int) -> Any:
        def see(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            entering[index] = hidden_in(arguments, keywords)
            starts[index] = entering[index].clone()

        return see

    def watch_end(index: int) -> Any:
        def see(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            ends[index] = hidden_out(output).clone()

        return see

    def watch_norm(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        norms.append((hidden_in(arguments, keywords), hidden_out(output)))

    def watch_projection(index: int) -> Any:
        def see(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            outputs[index] = hidden_out(output).clone()

        return see

    handles: list[Any] = [live.final_norm.register_forward_hook(watch_norm, with_kwargs=True)]
    for index, layer in enumerate(live.layers):
        handles.append(layer.register_forward_pre_hook(watch_start(index), with_kwargs=True))
        handles.append(layer.register_forward_hook(watch_end(index)))
        handles += [child.register_forward_hook(watch(index), with_kwargs=True) for child in layer.children()]
    handles += [p.module.register_forward_hook(watch_projection(index)) for index, p in live.projections.items()]
    with hooks(*handles):
        tokens = torch.arange(1, TRIAL_TOKENS + 1, device=live.device).unsqueeze(0)
        live.body(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)

    tolerance = TOLERANCE.get(norms[0][0].dtype, TOLERANCE[torch.bfloat16])
    final = fold_norm(live.final_norm, live.width)
    before, after = norms[0]
    faults = []
    if not final.fits(before.float(), after.float(), tolerance):
        faults.append("the final norm")
    pieces, factors, attention = [], [], {}
    for index in range(len(live.layers)):
        found = _pieces(calls[index], entering[index], live.width, tolerance)
        factor = _factor(found, calls[index], starts[index], ends[index])
        if factor is None:
            faults.append(f"layer {index}")
            factor = 1.0
        pieces.append(found)
        factors.append(factor)
        if index in live.projections:
            own = next((p for p in found if live.projections[index].module in set(p.block.modules())), None)
            if own is None or not _writes(own, calls[index], outputs[index], tolerance):
                faults.append(f"the attention of layer {index}")
            else:
                attention[index] = own
    if faults:
        raise SurgeryError(
            f"the residual stream is not a plain sum at {listing(faults, 4)}, so that the exact attribution of heads "
            "is not defined there",
            where=live.name,
            hint="Use --attribution paper, which only needs the output projections.",
        )
    return ResidualStream(tuple(pieces), tuple(factors), attention, final)


@torch.inference_mode()
def fold_norm(norm: nn.Module, width: int) -> FoldedNorm:
    """Gain, bias and kind of a norm, from what it makes of three inputs: no family's formula is assumed."""
    parameter = next(norm.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    device = torch.device("cpu") if parameter is None else parameter.device
    signs = torch.ones(width, dtype=dtype, device=device)
    signs[1::2] = -1
    if width % 2:
        signs[-1] = 0  # so that the mean is 0 all the same
    other = signs.roll(1)
    plus, minus = hidden_out(norm(signs)).float(), hidden_out(norm(-signs)).float()
    shifted = hidden_out(norm(signs + 3)).float()
    bias = (plus + minus) / 2
    gain = (plus - minus) / 2 * signs.float()
    if width % 2:
        first, second = hidden_out(norm(other)).float(), hidden_out(norm(-other)).float()
        gain[-1] = ((first - second) / 2 * other.float())[-1]
    centred = bool((shifted - plus).norm() <= 1e-2 * plus.norm())
    return FoldedNorm(gain.cpu(), bias.cpu(), centred)


def _pieces(calls: list[_Call], layer_input: Tensor, width: int, tolerance: float) -> tuple[ResidualWrite, ...]:
    """The chains whose ends no other part of the layer takes in."""
    # A part that hands on its input unchanged (dropout that is off) makes nothing.
    making = [call for call in calls if not any(call.output is given for given in call.inputs)]
    by_output = {id(call.output): call for call in making}
    consumed = {id(given) for call in making for given in call.inputs}
    found = []
    for call in making:
        if id(call.output) in consumed or call.output.shape[-1:] != (width,) or call.output is layer_input:
            continue
        chain, folds, here = [call.module], [], call
        # Backwards through norms that stand behind a block.
        while (source := _source(here, by_output, layer_input)) is not None:
            fold = fold_norm(here.module, width) if _is_norm(here.module, width) else None
            if fold is None or not fold.fits(here.given[0].float(), here.made.float(), tolerance):
                break
            folds.append(fold)
            chain.append(source.module)
            here = source
        found.append(ResidualWrite(tuple(reversed(chain)), tuple(reversed(folds))))
    return tuple(found)


def _source(call: _Call, by_output: Mapping[int, _Call], layer_input: Tensor) -> _Call | None:
    made = [by_output[id(given)] for given in call.inputs if id(given) in by_output and given is not layer_input]
    return made[0] if len(made) == 1 else None


def _is_norm(module: nn.Module, width: int) -> bool:
    shapes = [tuple(parameter.shape) for parameter in module.parameters()]
    return bool(shapes) and all(shape == (width,) for shape in shapes)


def _factor(pieces: tuple[ResidualWrite, ...], calls: list[_Call], before: Tensor, after: Tensor) -> float | None:
    """The factor on the pieces, or None where the layer's output is not input plus factor times pieces."""
    outputs = {call.module: call.made for call in calls}
    parts = [outputs[piece.end].float() for piece in pieces]
    if not parts or after.shape != before.shape or any(part.numel() != before.numel() for part in parts):
        return None
    parts = [part.view_as(before) for part in parts]  # some families lay all tokens in one row
    eps = max(torch.finfo(outputs[piece.end].dtype).eps for piece in pieces)
    eps = max(eps, torch.finfo(after.dtype).eps)
    total = torch.stack(parts).sum(0)
    written = after.float() - before.float()
    # Rounding happens at the size of what is added up. Some dimensions of the stream are thousands of times larger
    # than others, and would drown what is written to those.
    size = before.float().abs() + torch.stack(parts).abs().sum(0)
    size = size.clamp(min=float(size.mean()) * 1e-6 + torch.finfo(torch.float32).tiny)
    written, total = written / size, total / size
    weight = float(total.square().sum())
    factor = float((written * total).sum()) / weight if weight else 1.0
    if weight and abs(factor - 1) <= ROUNDINGS * eps * max(1.0, weight**-0.5):
        factor = 1.0
    error = float((written - factor * total).square().mean().sqrt())
    return factor if error <= ROUNDINGS * eps else None


def _writes(piece: ResidualWrite, calls: list[_Call], projected: Tensor, tolerance: float) -> bool:
    """Whether what the attention block puts out is what its output projection made."""
    made = next(call.made for call in calls if call.module is piece.block)
    if made.shape != projected.shape:
        made = made.reshape(projected.shape)
    return bool((made.float() - projected.float()).norm() <= tolerance * projected.float().norm())
