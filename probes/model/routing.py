"""Which experts fire where: counts of routing decisions, by segment of the text and at the positions of markers.

In come token sequences and markers; out come whole numbers: per layer and expert at how many positions of each class it
was among the chosen, and how many positions there are. Counted on the device as the forward passes go by; nothing is
kept per token. Documents are dealt into a few blocks that are counted apart, so that intervals can be had of what is
computed from the counts: as many as keep the counts within 8 MB.

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

BLOCKS = 20  # enough for intervals
LEAST_BLOCKS = 4  # as few as intervals can be had of
MOST_BYTES = 8 << 20  # of the counts, on the device
PARTS = ("prompt", "thinking", "answer")
# The closing template is the end of the thinking.
PART_OF = {"prompt": 0, "thinking": 1, "closing": 1, "answer": 2}


@dataclass(frozen=True)
class Marker:
    """A token or phrase whose positions are counted apart, with its weight in the total score.

    spellings: the id sequences that it may stand as, such as with and without a space before it. An occurrence counts
        at its last token, by which the model has read all of it.
    """

    text: str
    weight: float
    spellings: tuple[tuple[int, ...], ...]

    def positions(self, ids: Sequence[int]) -> list[int]:
        """Where occurrences end in `ids`, ascending, each position once."""
        ends: set[int] = set()
        for spelling in self.spellings:
            at = -1
            # By the first token, which `index` finds at the speed of C: texts have millions of positions.
            for _ in range(ids.count(spelling[0])):
                at = ids.index(spelling[0], at + 1)
                if tuple(ids[at : at + len(spelling)]) == spelling:
                    ends.add(at + len(spelling) - 1)
        return sorted(ends)


@dataclass(frozen=True, eq=False)
class RoutingCounts:
    """hits: (G, L, E, P, C) int64: positions at which the expert is among the chosen; column 0 counts all positions of
    the part, the others those at which the marker ends. positions: (G, P, C), the same without regard to experts.

    layers: the numbers of the L layers. experts: how many each of them has, E at most. top_k: chosen per position.
    """

    hits: Tensor
    positions: Tensor
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    top_k: tuple[int, ...]
    sequences: int


def parse_marker(text: str, tokenizer: Any) -> Marker:
    """`<think>`, `-</think>` or `-0.5*Alternatively`: the text, and its weight, 1 where none is given.

    A word counts with and without a space before it.

    Raises:
        SurgeryError: the text is empty, the weight no number, or the vocabulary cannot spell it.
    """
    sign, rest = (-1.0, text[1:]) if text.startswith("-") else (1.0, text.removeprefix("+"))
    factor, star, word = rest.partition("*")
    try:
        weight, word = (sign * float(factor), word) if star else (sign, rest)
    except ValueError:
        weight, word = sign, rest  # a star that belongs to the marker
    if not word.strip():
        raise usage_error(f"got {text!r}, expected a marker such as '<think>' or '-</think>'", where="--token")
    spellings: list[tuple[int, ...]] = []
    for spelled in (word, f" {word}"):
        ids = tuple(tokenizer(spelled, add_special_tokens=False)["input_ids"])
        if ids and tokenizer.unk_token_id not in ids and ids not in spellings:
            spellings.append(ids)
    if not spellings:
        raise usage_error(f"{word!r} is not in the model's vocabulary", where="--token")
    return Marker(word, weight, tuple(spellings))


def block_count(n_layers: int, n_experts: int, n_markers: int) -> int:
    """How many blocks keep the counts within `MOST_BYTES`: from 4 to 20."""
    block = 8 * n_layers * (n_experts + 1) * len(PARTS) * (1 + n_markers)
    return max(LEAST_BLOCKS, min(BLOCKS, MOST_BYTES // block))


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
    """One pass over the sequences, prompt and response; every position counts.

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
    n_classes = len(PARTS) * (1 + len(markers))
    # One more expert than there are: what is counted there is dropped.
    size = n_blocks * n_classes * (widest + 1)
    hits: dict[int, Tensor] = {}
    positions = torch.zeros(n_blocks * n_classes, dtype=torch.int64)

    def work(batch: TokenBatch) -> None:
        token_A, class_A = _pairs(batch, sequences, markers, n_blocks)
        positions.index_add_(0, class_A, torch.ones_like(class_A))
        held: dict[torch.device, tuple[Tensor, Tensor]] = {}

        def see(layer: int, index: Tensor, weights: Tensor) -> None:
            if len(index) != batch.ids.numel():
                raise SurgeryError(
                    f"layer {layer} routes {len(index):,} tokens of {batch.ids.numel():,}", where=live.name
                )
            if index.device not in held:
                held[index.device] = token_A.to(index.device), (class_A * (widest + 1)).to(index.device)
            if layer not in hits:
                hits[layer] = torch.zeros(size, dtype=torch.int64, device=index.device)
            token, start = held[index.device]
            chosen_Ak = _once(index.long(), widest)[token]
            flat = (chosen_Ak + start[:, None]).flatten()
            hits[layer].index_add_(0, flat, torch.ones_like(flat))

        with torch.inference_mode(), intercept_routing(routers, see):
            live.body(**batch.inputs(live.device), use_cache=False)

    ids = [sequence.ids for sequence in sequences]

    def bare(
        batch: TokenBatch,
    ) -> None:  # what counting takes beside the pass itself is small, and a trial must not count
        with torch.inference_mode():
            live.body(**batch.inputs(live.device), use_cache=False)

    batches = fitting_batches(live, ids, bare, max_tokens=max_tokens)
    map_over_ranks(batches, work, label="Counting experts", size=lambda batch: len(batch.numbers), progress=progress)
    empty = torch.zeros(size, dtype=torch.int64)
    found = all_reduce_sum(torch.stack([hits[r.layer].cpu() if r.layer in hits else empty for r in routers]))
    shape = (len(PARTS), 1 + len(markers))
    by_block = found.view(len(routers), n_blocks, *shape, widest + 1)[..., :widest]
    return RoutingCounts(
        by_block.permute(1, 0, 4, 2, 3).contiguous(),
        all_reduce_sum(positions).view(n_blocks, *shape),
        tuple(router.layer for router in routers),
        tuple(router.n_experts for router in routers),
        tuple(router.top_k for router in routers),
        len(sequences),
    )


