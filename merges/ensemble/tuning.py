"""Fit how an ensemble combines its members: one weight per member, or a matrix on their hidden states.

The members are frozen; the fit starts exactly at the average. A fifth of the rows is not trained on: where the fitted
ensemble is no better there, the average is kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from merges.choices import TuneWhat
from merges.ensemble.ensemble_model import LogitEnsembleConfig, LogitEnsembleForCausalLM, combine, head_of
from surgery.checkpoint.checkpoint import Checkpoint, loadable_folder
from surgery.engine.options import ExecutionOptions
from surgery.engine.work.computation import torch_device
from surgery.errors import SurgeryError, usage_error
from surgery.io.input_files import read_given_text
from surgery.models.choices import SpecialTokens
from surgery.models.loading import load_tokenizer, load_weights
from surgery.models.special_tokens import encode_text, warn_of_special_tokens
from surgery.runtime.progress import Advance, Progress

HELD_OUT = 0.2  # share of the rows, on which the fitted ensemble is compared with the average
EPOCHS = 3
BATCH = 8  # rows
MAX_TOKENS = 512  # of a row; what comes after is cut
RATES = {"weights": 0.1, "head": 1e-4}  # Adam's: softmax logits move by whole units, matrices by little
IGNORED = -100
HEAD_FILE = "head.safetensors"
# Relative to the largest logit. A greater error is no rounding of a bf16 head: the logits are then not W·h + b.
EXACT = 1e-3
# Config keys of operations on the logits after the head, which no matrix can express.
AFTER_THE_HEAD = ("final_logit_softcapping",)


@dataclass(frozen=True)
class TuningRow:
    """One example; only `response` is trained on. Plain text is a response without a prompt."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Tuned:
    """The result of fitting. Losses are mean cross-entropies per token (nats) on the `held_out` rows.

    Args:
        before: loss of the average.
        after: loss of the fitted ensemble.
        kept: whether the fitted ensemble was better, and is written.
        head: the file of the fitted head, where there is one.
    """

    what: str
    rows: int
    held_out: int
    before: float
    after: float
    kept: bool
    weights: tuple[float, ...]
    fused_head: str = "none"
    head: Path | None = None

    def sentence(self) -> str:
        """Return the result in words, for the model card."""
        losses = f"held-out loss {self.before:.4f} with the average, {self.after:.4f} fitted"
        fitted = f"{self.what} fitted on {self.rows} rows, {losses} ({self.held_out} rows)"
        return f"{fitted}." if self.kept else f"{fitted}: no better, so the average was kept."

    def summary(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        return {key: getattr(self, key) for key in ("what", "rows", "held_out", "before", "after", "kept")}


@dataclass(frozen=True)
class TuningBatch:
    """Token ids, mask and labels, each (B, T); labels of tokens that are not trained on are `IGNORED`."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


Logits = Callable[[TuningBatch], Tensor]


def check_tuning(path: Path, what: str, mode: str, weights: Sequence[float]) -> list[TuningRow]:
    """Return the rows in `path`. Raises SurgeryError where they, or the options, cannot be used."""
    if what not in get_args(TuneWhat):
        raise usage_error(f"got {what!r}, expected one of {', '.join(get_args(TuneWhat))}", where="--tune-what")
    if what == "head" and mode != "logits":
        raise usage_error(
            f"a fused head averages logits, not {mode}", where="--tune-what head", hint="Leave --mode out."
        )
    if what == "weights" and min(weights) <= 0:
        raise usage_error("weights are fitted from a start above 0 each", where="--weight")
    return read_rows(path)


def read_rows(path: Path) -> list[TuningRow]:
    """Return the examples in a file of JSON lines, each with "text", or with "prompt" and "response".

    Raises:
        SurgeryError: the file cannot be read; a line is no such object; there are fewer than two rows.
    """
    lines = read_given_text(path).splitlines()
    rows = [_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if len(rows) < 2:
        raise SurgeryError(
            f"holds {len(rows)} row(s), expected two or more", where=path, hint="Some are fitted on, some held out."
        )
    return rows


def tune_members(
    config: Mapping[str, Any],
    checkpoints: Sequence[Checkpoint],
    rows: Sequence[TuningRow],
    what: TuneWhat,
    scratch: Path,
    special_tokens: SpecialTokens,
    *,
    options: ExecutionOptions,
) -> Tuned:
    """Load the members, fit, and write a fused head to `scratch`; `config` is the ensemble's config.json.

    Args:
        special_tokens: what special tokens in the rows are: text, or those tokens (parse), of which a warning tells.
        options: its device is that of the members.

    Raises:
        SurgeryError: a member cannot be loaded; the first has no tokenizer; no row has a token to learn.
    """
    place = torch_device(options.device)
    tokenizer = load_tokenizer(loadable_folder(checkpoints[0]), checkpoints[0].ref)
    if special_tokens == "parse":
        warn_of_special_tokens(tokenizer, (text for row in rows for text in (row.prompt, row.response)), where="--tune")
    model = LogitEnsembleForCausalLM(LogitEnsembleConfig(**config), [_load(one).to(place) for one in checkpoints])
    model.requires_grad_(False).eval()
    return tune(model, tokenizer, rows, what, scratch, progress=options.progress, special_tokens=special_tokens)


def tune(
    model: LogitEnsembleForCausalLM,
    tokenizer: Any,
    rows: Sequence[TuningRow],
    what: TuneWhat,
    scratch: Path,
    *,
    progress: Progress,
    seed: int = 0,
    special_tokens: SpecialTokens = "text",
) -> Tuned:
    """Fit weights or head of `model`, an ensemble without fused head; it is not changed itself.

    Raises:
        SurgeryError: no row has a token to learn; a member's logits are not W·h + b.
    """
    generator = torch.Generator().manual_seed(seed)
    # Shuffled, as files are often sorted by topic: the held-out rows are then of the same kinds as the others.
    order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    n_held_out = max(1, round(HELD_OUT * len(rows)))
    # No member may be run beyond the positions that it has.
    longest = min([MAX_TOKENS, *(_context(one.config) for one in model.models)])
    held_out, train = (
        list(_batches(part, tokenizer, longest, model.device, special_tokens))
        for part in (order[:n_held_out], order[n_held_out:])
    )

    def mean_logits(batch: TuningBatch, weights: Tensor | Sequence[float]) -> Tensor:
        return combine(model.member_logits(batch.input_ids, batch.attention_mask), weights, model.config.mode)

    theta = torch.tensor(model.config.weights, device=model.device).log().requires_grad_()  # of a softmax: sums to 1
    head = average_head(model, held_out[0]) if what == "head" else None

    def fitted(batch: TuningBatch) -> Tensor:
        if head is None:
            return mean_logits(batch, theta.softmax(0))
        logits: Tensor = head(model.hidden_states(batch.input_ids, batch.attention_mask))
        return logits

    optimizer = torch.optim.Adam([theta] if head is None else head.parameters(), lr=RATES[what])
    with progress("Fitting", EPOCHS * len(train) + 2 * len(held_out), "steps") as advance:
        before = _mean_loss(lambda batch: mean_logits(batch, model.config.weights), held_out, advance)
        for _ in range(EPOCHS):
            for i in torch.randperm(len(train), generator=generator).tolist():
                optimizer.zero_grad()
                _loss(fitted(train[i]), train[i], "mean").backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                advance(1)
        after = _mean_loss(fitted, held_out, advance)
    is_better = after < before  # not where it is NaN
    tuned = Tuned(what, len(rows) - n_held_out, n_held_out, before, after, is_better, tuple(model.config.weights))
    if not is_better:
        return tuned
    if head is None:
        return replace(tuned, weights=tuple(theta.detach().double().softmax(0).tolist()))
    path = scratch / HEAD_FILE
    save_file({name: value.cpu().contiguous() for name, value in head.state_dict().items()}, path, {"format": "pt"})
    return replace(tuned, fused_head="linear" if head.bias is None else "affine", head=path)


def average_head(model: LogitEnsembleForCausalLM, batch: TuningBatch) -> nn.Linear:
    """Return concat(wᵢ·Wᵢ), Σ wᵢ·bᵢ in fp32: (V, Σ Hᵢ), (V,). On the members' hidden states it gives the mean logits.

    Raises:
        SurgeryError: on `batch` it does not: a member does more to its logits than a matrix can.
    """
    n_rows, weights = model.config.vocab_size, model.config.weights
    for one in model.models:
        for key in AFTER_THE_HEAD:
            if getattr(one.config.get_text_config(decoder=True), key, None):
                raise _not_linear(f"{type(one).__name__} has {key}")
    heads = [head_of(one) for one in model.models]
    blocks = [weight * head.weight[:n_rows].float() for weight, head in zip(weights, heads, strict=True)]
    biases = [
        weight * head.bias[:n_rows].float()
        for weight, head in zip(weights, heads, strict=True)
        if getattr(head, "bias", None) is not None
    ]
    matrix = torch.cat([block.to(model.device) for block in blocks], dim=1)
    fused = nn.Linear(matrix.shape[1], n_rows, bias=bool(biases), device=model.device, dtype=torch.float32)
    with torch.no_grad():
        fused.weight.copy_(matrix)
        if biases:
            fused.bias.copy_(torch.stack([bias.to(model.device) for bias in biases]).sum(0))
        got = fused(model.hidden_states(batch.input_ids, batch.attention_mask))
        expected = combine(model.member_logits(batch.input_ids, batch.attention_mask), weights, "logits")
        # A head in bf16 rounds its logits, and the fp32 matrix does not: some units in the last place are no
        # difference.
        heads_round = max(torch.finfo(head.weight.dtype).eps for head in heads)
        if float((got - expected).abs().max()) > max(EXACT, 4 * heads_round) * float(expected.abs().max()):
            raise _not_linear("a member's logits are not its output matrix times its hidden states")
    return fused


def _not_linear(why: str) -> SurgeryError:
    return SurgeryError(
        f"{why}, so no matrix on the hidden states gives its logits",
        where="--tune-what head",
        hint="Fit the weights: --tune-what weights.",
    )


def _row(line: str, where: str) -> TuningRow:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SurgeryError(f"is not JSON ({error})", where=where) from error
    fields = value if isinstance(value, dict) else {}
    prompt, response = (None, fields.get("text"))
    if response is None:
        prompt, response = fields.get("prompt"), fields.get("response")
        if not isinstance(prompt, str):
            response = None
    if not isinstance(response, str) or not response:
        raise SurgeryError(
            'expected an object with "text", or with "prompt" and "response", as non-empty strings', where=where
        )
    return TuningRow(prompt or "", response)


def _load(checkpoint: Checkpoint) -> Any:
    return load_weights(checkpoint, checkpoint.ref)


def _context(config: Any) -> int:
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or MAX_TOKENS


def _batches(
    rows: Sequence[TuningRow],
    tokenizer: Any,
    longest: int,
    device: torch.device,
    special_tokens: SpecialTokens = "text",
) -> Iterator[TuningBatch]:
    """Yield rows as tokens, cut at `longest`, padded on the right; rows without a token to train on are left out."""
    examples = []
    for row in rows:
        prompt = encode_text(tokenizer, row.prompt, special_tokens, add_special_tokens=True) if row.prompt else []
        # A prompt has brought the special tokens of a beginning already.
        response = encode_text(tokenizer, row.response, special_tokens, add_special_tokens=not row.prompt)
        tokens = torch.tensor((prompt + response)[:longest])
        labels = tokens.clone()
        labels[: max(len(prompt), 1)] = IGNORED  # nothing predicts the first token
        if (labels != IGNORED).any():
            examples.append((tokens, labels))
    if not examples:
        raise SurgeryError(f"none of {len(rows)} row(s) has a token to learn within {longest} tokens", where="--tune")
    for begin in range(0, len(examples), BATCH):
        chosen = examples[begin : begin + BATCH]
        mask = [torch.ones_like(tokens) for tokens, _ in chosen]
        columns = ([tokens for tokens, _ in chosen], 0), (mask, 0), ([labels for _, labels in chosen], IGNORED)
        padded = (
            nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=value).to(device) for part, value in columns
        )
        yield TuningBatch(*padded)


def _loss(logits: Tensor, batch: TuningBatch, reduction: str) -> Tensor:
    """Return the cross-entropy of the next tokens.   logits: (B, T, V)"""
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction=reduction
    )


@torch.no_grad()
def _mean_loss(logits: Logits, batches: Sequence[TuningBatch], advance: Advance) -> float:
    total, count = [], 0
    for batch in batches:
        # Sums over tokens, not means over batches: batches have different numbers of tokens.
        total.append(float(_loss(logits(batch), batch, "sum")))
        count += int((batch.labels[:, 1:] != IGNORED).sum())
        advance(1)
    return math.fsum(total) / count
