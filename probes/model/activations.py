"""Read hidden states of token sequences, or their projections on directions, in forward passes without logits.

Hooks read each layer's input and the final norm's output, and keep only the wanted positions, on their device. No list
of all hidden states is kept, and any attention kernel will do. Depth l is the residual stream before layer l (l = 0:
the embeddings); the last depth is the final norm's output, as in transformers' `hidden_states`.

Shapes: N sequences, T tokens, K positions, L depths, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from probes.data.examples import TokenSequence
from surgery.errors import SurgeryError, usage_error
from surgery.models.loaded_model import LoadedModel, hidden_in, hidden_out, hooks
from surgery.runtime.collectives import map_over_ranks
from surgery.runtime.environment import n_processes
from surgery.runtime.progress import Progress, silent

# Tokens in a batch, padding included. On a CPU larger batches are 5 to 30 % slower (activations leave its caches:
# measured at widths of 64 to 1024); a GPU tries the larger number first and halves it until the heaviest batch fits.
CPU_TOKENS, GPU_TOKENS = 1024, 65536

Padding = Literal["right", "left"]
StateHook = Callable[[int, Tensor], None]  # called with (depth, hidden states (N, T, D))


@dataclass(frozen=True)
class TokenBatch:
    """Sequences of similar length, padded.

    numbers: which of the sequences they are. ids, mask: (N, T) int64 on the CPU.
    firsts: (N,) the column of each sequence's first token: 0 unless padding is on the left.
    """

    numbers: tuple[int, ...]
    ids: Tensor
    mask: Tensor
    firsts: Tensor

    @property
    def n_tokens(self) -> int:
        """The number of tokens, padding included."""
        return self.ids.numel()

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Return the model's inputs. Positions count from each sequence's first token."""
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        return {
            "input_ids": self.ids.to(device),
            "attention_mask": self.mask.to(device),
            "position_ids": positions.to(device),
        }


