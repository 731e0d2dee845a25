"""Train the lab's models: next-token training on written answers, and GRPO on sampled ones.

Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from surgery.lab.recipe import DomainTraining, GrpoTraining, QwenShape, SupervisedTraining, ThinkingTraining
from surgery.lab.sorting import draw_sorting_problem
from surgery.lab.sums import PromptFormat, draw

# Matrices this small gain nothing from more threads, and a fixed number keeps the order of sums, and so the
# bytes, independent of the machine's cores.
THREADS = 2
# For families whose models are often trained side by side: two processes of one thread are faster than two of two.
SINGLE_THREAD = 1
IGNORED = -100  # the target that torch's cross-entropy leaves out
GRADIENT_NORM = 1.0
# Runs are a few hundred steps long, so the second moment remembers little.
BETAS = (0.9, 0.95)
# The default of torch's AdamW.
WEIGHT_DECAY = 0.01
FINAL_RATE = 0.1  # of the peak learning rate, at the end of the cosine
# A group whose answers were all right, or all wrong, teaches nothing: this keeps its advantage at zero.
ADVANTAGE_EPSILON = 1e-4

Tick = Callable[[], None]  # called after every optimizer step
Sample = tuple[str, str]  # a prompt, and the text that should follow it


class RateSchedule(Protocol):
    """What `learning_rate_at` reads of a training plan."""

    @property
    def steps(self) -> int: ...

    @property
    def warmup(self) -> int: ...

    @property
    def learning_rate(self) -> float: ...


class Exercise(Protocol):
    """A problem of any domain. Prompts of equal length have equally many tokens."""

    def prompt(self, prompt_format: PromptFormat) -> str: ...

    def is_solved_by(self, text: str) -> bool: ...


@contextlib.contextmanager
def reproducible(seed: int, *, threads: int = THREADS) -> Iterator[None]:
    """Fix torch's seed, number of threads and choice of algorithms in the block; restore them afterwards."""
    earlier_threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    # Without devices: the lab trains on the CPU alone, and asking for a GPU's state would initialise CUDA.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.set_num_threads(earlier_threads)
            torch.use_deterministic_algorithms(strict)


