"""Decompose a model's residual stream by recording one short run.

For every layer, find the chains of modules whose output is added to the residual stream (attention, the feed-forward
block, followed by a norm in some families), and fold the final norm into a linear map given its scale. With those,
w·norm(h_L) is a sum over heads, blocks and the embedding, exactly.

No family is listed. Which output is which module's input is seen from the tensors' identity, and the result is checked:
a layer's output must be its input plus its writes (times one factor, in families that scale their branches).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from probes.model.folded_norm import FoldedNorm, fold_norm
from surgery.errors import SurgeryError, listing
from surgery.models.loaded_model import LoadedModel, hidden_in, hidden_out, hooks

# Relative errors that rounding may leave; a structure that is understood wrongly leaves errors as large as the values.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.float16: 2e-2, torch.bfloat16: 6e-2}
# How many roundings a sum of a layer's writes may be off by.
ROUNDINGS = 4
TRIAL_TOKENS = 5


@dataclass(frozen=True)
class ResidualWrite:
    """A vector that a layer adds to the residual stream at every position.

    modules: the chain that computes it: the block itself, then the norms after it. The last one's output is added.
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
    """The residual stream: h_{l+1} = h_l + factor_l · Σ writes_l, and the final norm.

    attention: layer → the write that its heads are part of.
    """

    writes: tuple[tuple[ResidualWrite, ...], ...]
    factors: tuple[float, ...]
    attention: Mapping[int, ResidualWrite]
    final: FoldedNorm


def trace_residual_stream(live: LoadedModel) -> ResidualStream:
    """Run the model on a few tokens, and return how its residual stream is made.

    Raises:
        SurgeryError: some layer's output is not its input plus what its modules output, or the final norm is not linear
            up to its scale.
    """
    recorder = _Recorder.run(live)
    before, after = recorder.final_norm
    tolerance = TOLERANCE.get(before.dtype, TOLERANCE[torch.bfloat16])
    final = fold_norm(live.final_norm, live.width)
    not_plain = [] if final.fits(before.float(), after.float(), tolerance) else ["the final norm"]
    writes, factors, attention = [], [], {}
    for index, layer in enumerate(recorder.layers):
        layer_writes = _find_writes(layer, live.width, tolerance)
        factor = _find_factor(layer_writes, layer)
        if factor is None:
            not_plain.append(f"layer {index}")
        writes.append(layer_writes)
        factors.append(1.0 if factor is None else factor)
        if index in live.projections:
            own = _attention_write(layer_writes, layer, live.projections[index].module, tolerance)
            if own is None:
                not_plain.append(f"the attention of layer {index}")
            else:
                attention[index] = own
    if not_plain:
        raise SurgeryError(
            f"the residual stream is not a plain sum at {listing(not_plain, 4)}, so that the exact attribution of "
            "heads is not defined there",
            where=live.name,
            hint="Use --attribution paper, which only needs the output projections.",
        )
    return ResidualStream(tuple(writes), tuple(factors), attention, final)


