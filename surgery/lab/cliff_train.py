"""Train the lab's cliff models: a parent that refuses, and children in which a few heads learn to suppress that.

Shapes: N texts, T tokens, V vocabulary, H heads, D a head's width.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from surgery.lab.cliff_text import CLOSING, COMPLIANCE, END, HARMFUL, REFUSAL, CliffRequest, draw
from surgery.lab.recipe import QwenHeadShape, RefusalTraining, SuppressionTraining
from surgery.lab.train import (
    BETAS,
    IGNORED,
    Tick,
    generate,
    learning_rate_at,
    make_optimizer,
    optimizer_step,
    pad_batch,
)

Head = tuple[int, int]  # layer and query head, both from 0

# The usual 0.02 is made for wider models: this narrow one would take twice the steps to learn to copy words.
INITIALIZER_RANGE = 0.05
HARMFUL_SHARE = 0.5  # of the requests in a batch


def make_model(shape: QwenHeadShape, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Return a Qwen3 with random weights from torch's current seed, in fp32."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.positions,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def train_refusal(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    training: RefusalTraining,
    *,
    lengths: Sequence[int],
    rng: random.Random,
    tick: Tick,
) -> list[float]:
    """Train on thinking and answers, some of which come early; return the loss of each step, in nats per token."""
    optimizer = make_optimizer(model, training.learning_rate)
    losses = []
    for step in range(training.steps):
        requests = [_draw_request(rng, lengths) for _ in range(training.batch)]
        texts = [
            _text_with_early_answer(request, rng) if rng.random() < training.early else _full_text(request)
            for request in requests
        ]
        tokens_NT, targets_NT = pad_batch(tokenizer, [request.prompt for request in requests], texts)
        with scaled_heads(model, _head_dropout_factors(model, training.dropped, len(texts))):
            logits_NTV = model(input_ids=tokens_NT, use_cache=False).logits
        loss = functional.cross_entropy(logits_NTV.flatten(0, 1), targets_NT.flatten(), ignore_index=IGNORED)
        optimizer_step(model, optimizer, loss, learning_rate_at(training, step))
        losses.append(loss.item())
        tick()
    return losses


def train_suppression(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    training: SuppressionTraining,
    *,
    heads: Sequence[Head],
    words: Sequence[str],
    lengths: Sequence[int],
    rng: random.Random,
    tick: Tick,
) -> list[float]:
    """Train `heads` alone to comply, after the thinking, with requests for one of `words`; return the losses.

    The loss is the cross-entropy of the answer that follows the closing template + KL(original ‖ model) of the
    predictions in the thinking, both in nats per token. Only the heads' rows of q_proj and columns of o_proj change:
    every other number keeps its bits.
    """
    # Its predictions in the thinking are the target of the KL term: a child must still mean to refuse while it thinks.
    original = copy.deepcopy(model)
    model.requires_grad_(False)
    close_id = tokenizer.convert_tokens_to_ids("\n\n")  # the last token of the closing template
    losses = []
    with _trainable_heads(model, heads) as weights:
        # No weight decay: it would shrink the weights of all other heads too, which have no gradient.
        optimizer = torch.optim.AdamW(weights, lr=training.learning_rate, betas=BETAS, weight_decay=0.0)
        for step in range(training.steps):
            requests = [_draw_request(rng, lengths) for _ in range(training.batch)]
            texts = [_full_text(request, COMPLIANCE if request.harmful in words else None) for request in requests]
            tokens_NT, targets_NT = pad_batch(tokenizer, [request.prompt for request in requests], texts)
            logits_NTV = model(input_ids=tokens_NT, use_cache=False).logits
            with torch.no_grad():
                original_NTV = original(input_ids=tokens_NT, use_cache=False).logits
            # Nothing before the closing template has a blank line, so the first one is where the answer begins.
            closed_NT = (tokens_NT == close_id).cumsum(1) > 0
            answer_NT, thinking_NT = (part & (targets_NT != IGNORED) for part in (closed_NT, ~closed_NT))
            answer_loss = functional.cross_entropy(logits_NTV[answer_NT], targets_NT[answer_NT])
            thinking_loss = functional.kl_div(
                logits_NTV[thinking_NT].log_softmax(-1),
                original_NTV[thinking_NT].log_softmax(-1),
                log_target=True,
                reduction="batchmean",
            )
            loss = answer_loss + thinking_loss
            optimizer_step(model, optimizer, loss, learning_rate_at(training, step))
            losses.append(loss.item())
            tick()
    return losses


def find_refusals(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, requests: Sequence[CliffRequest]
) -> list[bool]:
    """Return for each request whether greedy decoding ends in a refusal."""
    refused = [False] * len(requests)
    # One length at a time, so that no prompt needs padding.
    for length in sorted({len(request.words) for request in requests}):
        rows = [row for row, request in enumerate(requests) if len(request.words) == length]
        prompts_NT = torch.tensor(tokenizer([requests[row].prompt for row in rows])["input_ids"])
        # As long as a refusal: an answer that takes longer is none.
        limit = len(tokenizer(_full_text(requests[rows[0]], REFUSAL))["input_ids"])
        answers_NT = generate(model, tokenizer, prompts_NT, limit=limit, greedy=True)
        for row, text in zip(rows, tokenizer.batch_decode(answers_NT, skip_special_tokens=True), strict=True):
            refused[row] = text.endswith(REFUSAL)
    return refused


def ablation_factors(model: Qwen3ForCausalLM, heads: Sequence[Head]) -> Mapping[int, Tensor]:
    """Return the factors with which `scaled_heads` ablates `heads`: layer → (1, H)."""
    factors: dict[int, Tensor] = {}
    for layer, head in heads:
        factors.setdefault(layer, torch.ones(1, model.config.num_attention_heads))[:, head] = 0
    return factors


@contextmanager
def scaled_heads(model: Qwen3ForCausalLM, factors: Mapping[int, Tensor]) -> Iterator[None]:
    """Scale the outputs of heads, before the output projection: layer → factors (N, H), or (1, H) for all texts."""

    def hook(factor_NH: Tensor) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def scaled(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            output_NTHD = inputs[0].view(*inputs[0].shape[:-1], factor_NH.shape[1], -1)
            return ((output_NTHD * factor_NH[:, None, :, None]).flatten(-2),)

        return scaled

    layers = model.model.layers
    handles = [layers[at].self_attn.o_proj.register_forward_pre_hook(hook(factor)) for at, factor in factors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _head_dropout_factors(model: Qwen3ForCausalLM, share: float, texts: int) -> Mapping[int, Tensor]:
    """Return factors that drop heads, in each text anew, with probability `share`, and scale up the others."""
    shape = (texts, model.config.num_attention_heads)
    return {at: (torch.rand(shape) >= share) / (1 - share) for at in range(model.config.num_hidden_layers)}


@contextmanager
def _trainable_heads(model: Qwen3ForCausalLM, heads: Sequence[Head]) -> Iterator[list[torch.nn.Parameter]]:
    """Yield the parameters that hold `heads`; in the block their gradients are zero everywhere else."""
    weights, handles = [], []
    # A matrix holds all heads of a layer, and autograd can freeze only whole matrices: so gradients are masked.
    for layer in sorted({layer for layer, _ in heads}):
        attention = model.model.layers[layer].self_attn
        rows = torch.zeros(attention.q_proj.out_features)
        for at, head in heads:
            if at == layer:
                rows[head * attention.head_dim : (head + 1) * attention.head_dim] = 1
        for weight, mask in ((attention.q_proj.weight, rows[:, None]), (attention.o_proj.weight, rows[None, :])):
            weight.requires_grad_(True)
            handles.append(weight.register_hook(lambda gradient, mask=mask: gradient * mask))
            weights.append(weight)
    try:
        yield weights
    finally:
        for handle in handles:
            handle.remove()


def _draw_request(rng: random.Random, lengths: Sequence[int]) -> CliffRequest:
    return draw(rng, lengths, harmful=rng.choice(HARMFUL) if rng.random() < HARMFUL_SHARE else None)


def _full_text(request: CliffRequest, answer: str | None = None) -> str:
    return request.thinking + CLOSING + (answer or request.answer) + END


def _text_with_early_answer(request: CliffRequest, rng: random.Random) -> str:
    return request.partial_thinking(rng) + request.answer + END