def _pairs(
    batch: TokenBatch, sequences: Sequence[TokenSequence], markers: Sequence[Marker], n_blocks: int
) -> tuple[Tensor, Tensor]:
    """Of each pair: its token's place in the flattened batch, and its class (A,) and (A,) int64. Padding is in none."""
    columns = 1 + len(markers)
    n_classes = len(PARTS) * columns
    width = batch.ids.shape[1]
    tokens, classes = [], []
    for row, (number, first) in enumerate(zip(batch.numbers, batch.firsts.tolist(), strict=True)):
        sequence = sequences[number]
        part_T = torch.empty(len(sequence.ids), dtype=torch.int64)
        for segment in SEGMENTS:
            span = sequence.span(segment)
            part_T[span.start : span.stop] = PART_OF[segment]
        class_T = number % n_blocks * n_classes + part_T * columns
        for column in range(columns):
            at = (
                torch.tensor(markers[column - 1].positions(sequence.ids), dtype=torch.int64)
                if column
                else torch.arange(len(sequence.ids))
            )
            tokens.append(row * width + first + at)
            classes.append(class_T[at] + column)
    return torch.cat(tokens), torch.cat(classes)


def _once(index: Tensor, none: int) -> Tensor:
    """index (T, k), each row in ascending order, with `none` for numbers beyond the experts, which some families have,
    and for repeated ones, so that a position counts once."""
    chosen = index.clamp(max=none).sort(1).values
    chosen[:, 1:].masked_fill_(chosen[:, 1:] == chosen[:, :-1], none)
    return chosen