def make_batches(
    sequences: Sequence[Sequence[int]], *, max_tokens: int, pad_id: int = 0, padding: Padding = "right"
) -> list[TokenBatch]:
    """Batch sequences of ids, longest first, with at most `max_tokens` tokens (or one longer sequence) each."""
    # Ties are broken by number: all processes must make the same batches.
    order = sorted(range(len(sequences)), key=lambda number: (-len(sequences[number]), number))
    batches = []
    start = 0
    while start < len(order):
        # Sorted by length, the first of a batch is its longest: padding is counted in.
        count = max(1, max_tokens // max(len(sequences[order[start]]), 1))
        numbers = order[start : start + count]
        batches.append(_pad(numbers, [sequences[number] for number in numbers], pad_id, padding))
        start += count
    return batches


def token_budget(live: LoadedModel, longest: int, trial: Callable[[int], object], *, start: int | None = None) -> int:
    """Return how many tokens a batch may have: on a GPU the number is halved until `trial` fits the memory.

    With several processes it is what fits all of them, because they must make the same batches.

    Args:
        longest: tokens of the longest sequence, which every batch must have room for.
        trial: runs the phase that needs most memory with so many tokens.
        start: the number to try first.

    Raises:
        SurgeryError: not even one sequence fits.
    """
    # Main memory is not tried: running out of it ends the process instead of raising an error.
    if live.device.type != "cuda":
        return max(start or CPU_TOKENS, longest)

    def fitting(process: int) -> int:
        tokens = max(start or GPU_TOKENS, longest)
        while True:
            try:
                trial(tokens)
            except torch.OutOfMemoryError as error:
                if tokens <= longest:
                    raise SurgeryError(
                        f"one sequence of {longest:,} tokens does not fit the memory of {live.device}",
                        where=live.name,
                        hint="Use --device auto, which spreads the model, or shorter examples.",
                    ) from error
            else:
                return tokens
            # Outside the handler: the error refers to the failed pass's tensors, which would not be freed.
            torch.cuda.empty_cache()
            tokens = max(tokens // 2, longest)

    return min(map_over_ranks(range(n_processes()), fitting))


def fitting_batches(
    live: LoadedModel,
    ids: Sequence[Sequence[int]],
    work: Callable[[TokenBatch], object],
    *,
    max_tokens: int | None = None,
    padding: Padding = "right",
) -> list[TokenBatch]:
    """Return batches of `max_tokens`, or if None of as many tokens as `work` fits the memory with (`token_budget`)."""
    longest = max((len(sequence) for sequence in ids), default=1)

    def trial(tokens: int) -> None:
        rows = max(1, tokens // longest)
        work(_pad([0] * rows, [[0] * longest] * rows, 0, padding))

    budget = token_budget(live, longest, trial) if max_tokens is None else max_tokens
    return make_batches(ids, max_tokens=budget, padding=padding)


@torch.inference_mode()
def run_with_hooks(
    live: LoadedModel, batch: TokenBatch, hook: StateHook, *, depths: Sequence[int] | None = None
) -> None:
    """Run a forward pass without logits, and call `hook` with the hidden states of every depth, or of `depths`.

    Raises:
        SurgeryError: the model keeps no residual stream of one vector per token (Gemma 3n has several).
    """
    wanted = range(live.n_depths) if depths is None else depths
    # Checked at every depth: a family with several streams would silently give rows of the wrong token.
    expected = (*batch.ids.shape, live.width)

    def checked(depth: int, hidden: Tensor) -> None:
        if hidden.shape != expected:
            raise SurgeryError(
                f"the hidden states at depth {depth} have shape {tuple(hidden.shape)}, expected {expected}: it keeps "
                "another residual stream than one vector per token",
                where=live.name,
            )
        hook(depth, hidden)

    handles = []
    for depth in wanted:
        if depth < len(live.layers):
            handles.append(live.layers[depth].register_forward_pre_hook(_input_hook(depth, checked), with_kwargs=True))
        else:
            handles.append(live.final_norm.register_forward_hook(_output_hook(depth, checked)))
    with hooks(*handles):
        live.body(**batch.inputs(live.device), use_cache=False)


def hidden_states_at(
    live: LoadedModel,
    sequences: Sequence[TokenSequence],
    positions: Sequence[Sequence[int]],
    *,
    max_tokens: int | None = None,
    padding: Padding = "right",
    progress: Progress = silent,
) -> Tensor:
    """Return hidden states at K positions of each sequence, at all depths: (N, K, L, D) fp32 on the CPU.

    Args:
        positions: N × K positions in the sequence, each below its length.
        max_tokens: in a batch, padding included; None tries what fits.

    Raises:
        SurgeryError: a position is not in its sequence; or as `token_budget`.
    """
    for sequence, row in zip(sequences, positions, strict=True):
        wrong = [position for position in row if not 0 <= position < len(sequence.ids)]
        if wrong or len(row) != len(positions[0]):
            what = f"position {wrong[0]}" if wrong else f"{len(row)} positions, where others have {len(positions[0])},"
            raise usage_error(f"got {what} for a sequence of {len(sequence.ids)} tokens", where=sequence.key)
    if not sequences:
        raise SurgeryError("no example is left to read states of", where=live.name)
    shape = (len(sequences), len(positions[0]), live.n_depths, live.width)
    states = torch.empty(shape, dtype=torch.float32)
    work = partial(_states, live, torch.tensor([list(row) for row in positions]))
    ids = [sequence.ids for sequence in sequences]
    batches = fitting_batches(live, ids, work, max_tokens=max_tokens, padding=padding)
    rows = map_over_ranks(batches, work, label="Reading states", size=_n_sequences, progress=progress)
    for batch, batch_states in zip(batches, rows, strict=True):
        states[list(batch.numbers)] = batch_states
    return states


def project_hidden_states(
    live: LoadedModel,
    sequences: Sequence[TokenSequence],
    weights: Tensor,
    biases: Tensor,
    *,
    max_tokens: int | None = None,
    padding: Padding = "right",
    progress: Progress = silent,
) -> list[Tensor]:
    """Return w_l·h + b_l at every position and depth of each sequence: N × (T, L) fp32 on the CPU.

    The states themselves never leave their device.

    Args:
        weights: (L, D). biases: (L,).
    """
    work = partial(_projections, live, weights, biases)
    ids = [sequence.ids for sequence in sequences]
    batches = fitting_batches(live, ids, work, max_tokens=max_tokens, padding=padding)
    rows = map_over_ranks(batches, work, label="Tracing", size=_n_sequences, progress=progress)
    by_number: dict[int, Tensor] = {}
    for batch, batch_rows in zip(batches, rows, strict=True):
        by_number |= dict(zip(batch.numbers, batch_rows, strict=True))
    return [by_number[number] for number in range(len(sequences))]


def _states(live: LoadedModel, positions: Tensor, batch: TokenBatch) -> Tensor:
    columns_NK = positions[list(batch.numbers)] + batch.firsts.unsqueeze(1)
    rows_N1 = torch.arange(len(columns_NK)).unsqueeze(1)
    by_depth: dict[int, Tensor] = {}

    def keep(depth: int, hidden: Tensor) -> None:
        by_depth[depth] = hidden[rows_N1.to(hidden.device), columns_NK.to(hidden.device)].float()

    run_with_hooks(live, batch, keep)
    return torch.stack([by_depth[depth].cpu() for depth in range(live.n_depths)], dim=2)


def _projections(live: LoadedModel, weights: Tensor, biases: Tensor, batch: TokenBatch) -> list[Tensor]:
    by_depth: dict[int, Tensor] = {}

    def keep(depth: int, hidden: Tensor) -> None:
        by_depth[depth] = hidden.float() @ weights[depth].to(hidden.device) + biases[depth].to(hidden.device)

    run_with_hooks(live, batch, keep)
    scores_NTL = torch.stack([by_depth[depth].cpu() for depth in range(live.n_depths)], dim=2)
    lengths = batch.mask.sum(1).tolist()
    firsts = batch.firsts.tolist()
    return [
        # Cloned: a view would keep the whole batch in memory.
        scores_NTL[row, first : first + n].clone()
        for row, (first, n) in enumerate(zip(firsts, lengths, strict=True))
    ]


def _pad(numbers: Sequence[int], rows: Sequence[Sequence[int]], pad_id: int, padding: Padding) -> TokenBatch:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    firsts = torch.zeros(len(rows), dtype=torch.long)
    for index, row in enumerate(rows):
        first = width - len(row) if padding == "left" else 0
        ids[index, first : first + len(row)] = torch.tensor(list(row))
        mask[index, first : first + len(row)] = 1
        firsts[index] = first
    return TokenBatch(tuple(numbers), ids, mask, firsts)


def _n_sequences(batch: TokenBatch) -> int:
    return len(batch.numbers)


def _input_hook(depth: int, hook: StateHook) -> Callable[..., None]:
    def see(module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        hook(depth, hidden_in(arguments, keywords))

    return see


def _output_hook(depth: int, hook: StateHook) -> Callable[..., None]:
    def see(module: torch.nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        hook(depth, hidden_out(output))

    return see
