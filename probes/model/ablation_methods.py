"""Three methods to ablate heads one by one on a sequence, from the fastest to the reference, and the choice among them.

- `cached prefix`: for ablation at the last few positions. Keys and values of the prefix are computed once; then each
  layer is resumed on the last positions with a row per head: (layers + 1) short passes instead of layers × heads long
  ones.
- `resumed layers`: for ablation at all positions, where the prefix changes too. Each layer is resumed on the whole
  sequence, with a row per head; layers below it are not computed again.
- `one forward per head`: the reference.

Shapes: B rows of a batch, T tokens, K last positions, D width, W = heads · head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from probes.data.examples import TokenSequence
from probes.model.cached_forward import (
    ProbeForward,
    cache_state,
    prefill,
    restore_cache,
    why_not_cacheable,
    why_not_resumable,
)
from surgery.checkpoint.selectors import Head
from surgery.errors import usage_error
from surgery.models.forward_pass import replace_input
from surgery.models.loaded_model import OutputProjection, hidden_in, hooks

Method = Literal["cached prefix", "resumed layers", "one forward per head"]
METHODS: tuple[Method, ...] = get_args(Method)  # the fastest first


@dataclass(frozen=True)
class HeadEdit:
    """The edit of an ablated head's output z on one sequence: z ← scale · z, or z ← its slice of `values`.

    values: layer → (K or 1, W). last: edit only so many last positions; None for all.
    """

    scale: float
    values: Mapping[int, Tensor] | None
    last: int | None

    def register(self, projection: OutputProjection, heads: Sequence[Head]) -> Any:
        """Hook the projection so that row i of the batch has head i edited; return the handle."""

        def edit(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            # Cloned: the edit is in place, and other modules may read the same tensor.
            z = hidden_in(arguments, keywords).clone()
            # Behind a cached prefix z has only the last positions: all of them are edited.
            first = 0 if self.last is None else max(z.shape[1] - self.last, 0)
            for row, head in enumerate(heads):
                block = projection.block(head.index)
                if self.values is None:
                    z[row, first:, block] *= self.scale
                else:
                    z[row, first:, block] = self.values[projection.layer][:, block].to(z)
            return (z, *arguments[1:]), keywords

        return projection.module.register_forward_pre_hook(edit, with_kwargs=True)


@dataclass(frozen=True)
class SequenceAblation:
    """Ablates each of `heads` by itself on one sequence, `ids` (1, T).

    max_tokens: rows × tokens of a batch.
    """

    forward: ProbeForward
    ids: Tensor
    heads: tuple[Head, ...]
    edit: HeadEdit
    max_tokens: int

    @torch.inference_mode()
    def run(self, method: Method) -> tuple[Tensor, Tensor]:
        """Return the probe's logit without ablation, (), and with each head ablated, (heads,), on the CPU."""
        methods = {
            "cached prefix": self._with_cached_prefix,
            "resumed layers": self._with_resumed_layers,
            "one forward per head": self._with_full_forwards,
        }
        base, ablated = methods[method]()
        return base.cpu(), ablated.cpu()

    def _with_cached_prefix(self) -> tuple[Tensor, Tensor]:
        assert self.edit.last is not None
        prefix, tail = self.ids[:, : -self.edit.last], self.ids[:, -self.edit.last :]
        cache = prefill(self.forward.live, prefix)
        state = cache_state(cache)
        base, inputs, tupled = self.forward.inputs(tail, cache)

        def logits(rows: Tensor) -> Tensor:
            restore_cache(cache, state, len(rows))
            return self.forward.logits(rows, cache)

        return base[0], self._resume_each_layer(tail, inputs, tupled, logits)

    def _with_resumed_layers(self) -> tuple[Tensor, Tensor]:
        base, inputs, tupled = self.forward.inputs(self.ids)
        return base[0], self._resume_each_layer(self.ids, inputs, tupled, self.forward.logits)

    def _with_full_forwards(self) -> tuple[Tensor, Tensor]:
        base = self.forward.logits(self.ids)
        ablated = []
        for head in self.heads:
            with hooks(self.edit.register(self.forward.live.projections[head.layer], [head])):
                ablated.append(self.forward.logits(self.ids)[0])
        return base[0], torch.stack(ablated)

    def _resume_each_layer(
        self, ids: Tensor, inputs: Sequence[Tensor], tupled: Sequence[bool], logits: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the logits with each head ablated: a batch per layer, whose rows differ in the ablated head.

        Args:
            ids: (1, T), the positions to run. inputs: of each layer at these positions, (1, T, D).
            logits: runs the model on ids (B, T).
        """
        live = self.forward.live
        # Keys and values of a cached prefix take memory, too: the rows are counted by the whole sequence.
        size = max(1, self.max_tokens // self.ids.shape[1])
        ablated = torch.empty(len(self.heads), device=ids.device)
        for layer in sorted({head.layer for head in self.heads}):
            numbers = [number for number, head in enumerate(self.heads) if head.layer == layer]
            for start in range(0, len(numbers), size):
                batch = numbers[start : start + size]
                handle = self.edit.register(live.projections[layer], [self.heads[number] for number in batch])
                # A copy for every row, because some families add to the residual stream in place.
                rows = inputs[layer].expand(len(batch), -1, -1).contiguous()
                with replace_input(live, layer, rows, tupled), hooks(handle):
                    ablated[batch] = logits(ids.expand(len(batch), -1)).to(ablated)
        return ablated


def choose_method(
    forward: ProbeForward, sequences: Sequence[TokenSequence], last: int | None, requested: Method | None
) -> Method:
    """Return the requested method, or the fastest that gives the reference's results.

    Raises:
        SurgeryError: the requested method is unknown, or would give other results.
    """
    if requested is not None and requested not in METHODS:
        raise usage_error(f"got {requested!r}, expected {' or '.join(METHODS)}", where="method")
    for method in METHODS if requested is None else (requested,):
        reason = _why_wrong(forward, sequences, last, method)
        if reason is None:
            return method
        if requested is not None:
            raise usage_error(
                f"{method!r} would be wrong: {reason}",
                where=forward.live.name,
                hint="Leave the method to choose itself.",
            )
    raise AssertionError("the reference is never wrong")


def _why_wrong(
    forward: ProbeForward, sequences: Sequence[TokenSequence], last: int | None, method: Method
) -> str | None:
    """Return why `method` would not give what plain forward passes give; None if it does."""
    if method == "one forward per head":
        return None
    lengths = [len(sequence.before_answer) for sequence in sequences]
    # Tested on the longest: only there do positions fall outside of a sliding window.
    ids = torch.tensor([sequences[lengths.index(max(lengths))].before_answer], device=forward.live.device)
    if method == "resumed layers":
        return why_not_resumable(forward, ids)
    if last is None:
        return "a cached prefix only serves ablation at the last positions"
    if last >= min(lengths):
        return f"nothing stands before the last {last} tokens of the shortest example"
    return why_not_cacheable(forward, ids, last)
