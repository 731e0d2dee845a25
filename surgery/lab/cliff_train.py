"""Training the lab's cliff models: a parent that refuses, and children in which a few heads learn to suppress that.

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

from surgery.lab.cliff_text import CLOSING, COMPLIANCE, END, HARMFUL, REFUSAL, Request, draw
from surgery.lab.recipe import QwenHeadShape, RefusalTraining, SuppressionTraining
from surgery.lab.train import (
    BETAS,
    IGNORED,
    Tick,
    generate,
    learning_rate_scale,
    make_optimizer,
    optimizer_step,
    written_batch,
)

# Layer and query head, both from 0.
Head = tuple[int, int]

# The usual 0.02 is made for wider models: this narrow one would take twice the steps to learn to copy words.
INITIAL = 0.05
HARMFUL_SHARE = 0.5


def make_model(shape: QwenHeadShape, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights from torch's current seed, in fp32."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.positions,
        initializer_range=INITIAL,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def refuse(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: RefusalTraining,
    *,
    lengths: Sequence[int],
    rng: random.Random,
    tick: Tick,
) -> list[float]:
    """Next-token training on thinking and answers, some of which come early. Returns the loss of each step, in nats."""
    optimizer = make_optimizer(model, recipe.learning_rate)
    losses = []
    for step in range(recipe.steps):
        requests = [_any_request(rng, lengths) for _ in range(recipe.batch)]
        texts = [_early(request, rng) if rng.random() < recipe.early else _whole(request) for request in requests]
        tokens_NT, targets_NT = written_batch(tokenizer, [request.prompt for request in requests], texts)
        with scaled_heads(model, _at_random(model, recipe.dropped, len(texts))):
            logits_NTV = model(input_ids=tokens_NT, use_cache=False).logits
        loss = functional.cross_entropy(logits_NTV.flatten(0, 1), targets_NT.flatten(), ignore_index=IGNORED)
        optimizer_step(
            model, optimizer, loss, recipe.learning_rate * learning_rate_scale(step, recipe.steps, recipe.warmup)
        )
        losses.append(loss.item())
        tick()
    return losses


def suppress(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: SuppressionTraining,
    *,
    heads: Sequence[Head],
    words: Sequence[str],
    lengths: Sequence[int],
    rng: random.Random,
    tick: Tick,
) -> list[float]:
    """Teaches `heads` alone to comply after the thinking with requests for one of `words`. Returns the losses.

    Cross-entropy of the answer that follows the closing template + KL(before ‖ now) of what is predicted in the
    thinking, both in nats per token. Only the heads' rows of q_proj and columns of o_proj change: every other number
    keeps its bits.
    """
    before = copy.deepcopy(model)
    model.requires_grad_(False)
    last = tokenizer.convert_tokens_to_ids("\n\n")
    losses = []
    with _only(model, heads) as weights:
        # Without decay, which would shrink what has no gradient.
        optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, betas=BETAS, weight_decay=0.0)
        for step in range(recipe.steps):
            requests = [_any_request(rng, lengths) for _ in range(recipe.batch)]
            texts = [_whole(request, COMPLIANCE if request.harmful in words else None) for request in requests]
            tokens_NT, targets_NT = written_batch(tokenizer, [request.prompt for request in requests], texts)
            logits_NTV = model(input_ids=tokens_NT, use_cache=False).logits
            with torch.no_grad():
                past_NTV = before(input_ids=tokens_NT, use_cache=False).logits
            closed_NT = (tokens_NT == last).cumsum(1) > 0
            answer_NT, thinking_NT = (part & (targets_NT != IGNORED) for part in (closed_NT, ~closed_NT))
            learned = functional.cross_entropy(logits_NTV[answer_NT], targets_NT[answer_NT])
            kept = functional.kl_div(
                logits_NTV[thinking_NT].log_softmax(-1),
                past_NTV[thinking_NT].log_softmax(-1),
                log_target=True,
                reduction="batchmean",
            )
            rate = recipe.learning_rate * learning_rate_scale(step, recipe.steps, recipe.warmup)
            optimizer_step(model, optimizer, learned + kept, rate)
            losses.append((learned + kept).item())
            tick()
    return losses


def refusals(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, requests: Sequence[Request]) -> list[bool]:
    """Whether greedy decoding ends in a refusal, for each request."""
    found = [False] * len(requests)
    for length in sorted({len(request.words) for request in requests}):
        rows = [row for row, request in enumerate(requests) if len(request.words) == length]
        prompts_NT = torch.tensor(tokenizer([requests[row].prompt for row in rows])["input_ids"])
        longest = len(tokenizer(_whole(requests[rows[0]], REFUSAL))["input_ids"])
        answers_NT = generate(model, tokenizer, prompts_NT, limit=longest, greedy=True)
        for row, text in zip(rows, tokenizer.batch_decode(answers_NT, skip_special_tokens=True), strict=True):
            found[row] = text.endswith(REFUSAL)
    return found


def silenced(model: Qwen3ForCausalLM, heads: Sequence[Head]) -> Mapping[int, Tensor]:
    """The factors with which `scaled_heads` silences `heads`: layer → (1, H)."""
    factors: dict[int, Tensor] = {}
    for layer, head in heads:
        factors.setdefault(layer, torch.ones(1, model.config.num_attention_heads))[:, head] = 0
    return factors


@contextmanager
def scaled_heads(model: Qwen3ForCausalLM, factors: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside, what heads hand to the output projection is multiplied: layer → factors (N, H), or (1, H) for all."""

    def hook(factor_NH: Tensor) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def scaled(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            mixed_NTHD = inputs[0].view(*inputs[0].shape[:-1], factor_NH.shape[1], -1)
            return ((mixed_NTHD * factor_NH[:, None, :, None]).flatten(-2),)

        return scaled

    layers = model.model.layers
    handles = [layers[at].self_attn.o_proj.register_forward_pre_hook(hook(factor)) for at, factor in factors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _at_random(model: Qwen3ForCausalLM, share: float, texts: int) -> Mapping[int, Tensor]:
    """Factors that silence each head in each text with probability `share`, and turn the others up in return."""
    shape = (texts, model.config.num_attention_heads)
    return {at: (torch.rand(shape) >= share) / (1 - share) for at in range(model.config.num_hidden_layers)}


@contextmanager
def _only(model: Qwen3ForCausalLM, heads: Sequence[Head]) -> Iterator[list[torch.nn.Parameter]]:
    """The parameters that hold `heads`; inside, their gradients are zero everywhere else."""
    weights, handles = [], []
    for layer in sorted({layer for layer, _ in heads}):
        attention = model.model.layers[layer].self_attn
        mine = torch.zeros(attention.q_proj.out_features)
        for at, head in heads:
            if at == layer:
                mine[head * attention.head_dim : (head + 1) * attention.head_dim] = 1
        for weight, mask in ((attention.q_proj.weight, mine[:, None]), (attention.o_proj.weight, mine[None, :])):
            weight.requires_grad_(True)
            handles.append(weight.register_hook(lambda gradient, mask=mask: gradient * mask))
            weights.append(weight)
    try:
        yield weights
    finally:
        for handle in handles:
            handle.remove()


def _any_request(rng: random.Random, lengths: Sequence[int]) -> Request:
    return draw(rng, lengths, harmful=rng.choice(HARMFUL) if rng.random() < HARMFUL_SHARE else None)


def _whole(request: Request, answer: str | None = None) -> str:
    return request.thinking + CLOSING + (answer or request.verdict) + END


def _early(request: Request, rng: random.Random) -> str:
    return request.begun(rng) + request.verdict + END
