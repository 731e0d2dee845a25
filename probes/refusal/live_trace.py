"""Refusal watched while it is written: a prompt, and the probe's score of every token as the model generates it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from probes.data.examples import Example, TokenSequence
from probes.data.generation import context_length, end_token_ids, remaining_tokens
from probes.data.markers import Markers, split_completion
from probes.data.preparation import open_model
from probes.data.records import check_model
from probes.data.tokenization import encode, render_prompt
from probes.refusal.cliffs import RefusalCliff, measure_cliff
from probes.refusal.findings import PROBES, read_findings
from probes.refusal.linear.probes import Probes
from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.options import ExecutionOptions
from surgery.errors import usage_error
from surgery.models.loaded_model import LoadedModel, hidden_out, hooks

TokenCallback = Callable[[str, float], None]


@dataclass(frozen=True)
class LiveTrace:
    """What was written, token by token, with the refusal score at each: texts and scores of one length.

    closed: whether the thinking came to an end; without it the cliff's final score is that of the last token.
    """

    prompt: str
    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    closed: bool
    cliff: RefusalCliff

    def sentence(self) -> str:
        """The trace in words."""
        if not self.closed:
            return f"The thinking did not close within {len(self.tokens)} tokens."
        if not self.cliff.thinking:
            return f"Refusal score before the answer: {self.cliff.final:.3f}. There was no thinking."
        return (
            f"Refusal score: {self.cliff.plateau:.3f} at most in {self.cliff.thinking} tokens of thinking, "
            f"{self.cliff.final:.3f} just before the answer; misalignment {self.cliff.misalignment:.3f}."
        )


def live_probe(
    model: str,
    run: Path,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    dtype: str = "auto",
    tell: TokenCallback = lambda text, score: None,
    options: ExecutionOptions = ExecutionOptions(),
) -> LiveTrace:
    """Lets `model` answer `prompt` greedily; `tell` is called with each token's text and the score at it.

    Raises:
        SurgeryError: findings of another model; the model does not think as the findings say; the prompt, or what is
            to follow it, does not fit the model's context.
    """
    findings = read_findings(run)
    check_model(findings, open_checkpoint(model), run, options=options)
    live = open_model(model, device=options.device, dtype=dtype)
    probes = Probes.load(run / PROBES)
    weight, bias = probes.weights[findings.depth].double(), float(probes.biases[findings.depth])
    markers = None if findings.markers is None else Markers(**findings.markers)
    example = Example("live", ({"role": "user", "content": prompt},), prompt)
    ids = list(encode(live.tokenizer, render_prompt(live.tokenizer, example, markers)))
    if not ids:
        raise usage_error("the prompt has no tokens", where="--live")
    context = context_length(live.model)
    if context is not None and len(ids) + (max_new_tokens or 1) > context:
        raise usage_error(
            f"the prompt has {len(ids):,} tokens, and {max_new_tokens or 1:,} more do not fit the model's context of "
            f"{context:,}",
            where="--live",
        )
    limit = max_new_tokens or remaining_tokens(live.model, len(ids))
    stops = end_token_ids(live.loaded)
    scores: list[float] = []
    texts: list[str] = []

    def see(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        logit = float(hidden_out(output)[0, -1].double().cpu() @ weight) + bias
        scores.append(1 / (1 + math.exp(-logit)) if logit > -700 else 0.0)

    written: list[int] = []
    cache = None
    before = _text(live, ids)
    with torch.inference_mode(), hooks(live.final_norm.register_forward_hook(see)):
        fed = ids
        while True:
            output = live.model(
                input_ids=torch.tensor([fed], device=live.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            if written:
                whole = _text(live, [*ids, *written])
                texts.append(whole[len(before) :])
                before = whole
                tell(texts[-1], scores[-1])
            token = int(output.logits[0, -1].argmax())
            if token in stops or len(written) == limit:
                break
            written.append(token)
            fed = [token]
    sequence, closed = _cut(len(ids), texts, markers)
    # The first score is that of the prompt's last token, at which a model that does not think decides.
    trace = [0.0] * (len(ids) - 1) + scores
    cliff = measure_cliff(sequence, trace, cell="live", group="live")
    return LiveTrace(prompt, tuple(texts), tuple(scores[1:]), closed, cliff)


def _text(live: LoadedModel, ids: list[int]) -> str:
    """The text of `ids` without the beginning of a character that further tokens complete."""
    text = live.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text).rstrip("\ufffd")


def _cut(n_prompt: int, texts: list[str], markers: Markers | None) -> tuple[TokenSequence, bool]:
    """Where thinking and closing template end among what was written."""
    total = n_prompt + len(texts)
    ids = (0,) * total
    if markers is None:
        return TokenSequence("live", ids, (n_prompt, n_prompt, n_prompt, total)), True
    whole, ends = "", []
    for text in texts:
        whole += text
        ends.append(len(whole))
    _, template, answer = split_completion(whole, markers)
    if not template:
        return TokenSequence("live", ids, (n_prompt, total, total, total)), False
    stop = len(whole) - len(answer)
    begin = stop - len(template)
    thinking = sum(end <= begin for end in ends)
    closing = sum(end <= stop for end in ends)
    return TokenSequence("live", ids, (n_prompt, n_prompt + thinking, n_prompt + closing, total)), True
