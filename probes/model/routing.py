"""Count routing decisions of a mixture-of-experts model, by part of the text and at the positions of markers.

For each layer and expert: the number of positions of each class at which the expert is among the chosen, and the number
of positions. Decisions are counted on the device during the forward passes; nothing is stored per token. Documents are
assigned to a few blocks that are counted separately, so that intervals of what is computed from the counts can be
estimated by resampling blocks; there are as many blocks as keep the counts within 8 MB.

Legend: L layers with experts, E experts, P parts, C = 1 + markers, G blocks, T tokens, k experts per token; A pairs of
a token and a class (block, part and column) that it is counted in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probes.data.examples import SEGMENTS, TokenSequence
from probes.model.activations import TokenBatch, fitting_batches
from probes.model.routers import Router, intercept_routing
from surgery.errors import SurgeryError, usage_error
from surgery.models.loaded_model import LoadedModel
from surgery.runtime.collectives import all_reduce_sum, map_over_ranks
from surgery.runtime.progress import Progress, silent

MAX_BLOCKS = 20  # enough for intervals
MIN_BLOCKS = 4  # fewer give no useful intervals
MAX_BYTES = 8 << 20  # of the counts, on the device
PARTS = ("prompt", "thinking", "answer")
# The closing template is the end of the thinking.
PART_OF = {"prompt": 0, "thinking": 1, "closing": 1, "answer": 2}


@dataclass(frozen=True)
class Marker:
    """A token or phrase whose positions are counted separately, with its weight in the total score.

    spellings: its id sequences, such as with and without a space before it. An occurrence counts at its last token,
        where the model has read all of it.
    """

    text: str
    weight: float
    spellings: tuple[tuple[int, ...], ...]

    def positions(self, ids: Sequence[int]) -> list[int]:
        """Return the positions in `ids` at which occurrences end, ascending, each once."""
        ends: set[int] = set()
        for spelling in self.spellings:
            start = -1
            # By the first token, which `index` finds at the speed of C: texts have millions of positions.
            for _ in range(ids.count(spelling[0])):
                start = ids.index(spelling[0], start + 1)
                if tuple(ids[start : start + len(spelling)]) == spelling:
                    ends.add(start + len(spelling) - 1)
        return sorted(ends)


@dataclass(frozen=True, eq=False)
class RoutingCounts:
    """Counts of routing decisions.

    hits: (G, L, E, P, C) int64: positions at which the expert is among the chosen; column 0 counts all positions of the
        part, the others those at which the marker ends.
    positions: (G, P, C) int64: all positions of the part, and those at which the marker ends.
    layers: the numbers of the L layers. experts: how many each of them has, at most E. top_k: chosen per position.
    """

    hits: Tensor
    positions: Tensor
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    top_k: tuple[int, ...]
    sequences: int


def parse_marker(text: str, tokenizer: Any) -> Marker:
    """Parse `<think>`, `-</think>` or `-0.5*Alternatively`: a text and its weight, by default 1.

    A word counts with and without a space before it.

    Raises:
        SurgeryError: the text is empty, the weight no number, or the vocabulary cannot spell it.
    """
    # A minus is the weight's sign, not part of the marker: no model writes -<think>.
    sign, rest = (-1.0, text[1:]) if text.startswith("-") else (1.0, text.removeprefix("+"))
    factor, star, word = rest.partition("*")
    try:
        weight, word = (sign * float(factor), word) if star else (sign, rest)
    except ValueError:
        # The star belongs to the marker: what is before it is no number.
        weight, word = sign, rest
    if not word.strip():
        raise usage_error(f"got {text!r}, expected a marker such as '<think>' or '-</think>'", where="--token")
    spellings: list[tuple[int, ...]] = []
    # Most vocabularies have one token for a word at the start of a line and another for it after a space.
    for spelled in (word, f" {word}"):
        ids = tuple(tokenizer(spelled, add_special_tokens=False)["input_ids"])
        if ids and tokenizer.unk_token_id not in ids and ids not in spellings:
            spellings.append(ids)
    if not spellings:
        raise usage_error(f"{word!r} is not in the model's vocabulary", where="--token")
    return Marker(word, weight, tuple(spellings))


def block_count(n_layers: int, n_experts: int, n_markers: int) -> int:
    """Return how many blocks keep the counts within `MAX_BYTES`: from 4 to 20."""
    block_bytes = 8 * n_layers * (n_experts + 1) * len(PARTS) * (1 + n_markers)
    return max(MIN_BLOCKS, min(MAX_BLOCKS, MAX_BYTES // block_bytes))


def count_routing(
    live: LoadedModel,
    routers: Sequence[Router],
    sequences: Sequence[TokenSequence],
    markers: Sequence[Marker],
    *,
    blocks: int | None = None,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> RoutingCounts:
    """Count routing decisions in one pass over the sequences, prompt and response; every position counts.

    Sequence n belongs to block n modulo `blocks`, whatever the batches.

    Args:
        blocks: None for `block_count`.
        max_tokens: in a batch, padding included; None tries what fits.

    Raises:
        SurgeryError: there is no sequence; a marker never occurs in them; a layer routes other tokens than it is given.
    """
    if not sequences:
        raise SurgeryError("there is no text to count on", where=live.name)
    for marker in markers:
        if not any(marker.positions(sequence.ids) for sequence in sequences):
            raise usage_error(
                f"{marker.text!r} never occurs in {len(sequences)} texts",
                where="--token",
                hint="Check its spelling, or give texts in which the model uses it.",
            )
    widest = max(router.n_experts for router in routers)
    n_blocks = blocks or block_count(len(routers), widest, len(markers))
    counter = _RoutingCounter(live, routers, sequences, markers, n_blocks, widest)

    def trial(batch: TokenBatch) -> None:
        # The bare pass: a trial must not count, and counting needs little memory beside the pass itself.
        with torch.inference_mode():
            live.body(**batch.inputs(live.device), use_cache=False)

    batches = fitting_batches(live, [sequence.ids for sequence in sequences], trial, max_tokens=max_tokens)
    map_over_ranks(
        batches, counter.count, label="Counting experts", size=lambda batch: len(batch.numbers), progress=progress
    )
    return counter.result()


class _RoutingCounter:
    """Adds up routing decisions, flattened to one vector per layer on the layer's device.

    A class is a number (block, part, column) below `n_classes`; a vector has, for each class, one number per expert,
    and one more that takes up what is not to be counted.
    """

    def __init__(
        self,
        live: LoadedModel,
        routers: Sequence[Router],
        sequences: Sequence[TokenSequence],
        markers: Sequence[Marker],
        n_blocks: int,
        widest: int,
    ) -> None:
        self.live, self.routers, self.sequences, self.markers = live, routers, sequences, markers
        self.n_blocks, self.widest = n_blocks, widest
        self.n_columns = 1 + len(markers)
        self.n_classes = n_blocks * len(PARTS) * self.n_columns
        self.hits: dict[int, Tensor] = {}
        self.positions = torch.zeros(self.n_classes, dtype=torch.int64)

    def count(self, batch: TokenBatch) -> None:
        """Run the model on `batch` and add its routing decisions."""
        token_A, class_A = self._token_class_pairs(batch)
        self.positions.index_add_(0, class_A, torch.ones_like(class_A))
        # A model may be spread over several devices: the pairs are copied to each of them once.
        pairs: dict[torch.device, tuple[Tensor, Tensor]] = {}

        def see(layer: int, index: Tensor, weights: Tensor) -> None:
            if len(index) != batch.ids.numel():
                raise SurgeryError(
                    f"layer {layer} routes {len(index):,} tokens of {batch.ids.numel():,}", where=self.live.name
                )
            if index.device not in pairs:
                pairs[index.device] = token_A.to(index.device), (class_A * (self.widest + 1)).to(index.device)
            self._add(layer, index, *pairs[index.device])

        with torch.inference_mode(), intercept_routing(self.routers, see):
            self.live.body(**batch.inputs(self.live.device), use_cache=False)

    def result(self) -> RoutingCounts:
        """Return the counts, summed over all ranks."""
        empty = torch.zeros(self.n_classes * (self.widest + 1), dtype=torch.int64)
        # A rank without batches has no counts, and a layer may be on another device: zeros, and all on the CPU.
        hits = all_reduce_sum(torch.stack([self.hits.get(r.layer, empty).cpu() for r in self.routers]))
        shape = (len(PARTS), self.n_columns)
        by_block = hits.view(len(self.routers), self.n_blocks, *shape, self.widest + 1)[..., : self.widest]
        return RoutingCounts(
            by_block.permute(1, 0, 4, 2, 3).contiguous(),
            all_reduce_sum(self.positions).view(self.n_blocks, *shape),
            tuple(router.layer for router in self.routers),
            tuple(router.n_experts for router in self.routers),
            tuple(router.top_k for router in self.routers),
            len(self.sequences),
        )

    def _add(self, layer: int, index: Tensor, token_A: Tensor, start_A: Tensor) -> None:
        if layer not in self.hits:
            size = self.n_classes * (self.widest + 1)
            self.hits[layer] = torch.zeros(size, dtype=torch.int64, device=index.device)
        chosen_Ak = _distinct_experts(index.long(), self.widest)[token_A]
        flat = (chosen_Ak + start_A[:, None]).flatten()
        self.hits[layer].index_add_(0, flat, torch.ones_like(flat))

    def _token_class_pairs(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Return the pairs' tokens (places in the flattened batch) and classes: (A,), (A,) int64; none for padding."""
        width = batch.ids.shape[1]
        tokens, classes = [], []
        for row, (number, first) in enumerate(zip(batch.numbers, batch.firsts.tolist(), strict=True)):
            sequence = self.sequences[number]
            part_T = torch.empty(len(sequence.ids), dtype=torch.int64)
            for segment in SEGMENTS:
                span = sequence.span(segment)
                part_T[span.start : span.stop] = PART_OF[segment]
            # The sequence's own number, not its place in the batch: batches must not change the blocks.
            class_T = (number % self.n_blocks * len(PARTS) + part_T) * self.n_columns
            positions = [torch.arange(len(sequence.ids))]
            positions += [torch.tensor(m.positions(sequence.ids), dtype=torch.int64) for m in self.markers]
            for column, at in enumerate(positions):
                tokens.append(row * width + first + at)
                classes.append(class_T[at] + column)
        return torch.cat(tokens), torch.cat(classes)


def _distinct_experts(index: Tensor, none: int) -> Tensor:
    """Return index (T, k) with each row ascending, and `none` for what must not count.

    That is: repeated numbers, so that a position counts once; and numbers beyond the experts, which some families have.
    """
    chosen = index.clamp(max=none).sort(1).values
    chosen[:, 1:].masked_fill_(chosen[:, 1:] == chosen[:, :-1], none)
    return chosen
