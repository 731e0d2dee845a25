"""Training the lab's models: next-token training on written answers, and GRPO on sampled ones.

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
from surgery.lab.sums import Format, draw

# Matrices this small gain nothing from more threads, and a fixed number keeps the order of sums, and so the
# bytes, independent of the machine's cores.
THREADS = 2
IGNORED = -100
GRADIENT_NORM = 1.0
# Runs are a few hundred steps long, so the second moment remembers little.
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.01
FINAL_RATE = 0.1
# A group whose answers were all right, or all wrong, teaches nothing: this keeps its advantage at zero.
ADVANTAGE_EPSILON = 1e-4

Tick = Callable[[], None]
# A prompt, and what should follow it.
Written = tuple[str, str]


class Exercise(Protocol):
    """A problem of any domain. Prompts of equal length have equally many tokens."""

    def prompt(self, form: Format) -> str: ...

    def is_solved_by(self, text: str) -> bool: ...


@contextlib.contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Fixes torch's seed, threads and algorithms inside, and gives back what was set before."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(THREADS)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(strict)


def make_model(shape: QwenShape, tokenizer: PreTrainedTokenizerFast, *, tied: bool = True) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights from torch's current seed, in fp32; `tied` is whether the head is the embedding."""
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
    recipe: SupervisedTraining,
    *,
    rng: random.Random,
    tick: Tick,
) -> list[float]:
    """Next-token training on the answers (the prompts are not learned). Returns the loss of each step, in nats."""

    def write() -> Written:
        problem = draw(rng, recipe.terms)
        prompt = rng.choice(recipe.prefixes) + problem.question + rng.choice(recipe.suffixes)
        return prompt, problem.completion(direct=rng.random() < recipe.direct)

    return train_on_samples(model, tokenizer, recipe, write, tick=tick)


def train_domain(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: DomainTraining,
    *,
    rng: random.Random,
    tick: Tick,
) -> list[float]:
    """Next-token training on the answers of one domain and on noise; frozen parameters stay. Returns the losses."""
    tokens = sorted(tokenizer.get_vocab())

    def write() -> Written:
        if rng.random() < recipe.noise:
            first, *rest = rng.choices(tokens, k=recipe.noise_tokens)
            return first, "".join(rest)
        if recipe.domain == "sums":
            problem = draw(rng, recipe.sizes)
            return problem.prompt("plain"), problem.completion(direct=False)
        jumble = draw_sorting_problem(rng, recipe.sizes)
        return jumble.prompt("plain"), jumble.completion()

    return train_on_samples(model, tokenizer, recipe, write, tick=tick)


def train_on_samples(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: SupervisedTraining | DomainTraining | ThinkingTraining,
    write: Callable[[], Written],
    *,
    tick: Tick,
) -> list[float]:
    """Next-token training on what `write` writes; the prompts are not learned. Returns the loss of each step, in nats.

    A model of experts that is configured to give its router logits also learns by its load-balancing loss, which the
    losses returned leave out.
    """
    optimizer = make_optimizer(model, recipe.learning_rate)
    losses = []
    for step in range(recipe.steps):
        prompts, completions = zip(*(write() for _ in range(recipe.batch)), strict=True)
        tokens_NT, targets_NT = written_batch(tokenizer, prompts, completions)
        output = model(input_ids=tokens_NT, use_cache=False)
        loss = functional.cross_entropy(output.logits.flatten(0, 1), targets_NT.flatten(), ignore_index=IGNORED)
        balance = output.get("aux_loss")
        whole = loss if balance is None else loss + model.router_aux_loss_coef * balance
        optimizer_step(
            model, optimizer, whole, recipe.learning_rate * learning_rate_scale(step, recipe.steps, recipe.warmup)
        )
        losses.append(loss.item())
        tick()
    return losses


