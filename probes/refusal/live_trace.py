"""Trace refusal while a model answers a prompt: the probe's score of every token as it is generated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from probes.data.examples import Example, LiteralText, TokenSequence
from probes.data.generation import context_length, end_token_ids, remaining_tokens
from probes.data.markers import Markers, split_completion
from probes.data.tokenization import encode_before_answer
from probes.refusal.cliffs import RefusalCliff, measure_cliff
from probes.refusal.findings import read_findings
from probes.refusal.probed_model import ProbedModel, open_probed_model
from surgery.engine.options import ExecutionOptions
from surgery.errors import usage_error
from surgery.models.choices import SpecialTokens
from surgery.models.loaded_model import LoadedModel, hidden_out, hooks

TokenCallback = Callable[[str, float], None]


@dataclass(frozen=True)
class LiveTrace:
    """The generated tokens with the refusal score at each: texts and scores of one length.

    closed: whether the thinking came to an end; if not, the cliff's final score is that of the last token.
    """

    prompt: str
    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    closed: bool
    cliff: RefusalCliff

    def sentence(self) -> str:
        """Return the trace in words."""
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
    special_tokens: SpecialTokens = "text",
    dtype: str = "auto",
    on_token: TokenCallback = lambda text, score: None,
    options: ExecutionOptions = ExecutionOptions(),
) -> LiveTrace:
    """Let `model` answer `prompt` greedily, and score every token by the probe of `run`.

    Args:
        max_new_tokens: of thinking and answer; None takes what the model's context leaves.
        special_tokens: what special tokens in the prompt are: text, or those tokens (parse).
        on_token: is called with each token's text and the score at it, as soon as it is there.

    Raises:
        SurgeryError: findings of another model; the model does not think as the findings have it; the prompt, or what
            is to follow it, does not fit the model's context.
    """
    probed = open_probed_model(model, read_findings(run), run, dtype=dtype, options=options)
    ids = _encode_prompt(probed, prompt, max_new_tokens or 1, special_tokens)
    limit = max_new_tokens or remaining_tokens(probed.live.model, len(ids))
    texts, scores = _generate_scored(probed, ids, limit, on_token)
    sequence, closed = _segment(len(ids), texts, probed.markers)
    # `scores` begins with that of the prompt's last token, at which a model that does not think decides. The tokens
    # before it are in no segment that is measured.
    trace = [0.0] * (len(ids) - 1) + scores
    cliff = measure_cliff(sequence, trace, cell="live", group="live")
    return LiveTrace(prompt, tuple(texts), tuple(scores[1:]), closed, cliff)


def _encode_prompt(probed: ProbedModel, prompt: str, n_new: int, special_tokens: SpecialTokens) -> list[int]:
    """Return the prompt's ids in the chat template; raise SurgeryError where `n_new` more tokens do not fit."""
    live = probed.live
    literal: tuple[LiteralText, ...] = ("messages",) if special_tokens == "text" else ()
    example = Example("live", ({"role": "user", "content": prompt},), prompt, literal=literal)
    ids = list(encode_before_answer(live.tokenizer, example, probed.markers)[1])
    if not ids:
        raise usage_error("the prompt has no tokens", where="--live")
    context = context_length(live.model)
    if context is not None and len(ids) + n_new > context:
        raise usage_error(
            f"the prompt has {len(ids):,} tokens, and {n_new:,} more do not fit the model's context of {context:,}",
            where="--live",
        )
    return ids


def _generate_scored(
    probed: ProbedModel, prompt_ids: list[int], limit: int, on_token: TokenCallback
) -> tuple[list[str], list[float]]:
    """Generate up to `limit` tokens greedily; return their n texts, and n + 1 scores from the last of the prompt on."""
    live, stops = probed.live, end_token_ids(probed.live.loaded)
    weight, bias = probed.weight.double(), probed.bias
    texts: list[str] = []
    scores: list[float] = []

    def score_last_token(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        logit = float(hidden_out(output)[0, -1].double().cpu() @ weight) + bias
        # Below, math.exp would overflow.
        scores.append(1 / (1 + math.exp(-logit)) if logit > -700 else 0.0)

    ids, fed, cache = list(prompt_ids), list(prompt_ids), None
    text_so_far = _decode(live, ids)
    with torch.inference_mode(), hooks(live.final_norm.register_forward_hook(score_last_token)):
        while True:
            output = live.model(
                input_ids=torch.tensor([fed], device=live.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            if len(ids) > len(prompt_ids):
                # All ids are decoded each time: a token's text depends on its neighbours.
                text = _decode(live, ids)
                texts.append(text[len(text_so_far) :])
                text_so_far = text
                on_token(texts[-1], scores[-1])
            token = int(output.logits[0, -1].argmax())
            if token in stops or len(texts) == limit:
                return texts, scores
            ids.append(token)
            fed = [token]


def _decode(live: LoadedModel, ids: list[int]) -> str:
    """Return the text of `ids` without the first bytes of a character that further tokens complete."""
    text = live.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text).rstrip("\ufffd")


def _segment(n_prompt: int, texts: list[str], markers: Markers | None) -> tuple[TokenSequence, bool]:
    """Return the generated tokens with the ends of thinking and closing template, and whether the thinking closed."""
    total = n_prompt + len(texts)
    ids = (0,) * total  # the cliff is measured by segments alone
    if markers is None:
        return TokenSequence("live", ids, (n_prompt, n_prompt, n_prompt, total)), True
    text, ends = "", []
    for own in texts:
        # Markers may be split over several tokens: they are found in the text, and mapped back to tokens by its length.
        text += own
        ends.append(len(text))
    _, template, answer = split_completion(text, markers)
    if not template:
        return TokenSequence("live", ids, (n_prompt, total, total, total)), False
    template_end = len(text) - len(answer)
    template_start = template_end - len(template)
    thinking = sum(end <= template_start for end in ends)
    closing = sum(end <= template_end for end in ends)
    return TokenSequence("live", ids, (n_prompt, n_prompt + thinking, n_prompt + closing, total)), True
