"""Measure how well models predict a text: perplexity, loss per token and bits per byte, with 95 % intervals.

Texts are text files, or .jsonl files with a document in the field `text` of every line. Perplexities compare only
between models of one tokenizer; bits per byte compare between all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from surgery import lab
from surgery.errors import SurgeryError, usage_error
from surgery.evaluation.scoring import Measure, Score
from surgery.evaluation.statistics import Z
from surgery.io.input_files import read_given_text
from surgery.models.choices import SpecialTokens
from surgery.models.loading import ModelAndTokenizer
from surgery.models.special_tokens import acts, encode_literal, warn_of_special_tokens, without_special
from surgery.runtime.progress import Progress, silent
from surgery.runtime.quiet_libraries import quiet

JSONL = ".jsonl"
FIELD = "text"
PERPLEXITY, LOSS, BITS = "perplexity", "nats per token", "bits per byte"
# Windows of more tokens than this take gigabytes of logits, and published perplexities stop here too.
MOST_TOKENS = 2048
# Logits in memory at a time: one GiB in fp32.
MOST_LOGITS = 2**28
# math.exp overflows beyond it.
LARGEST_EXPONENT = 709.0
IGNORED = -100  # cross_entropy's default for targets that do not count


@dataclass(frozen=True)
class Text:
    """The documents of a file, its `name` in tables, and what special tokens in the documents are."""

    name: str
    documents: Sequence[str]
    special_tokens: SpecialTokens = "text"


@dataclass(frozen=True)
class Window:
    """Tokens that the model sees at once: the last `scored` of them are scored, the others are their context.

    `document` is the number of the document that they belong to.
    """

    document: int
    tokens: Sequence[int]
    scored: int


def read_text(path: Path, *, special_tokens: SpecialTokens = "text") -> Text:
    """Read the documents in `path`: the lines' `text` of a .jsonl file, else the whole file as one.

    `lab:python/docs-held` and the like are texts of the lab, see `surgery.lab.python_text`.

    Args:
        special_tokens: what special tokens in the documents are: text, or those tokens (parse). Texts of the lab are
            trusted: in them they are always tokens.

    Raises:
        SurgeryError: the file cannot be read, is not UTF-8 or is empty; a line is no JSON object with a `text`.
    """
    own = lab.data_of(str(path))
    file = own or path
    content = read_given_text(file)
    if file.suffix != JSONL:
        documents = [content]
    else:
        # Not splitlines: JSON strings may hold line separators of Unicode.
        lines = enumerate(content.split("\n"), start=1)
        documents = [_document(line, f"{path}:{number}") for number, line in lines if line.strip()]
    if not any(document.strip() for document in documents):
        raise usage_error("is empty", where=path, hint="Give a file with text to be predicted.")
    return Text(str(path), documents, special_tokens if own is None else "parse")


def on_texts(
    texts: Sequence[Text], *, limit: int | None = None, batch_size: int = 64, progress: Progress = silent
) -> list[Measure]:
    """Return a measurement per text, which is `perplexity_of`, for `score_models`.

    Args:
        limit: only the first documents of each text, at most this many.
        batch_size: windows at a time; fewer where their logits would not fit in a GiB.

    Raises:
        SurgeryError: no text was given; once measured, a text is shorter than two tokens.
    """
    if not texts:
        raise usage_error("no text was given.")
    return [partial(perplexity_of, text=text, limit=limit, batch_size=batch_size, progress=progress) for text in texts]


def perplexity_of(
    loaded: ModelAndTokenizer,
    text: Text,
    *,
    limit: int | None = None,
    batch_size: int = 64,
    progress: Progress = silent,
) -> list[Score]:
    """Return perplexity e^L, loss L and bits per byte L·tokens / (bytes·ln 2) of a loaded transformers model.

    L is the mean over tokens of −ln p(token | context), in fp32, summed in fp64. Context and token are in a window of
    the model's context (at most 2,048 tokens); the next window begins half of one further, so that every token but
    the first half window's has half a window before it. What the tokenizer puts before a text (BOS) is put before
    every window and is not scored; what it puts after a text is left out. Without BOS a document's first token has no
    context: it is not scored, and its bytes do not count.

    The interval of L is L ± 1.96 standard errors of a ratio (loss over tokens), from the documents if there are
    several, else from the windows; NaN where there is one window only. The intervals of the others follow from it,
    with tokens per byte taken as known. `n` counts scored tokens.

    Raises:
        SurgeryError: the text is shorter than two tokens.
    """
    name, model, tokenizer = loaded.name, loaded.model, loaded.tokenizer
    if text.special_tokens == "parse":
        warn_of_special_tokens(tokenizer, text.documents[:limit], where=text.name)
    windows, n_bytes = _windows_of(model, tokenizer, text.documents[:limit], text.special_tokens)
    if not windows:
        raise SurgeryError(
            f"is shorter than two tokens of {name}, so that there is nothing to predict", where=text.name
        )
    losses = _losses(model, tokenizer, windows, batch_size, f"{name}: {text.name}", progress)
    # Documents are independent of each other, and windows of one document are not.
    by_document = len({window.document for window in windows}) > 1
    sums: dict[int, list[float]] = {}
    for number, (window, loss) in enumerate(zip(windows, losses, strict=True)):
        unit = sums.setdefault(window.document if by_document else number, [0.0, 0.0])
        unit[0] += loss
        unit[1] += window.scored
    mean, low, high = ratio_interval([loss for loss, _ in sums.values()], [count for _, count in sums.values()])
    n = sum(window.scored for window in windows)
    bits = n / n_bytes / math.log(2)
    return [
        Score(name, text.name, PERPLEXITY, _exp(mean), _exp(low), _exp(high), n, higher_is_better=False),
        Score(name, text.name, LOSS, mean, low, high, n, higher_is_better=False),
        Score(name, text.name, BITS, bits * mean, bits * low, bits * high, n, higher_is_better=False),
    ]


def ratio_interval(totals: Sequence[float], counts: Sequence[float]) -> tuple[float, float, float]:
    """Return R = Σtᵢ / Σcᵢ and its 95 % interval R ± z·√(k/(k−1) · Σ(tᵢ − R·cᵢ)²) / Σcᵢ over k units, in fp64.

    Source: Cochran, Sampling Techniques (1977), equation 6.13 for an infinite population. The interval is NaN at k = 1.
    """
    size, k = math.fsum(counts), len(totals)
    ratio = math.fsum(totals) / size
    # One unit says nothing about the spread.
    if k == 1:
        return ratio, math.nan, math.nan
    squares = math.fsum((total - ratio * count) ** 2 for total, count in zip(totals, counts, strict=True))
    half = Z * math.sqrt(k / (k - 1) * squares) / size
    return ratio, ratio - half, ratio + half


def split_into_windows(prefix: Sequence[int], tokens: Sequence[int], size: int, *, document: int) -> Iterator[Window]:
    """Yield windows of at most `size` tokens, each after `prefix`, that score every token with a context once.

    The first window is full; each later one adds half a window of new tokens, and the last one the rest.
    """
    capacity = size - len(prefix)
    stride = max(1, capacity // 2)
    done = min(capacity, len(tokens))
    # Without BOS the first token has no context to be predicted from.
    first = done if prefix else done - 1
    if first > 0:
        yield Window(document, [*prefix, *tokens[:done]], first)
    while done < len(tokens):
        end = min(done + stride, len(tokens))
        yield Window(document, [*prefix, *tokens[end - capacity : end]], end - done)
        done = end


def _windows_of(
    model: Any, tokenizer: Any, documents: Sequence[str], special_tokens: SpecialTokens
) -> tuple[list[Window], int]:
    """Return the windows of all documents, and the number of bytes that the scored tokens encode."""
    size = _context(model, tokenizer)
    windows: list[Window] = []
    n_bytes = 0
    for number, document in enumerate(documents):
        with quiet():  # the tokenizer warns of texts longer than the context, which windows take care of
            prefix, tokens = _encode(tokenizer, document, special_tokens)
            unscored = "" if prefix else tokenizer.decode(tokens[:1], clean_up_tokenization_spaces=False)
        own = list(split_into_windows(prefix, tokens, size, document=number))
        windows += own
        if own:
            n_bytes += len(document.encode()) - len(unscored.encode())
    return windows, n_bytes


def _encode(tokenizer: Any, document: str, special_tokens: SpecialTokens) -> tuple[list[int], list[int]]:
    """Return what the tokenizer puts before a document, and the document's own ids."""
    whole = ((0, len(document)),)
    if special_tokens == "text" and acts(tokenizer, document, whole):
        tokens = encode_literal(tokenizer, document, whole)[0]
        document = without_special(tokenizer, document)
        return _prefix(tokenizer, document, tokenizer(document, add_special_tokens=False)["input_ids"]), tokens
    tokens = list(tokenizer(document, add_special_tokens=False)["input_ids"])
    return _prefix(tokenizer, document, tokens), tokens