@dataclass(frozen=True)
class _Call:
    """One call of a child module of a layer.

    inputs, output: the tensors themselves, whose identity shows which output is which input. Their values are read from
    the copies, because some families add to an output in place (Falcon).
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    output: Tensor
    input_copies: tuple[Tensor, ...]
    output_copy: Tensor


@dataclass
class _LayerRecord:
    """What one layer did: the calls of its children, its input (itself and a copy), and copies of its outputs."""

    calls: list[_Call] = field(default_factory=list)
    input: Tensor = field(default_factory=lambda: torch.empty(0))
    before: Tensor = field(default_factory=lambda: torch.empty(0))
    after: Tensor = field(default_factory=lambda: torch.empty(0))
    projected: Tensor = field(default_factory=lambda: torch.empty(0))

    def record_call(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        inputs = tuple(x for x in (*arguments, *keywords.values()) if isinstance(x, Tensor))
        hidden = hidden_out(output)
        self.calls.append(_Call(module, inputs, hidden, tuple(x.clone() for x in inputs), hidden.clone()))

    def record_input(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.input = hidden_in(arguments, keywords)
        self.before = self.input.clone()

    def record_output(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self.after = hidden_out(output).clone()

    def record_projection(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self.projected = hidden_out(output).clone()


@dataclass
class _Recorder:
    """The records of all layers, and the final norm's input and output."""

    layers: list[_LayerRecord]
    final_norm: tuple[Tensor, Tensor]

    @classmethod
    @torch.inference_mode()
    def run(cls, live: LoadedModel) -> _Recorder:
        """Run the model on a few tokens with hooks on all layers, their children, and the final norm."""
        layers = [_LayerRecord() for _ in live.layers]
        norms: list[tuple[Tensor, Tensor]] = []

        def record_norm(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            norms.append((hidden_in(arguments, keywords), hidden_out(output)))

        handles: list[Any] = [live.final_norm.register_forward_hook(record_norm, with_kwargs=True)]
        for layer, record in zip(live.layers, layers, strict=True):
            handles.append(layer.register_forward_pre_hook(record.record_input, with_kwargs=True))
            handles.append(layer.register_forward_hook(record.record_output))
            handles += [c.register_forward_hook(record.record_call, with_kwargs=True) for c in layer.children()]
        for index, projection in live.projections.items():
            handles.append(projection.module.register_forward_hook(layers[index].record_projection))
        with hooks(*handles):
            tokens = torch.arange(1, TRIAL_TOKENS + 1, device=live.device).unsqueeze(0)
            live.body(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        return cls(layers, norms[0])


@torch.inference_mode()
def _find_writes(layer: _LayerRecord, width: int, tolerance: float) -> tuple[ResidualWrite, ...]:
    """Return the chains whose last output is no other module's input."""
    # A module that returns its input unchanged (dropout that is off) computes nothing.
    calls = [call for call in layer.calls if not any(call.output is tensor for tensor in call.inputs)]
    by_output = {id(call.output): call for call in calls}
    consumed = {id(tensor) for call in calls for tensor in call.inputs}
    writes = []
    for call in calls:
        # What another module takes in is not added itself; the layer's input, handed through, is not written by it.
        if id(call.output) in consumed or call.output.shape[-1:] != (width,) or call.output is layer.input:
            continue
        chain, folds, current = [call.module], [], call
        # Backwards through the norms that follow a block.
        while (source := _only_source(current, by_output, layer.input)) is not None:
            fold = fold_norm(current.module, width) if _is_norm(current.module, width) else None
            if fold is None or not fold.fits(current.input_copies[0].float(), current.output_copy.float(), tolerance):
                break
            folds.append(fold)
            chain.append(source.module)
            current = source
        writes.append(ResidualWrite(tuple(reversed(chain)), tuple(reversed(folds))))
    return tuple(writes)


def _only_source(call: _Call, by_output: Mapping[int, _Call], layer_input: Tensor) -> _Call | None:
    sources = [by_output[id(x)] for x in call.inputs if id(x) in by_output and x is not layer_input]
    return sources[0] if len(sources) == 1 else None


def _is_norm(module: nn.Module, width: int) -> bool:
    shapes = [tuple(parameter.shape) for parameter in module.parameters()]
    return bool(shapes) and all(shape == (width,) for shape in shapes)


@torch.inference_mode()
def _find_factor(writes: tuple[ResidualWrite, ...], layer: _LayerRecord) -> float | None:
    """Return the factor on the writes; None if the layer's output is not its input plus factor times writes."""
    outputs = {call.module: call.output_copy for call in layer.calls}
    before, after = layer.before, layer.after
    parts = [outputs[write.end].float() for write in writes]
    if not parts or after.shape != before.shape or any(part.numel() != before.numel() for part in parts):
        return None
    parts = [part.view_as(before) for part in parts]  # some families flatten batch and tokens within a layer
    eps = max(torch.finfo(outputs[write.end].dtype).eps for write in writes)
    eps = max(eps, torch.finfo(after.dtype).eps)
    total = torch.stack(parts).sum(0)
    written = after.float() - before.float()
    # Rounding errors have the size of what is added up. Some dimensions of the stream are thousands of times larger
    # than others, whose errors would not be noticed beside them: hence errors relative to each element's size.
    size = before.float().abs() + torch.stack(parts).abs().sum(0)
    size = size.clamp(min=float(size.mean()) * 1e-6 + torch.finfo(torch.float32).tiny)
    written, total = written / size, total / size
    weight = float(total.square().sum())
    factor = float((written * total).sum()) / weight if weight else 1.0
    # A factor that differs from 1 by rounding alone is 1.
    if weight and abs(factor - 1) <= ROUNDINGS * eps * max(1.0, weight**-0.5):
        factor = 1.0
    error = float((written - factor * total).square().mean().sqrt())
    return factor if error <= ROUNDINGS * eps else None


@torch.inference_mode()
def _attention_write(
    writes: tuple[ResidualWrite, ...], layer: _LayerRecord, projection: nn.Module, tolerance: float
) -> ResidualWrite | None:
    """Return the write whose block contains the output projection; None if the block outputs something else than it."""
    # The block is a layer's child; the projection may be anywhere inside of it.
    own = next((write for write in writes if projection in set(write.block.modules())), None)
    if own is None:
        return None
    output = next(call.output_copy for call in layer.calls if call.module is own.block)
    if output.shape != layer.projected.shape:
        output = output.reshape(layer.projected.shape)
    error = (output.float() - layer.projected.float()).norm()
    return own if bool(error <= tolerance * layer.projected.float().norm()) else None