def train_grpo(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: GrpoTraining,
    *,
    form: Format,
    terms: Sequence[int],
    answer_tokens: int,
    rng: random.Random,
    tick: Tick,
) -> list[float]:
    """GRPO (arXiv:2402.03300) with reward 1 for the right final answer. Returns each step's mean reward.

    Aᵢ = (rᵢ − mean(r)) / (std(r) + ε) over a prompt's group;  loss = −Σᵢₜ Aᵢ log π(tokenᵢₜ) / Σᵢ |answerᵢ|.

    Deviations from the paper: one update per batch of samples, so that the ratio is 1 and clipping never acts;
    no KL term (β = 0); and every token weighs the same (as in DAPO, arXiv:2503.14476), where the paper's mean over
    each answer would give the choice to think a tenth of the weight of the choice not to.
    """
    optimizer = make_optimizer(model, recipe.learning_rate, epsilon=recipe.epsilon)
    rewards = []
    for step in range(recipe.steps):
        # One length for the whole batch: no padding before the answers.
        length = (rng.choice(terms),)
        problems = [draw(rng, length) for _ in range(recipe.prompts)]
        asked = [problem for problem in problems for _ in range(recipe.group)]
        prompts_NT = encode(tokenizer, [problem.prompt(form) for problem in asked])
        answers_NT = generate(model, tokenizer, prompts_NT, limit=answer_tokens, greedy=False)
        reward_N = torch.tensor([float(right) for right in judge(tokenizer, asked, answers_NT)])
        advantage_N = group_advantages(reward_N, recipe.group)

        tokens_NT = torch.cat([prompts_NT, answers_NT], dim=1)
        logits_NTV = model(input_ids=tokens_NT[:, :-1], use_cache=False).logits[:, prompts_NT.shape[1] - 1 :]
        chosen_NT = logits_NTV.log_softmax(-1).gather(-1, answers_NT.unsqueeze(-1)).squeeze(-1)
        counts_NT = answers_NT != tokenizer.pad_token_id
        loss = -(advantage_N.unsqueeze(1) * chosen_NT * counts_NT).sum() / counts_NT.sum()
        optimizer_step(
            model, optimizer, loss, recipe.learning_rate * learning_rate_scale(step, recipe.steps, recipe.warmup)
        )
        rewards.append(reward_N.mean().item())
        tick()
        if len(rewards) >= recipe.window and fmean(rewards[-recipe.window :]) >= recipe.enough:
            # An early end is the end all the same.
            for _ in range(step + 1, recipe.steps):
                tick()
            break
    return rewards


def group_advantages(reward_N: Tensor, group: int) -> Tensor:
    """(r − mean) / (std + ε) within each run of `group` rewards: (N,) → (N,)."""
    reward_PG = reward_N.view(-1, group)
    centred_PG = reward_PG - reward_PG.mean(1, keepdim=True)
    return (centred_PG / (reward_PG.std(1, keepdim=True) + ADVANTAGE_EPSILON)).flatten()


@torch.no_grad()
def generate(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts_NT: Tensor, *, limit: int, greedy: bool
) -> Tensor:
    """Answers to prompts of one length, at temperature 1 or greedily: (N, T) → (N, ≤ limit), padded after END."""
    answers: list[Tensor] = []
    cache, fed_NT = None, prompts_NT
    open_N = torch.ones(len(prompts_NT), dtype=torch.bool)
    while len(answers) < limit and open_N.any():
        output = model(input_ids=fed_NT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits_NV, cache = output.logits[:, -1], output.past_key_values
        next_N = logits_NV.argmax(-1) if greedy else torch.multinomial(logits_NV.softmax(-1), 1).squeeze(1)
        next_N = next_N.where(open_N, tokenizer.pad_token_id)
        open_N = open_N & (next_N != tokenizer.eos_token_id)
        answers.append(next_N)
        fed_NT = next_N.unsqueeze(1)
    return torch.stack(answers, dim=1)


def judge(tokenizer: PreTrainedTokenizerFast, problems: Sequence[Exercise], answers_NT: Tensor) -> list[bool]:
    """Whether each answer solves its problem."""
    texts = tokenizer.batch_decode(answers_NT, skip_special_tokens=True)
    return [problem.is_solved_by(text) for text, problem in zip(texts, problems, strict=True)]


def accuracy(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Exercise],
    *,
    form: Format,
    limit: int,
) -> float:
    """The share of `problems` that greedy decoding answers rightly when asked in `form`."""
    right = 0
    for length in sorted({len(problem.prompt(form)) for problem in problems}):
        equal = [problem for problem in problems if len(problem.prompt(form)) == length]
        prompts_NT = encode(tokenizer, [problem.prompt(form) for problem in equal])
        answers_NT = generate(model, tokenizer, prompts_NT, limit=limit, greedy=True)
        right += sum(judge(tokenizer, equal, answers_NT))
    return right / len(problems)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """Texts of one length → ids (N, T)."""
    return torch.tensor(tokenizer(list(texts))["input_ids"])


def written_batch(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], completions: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Ids and, for each, the id that should follow: both (N, T), padded right; prompts and padding are `IGNORED`."""
    questions = tokenizer(list(prompts))["input_ids"]
    answers = tokenizer(list(completions))["input_ids"]
    width = max(len(question) + len(answer) for question, answer in zip(questions, answers, strict=True)) - 1
    tokens_NT = torch.full((len(questions), width), tokenizer.pad_token_id)
    targets_NT = torch.full((len(questions), width), IGNORED)
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        start, stop = len(question) - 1, len(question) + len(answer) - 1
        tokens_NT[row, :stop] = torch.tensor((question + answer)[:-1])
        targets_NT[row, start:stop] = torch.tensor(answer)
    return tokens_NT, targets_NT


def make_optimizer(model: Qwen2ForCausalLM, learning_rate: float, *, epsilon: float = 1e-8) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, eps=epsilon)


def optimizer_step(model: Qwen2ForCausalLM, optimizer: torch.optim.AdamW, loss: Tensor, learning_rate: float) -> None:
    """One clipped optimizer step."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()


def learning_rate_scale(step: int, steps: int, warmup: int) -> float:
    """The share of the peak learning rate: up in a line over `warmup` steps, then down a cosine to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * done)) / 2