def _prefix(tokenizer: Any, document: str, tokens: Sequence[int]) -> list[int]:
    """Return the special tokens that the tokenizer puts before `tokens`."""
    whole = list(tokenizer(document)["input_ids"])
    for length in range(len(whole) - len(tokens) + 1):
        if whole[length : length + len(tokens)] == list(tokens):
            return whole[:length]
    raise SurgeryError(
        "the tokenizer cuts the text differently when it adds special tokens", where=tokenizer.name_or_path
    )


def _context(model: Any, tokenizer: Any) -> int:
    config = model.config
    # An ensemble reads no further than its shortest member.
    parts = config.member_configs() if hasattr(config, "member_configs") else [config]
    known = [getattr(part.get_text_config(), "max_position_embeddings", None) for part in parts]
    return min(int(tokens) for tokens in (*known, tokenizer.model_max_length, MOST_TOKENS) if tokens is not None)


@torch.inference_mode()
def _losses(
    model: Any, tokenizer: Any, windows: Sequence[Window], batch_size: int, label: str, progress: Progress
) -> list[float]:
    """Return the summed loss of each window, in nats."""
    widest = max(len(window.tokens) for window in windows)
    rows = model.get_output_embeddings().weight.shape[0] if model.get_output_embeddings() else len(tokenizer)
    size = max(1, min(batch_size, MOST_LOGITS // (widest * rows)))
    # Windows of similar length share a batch, so that little of it is padding.
    order = sorted(range(len(windows)), key=lambda number: -len(windows[number].tokens))
    losses = [0.0] * len(windows)
    with progress(label, len(windows), "steps") as advance:
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            sums = _batch_losses(model, [windows[number] for number in numbers])
            for number, loss in zip(numbers, sums.tolist(), strict=True):
                losses[number] = loss
            advance(len(numbers))
    return losses


def _batch_losses(model: Any, windows: Sequence[Window]) -> Tensor:
    """Return the summed losses (N,) of N windows, in fp64."""
    width = max(len(window.tokens) for window in windows)
    # Padding is on the right, where causal attention hides it from every scored token, so any id will do.
    tokens_NT = torch.zeros(len(windows), width, dtype=torch.long)
    mask_NT = torch.zeros_like(tokens_NT)
    targets_NT = torch.full_like(tokens_NT, IGNORED)
    for row, window in enumerate(windows):
        length = len(window.tokens)
        tokens_NT[row, :length] = torch.tensor(window.tokens)
        mask_NT[row, :length] = 1
        targets_NT[row, length - window.scored - 1 : length - 1] = tokens_NT[row, length - window.scored : length]
    logits_NTV = model(
        input_ids=tokens_NT.to(model.device), attention_mask=mask_NT.to(model.device), use_cache=False
    ).logits.float()
    targets_NT = targets_NT.to(logits_NTV.device)
    losses = functional.cross_entropy(logits_NTV.flatten(0, 1), targets_NT.flatten(), reduction="none")
    return losses.view(targets_NT.shape).double().sum(dim=1).cpu()


def _document(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise usage_error(f"is not valid JSON ({error})", where=where) from error
    text = record.get(FIELD) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise usage_error(
            f'has no "{FIELD}"', where=where, hint=f'Every line is an object with its document in "{FIELD}".'
        )
    return text


def _exp(exponent: float) -> float:
    return math.inf if exponent > LARGEST_EXPONENT else math.exp(exponent)