def make_model(shape: QwenShape, tokenizer: PreTrainedTokenizerFast, *, tied: bool = True) -> Qwen2ForCausalLM:
    """Return a Qwen2 with random weights from torch's current seed, in fp32; `tied`: the head is the embedding."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def train_supervised(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    training: SupervisedTraining,
    *,
    rng: random.Random,
    tick: Tick,
) -> list[float]:
    """Train on written answers, not on their prompts; return the loss of each step, in nats per token."""

    def draw_sample() -> Sample:
        problem = draw(rng, training.terms)
        prompt = rng.choice(training.prefixes) + problem.question + rng.choice(training.suffixes)
        return prompt, problem.completion(direct=rng.random() < training.direct)

    return train_on_samples(model, tokenizer, training, draw_sample, tick=tick)


def train_domain(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    training: DomainTraining,
    *,
    rng: random.Random,
    tick: Tick,
) -> list[float]:
    """Train on the answers of one domain and on noise; frozen parameters stay. Return the loss of each step."""
    # Sorted, as the tokenizer returns them in an order that changes from run to run, and the noise would with it.
    tokens = sorted(tokenizer.get_vocab())

    def draw_sample() -> Sample:
        if rng.random() < training.noise:
            # The first token is given as the prompt, since nothing can predict it.
            first, *rest = rng.choices(tokens, k=training.noise_tokens)
            return first, "".join(rest)
        if training.domain == "sums":
            problem = draw(rng, training.sizes)
            return problem.prompt("plain"), problem.completion(direct=False)
        jumble = draw_sorting_problem(rng, training.sizes)
        return jumble.prompt("plain"), jumble.completion()

    return train_on_samples(model, tokenizer, training, draw_sample, tick=tick)


def train_on_samples(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    training: SupervisedTraining | DomainTraining | ThinkingTraining,
    draw_sample: Callable[[], Sample],
    *,
    tick: Tick,
) -> list[float]:
    """Train on samples drawn by `draw_sample`, not on their prompts; return the loss of each step, in nats per token.

    A mixture of experts that is configured to return its router logits also learns by its load-balancing loss, which
    the returned losses leave out.
    """
    optimizer = make_optimizer(model, training.learning_rate)
    losses = []
    for step in range(training.steps):
        prompts, completions = zip(*(draw_sample() for _ in range(training.batch)), strict=True)
        tokens_NT, targets_NT = pad_batch(tokenizer, prompts, completions)
        output = model(input_ids=tokens_NT, use_cache=False)
        loss = functional.cross_entropy(output.logits.flatten(0, 1), targets_NT.flatten(), ignore_index=IGNORED)
        balance = output.get("aux_loss")
        # transformers adds this term itself only where it is given labels, and ours have been shifted already.
        total = loss if balance is None else loss + model.router_aux_loss_coef * balance
        optimizer_step(model, optimizer, total, learning_rate_at(training, step))
        losses.append(loss.item())
        tick()
    return losses


def train_grpo(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    training: GrpoTraining,
    *,
    prompt_format: PromptFormat,
    terms: Sequence[int],
    answer_tokens: int,
    rng: random.Random,
    tick: Tick,
) -> list[float]:
    """Train by GRPO (arXiv:2402.03300), with reward 1 for the right final answer; return each step's mean reward.

    Aᵢ = (rᵢ − mean(r)) / (std(r) + ε) over a prompt's group;  loss = −Σᵢₜ Aᵢ log π(tokenᵢₜ) / Σᵢ |answerᵢ|.

    Deviations from the paper: one update per batch of samples, so that the ratio is 1 and clipping never acts;
    no KL term (β = 0); and every token weighs the same (as in DAPO, arXiv:2503.14476), where the paper's mean over
    each answer would give the choice to think a tenth of the weight of the choice not to.
    """
    optimizer = make_optimizer(model, training.learning_rate, epsilon=training.epsilon)
    rewards = []
    for step in range(training.steps):
        # One length for the whole batch, so that no prompt needs padding before its answer.
        length = (rng.choice(terms),)
        problems = [draw(rng, length) for _ in range(training.prompts)]
        asked = [problem for problem in problems for _ in range(training.group)]
        prompts_NT = encode(tokenizer, [problem.prompt(prompt_format) for problem in asked])
        answers_NT = generate(model, tokenizer, prompts_NT, limit=answer_tokens, greedy=False)
        reward_N = torch.tensor([float(right) for right in grade(tokenizer, asked, answers_NT)])
        advantage_N = group_advantages(reward_N, training.group)

        tokens_NT = torch.cat([prompts_NT, answers_NT], dim=1)
        # A position predicts the token after it, so the answer's logits begin at the last token of the prompt.
        logits_NTV = model(input_ids=tokens_NT[:, :-1], use_cache=False).logits[:, prompts_NT.shape[1] - 1 :]
        chosen_NT = logits_NTV.log_softmax(-1).gather(-1, answers_NT.unsqueeze(-1)).squeeze(-1)
        # Padding behind an end marker was not chosen by the model, and takes no credit.
        counts_NT = answers_NT != tokenizer.pad_token_id
        loss = -(advantage_N.unsqueeze(1) * chosen_NT * counts_NT).sum() / counts_NT.sum()
        optimizer_step(model, optimizer, loss, learning_rate_at(training, step))
        rewards.append(reward_N.mean().item())
        tick()
        if len(rewards) >= training.window and fmean(rewards[-training.window :]) >= training.enough:
            # The progress bar must reach its end, although training stops early.
            for _ in range(step + 1, training.steps):
                tick()
            break
    return rewards


def group_advantages(reward_N: Tensor, group: int) -> Tensor:
    """Return (r − mean) / (std + ε) within each run of `group` rewards: (N,) → (N,)."""
    reward_PG = reward_N.view(-1, group)
    centred_PG = reward_PG - reward_PG.mean(1, keepdim=True)
    return (centred_PG / (reward_PG.std(1, keepdim=True) + ADVANTAGE_EPSILON)).flatten()


@torch.no_grad()
def generate(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts_NT: Tensor, *, limit: int, greedy: bool
) -> Tensor:
    """Answer prompts of one length, at temperature 1 or greedily: (N, T) → (N, ≤ limit), padded after END."""
    answers: list[Tensor] = []
    cache, input_NT = None, prompts_NT
    open_N = torch.ones(len(prompts_NT), dtype=torch.bool)
    while len(answers) < limit and open_N.any():
        output = model(input_ids=input_NT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits_NV, cache = output.logits[:, -1], output.past_key_values
        next_N = logits_NV.argmax(-1) if greedy else torch.multinomial(logits_NV.softmax(-1), 1).squeeze(1)
        # A finished answer stays in the batch until all are; what it would go on to say is dropped.
        next_N = next_N.where(open_N, tokenizer.pad_token_id)
        open_N = open_N & (next_N != tokenizer.eos_token_id)
        answers.append(next_N)
        input_NT = next_N.unsqueeze(1)
    return torch.stack(answers, dim=1)


def grade(tokenizer: PreTrainedTokenizerFast, problems: Sequence[Exercise], answers_NT: Tensor) -> list[bool]:
    """Return whether each answer solves its problem."""
    texts = tokenizer.batch_decode(answers_NT, skip_special_tokens=True)
    return [problem.is_solved_by(text) for text, problem in zip(texts, problems, strict=True)]


def accuracy(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Exercise],
    *,
    prompt_format: PromptFormat,
    limit: int,
) -> float:
    """Return the share of `problems` that greedy decoding solves when asked in `prompt_format`."""
    n_solved = 0
    # By length, so that no prompt needs padding (see `Exercise`).
    for length in sorted({len(problem.prompt(prompt_format)) for problem in problems}):
        batch = [problem for problem in problems if len(problem.prompt(prompt_format)) == length]
        prompts_NT = encode(tokenizer, [problem.prompt(prompt_format) for problem in batch])
        answers_NT = generate(model, tokenizer, prompts_NT, limit=limit, greedy=True)
        n_solved += sum(grade(tokenizer, batch, answers_NT))
    return n_solved / len(problems)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """Return the ids (N, T) of texts of one length."""
    return torch.tensor(tokenizer(list(texts))["input_ids"])


def pad_batch(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], completions: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return ids and next-token targets, both (N, T), padded right; targets in prompts and padding are `IGNORED`."""
    questions = tokenizer(list(prompts))["input_ids"]
    answers = tokenizer(list(completions))["input_ids"]
    width = max(len(question) + len(answer) for question, answer in zip(questions, answers, strict=True)) - 1
    tokens_NT = torch.full((len(questions), width), tokenizer.pad_token_id)
    targets_NT = torch.full((len(questions), width), IGNORED)
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        # Shifted by one: the last token of the question has the first of the answer as its target.
        start, stop = len(question) - 1, len(question) + len(answer) - 1
        tokens_NT[row, :stop] = torch.tensor((question + answer)[:-1])
        targets_NT[row, start:stop] = torch.tensor(answer)
    return tokens_NT, targets_NT


def make_optimizer(model: Qwen2ForCausalLM, learning_rate: float, *, epsilon: float = 1e-8) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    weights = list(model.parameters())
    # Norms start at 1 and decay would pull them to 0; biases have nothing to gain from it.
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, eps=epsilon)


def optimizer_step(model: Qwen2ForCausalLM, optimizer: torch.optim.AdamW, loss: Tensor, learning_rate: float) -> None:
    """Do one optimizer step with clipped gradients."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()


def learning_rate_at(training: RateSchedule, step: int) -> float:
    """Return the learning rate of `step`: linear warmup to the peak, then a cosine down to a tenth of it."""
    if step < training.warmup:
        # From 1, as at a rate of 0 the first step would do nothing.
        return training.learning_rate * ((step + 1) / training.warmup)
    progress = (step - training.warmup) / max(1, training.steps - training.warmup)
    return training.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * progress)) / 2)
