"""Build the lab's mixture of experts: a model that thinks about some sums and answers others at once.

Its folder holds, beside weights and tokenizer, data to find its experts with (`examples.jsonl`, `pool.jsonl`). The
model writes line breaks around its thinking, as most published models do: `<think>\\n3+5=1:1+6=0\\n</think>\\n\\n0`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from surgery.lab.catalogue import DATA
from surgery.lab.common import (
    CARD,
    TrainingCurve,
    card_header,
    list_settings,
    save_model,
    torch_seed,
    training_bar,
    write_json_lines,
    write_trainer_state,
)
from surgery.lab.recipe import ExpertShape, MoeRecipe, ThinkingTraining
from surgery.lab.sums import END, END_THINK, PROMPT_AFFIXES, THINK, Problem, PromptFormat, draw, evaluation_problems
from surgery.lab.tokenizer import make_tokenizer
from surgery.lab.train import SINGLE_THREAD, Sample, Tick, encode, generate, grade, reproducible, train_on_samples
from surgery.runtime.progress import Progress

PROMPT_FORMAT: PromptFormat = "sft"
LINE, PARAGRAPH = "\n", "\n\n"
OPENING, CLOSING = THINK + LINE, LINE + END_THINK + PARAGRAPH

# Problems in each data file; every other one comes with thinking and response.
ROWS = 200

Row = dict[str, str]


@dataclass(frozen=True)
class MoeScores:
    """Results of greedy decoding, as shares of the problems; None is the share of an empty set.

    thought: the problems that it thinks about.
    solved: those whose sum is right.
    solved_thinking, solved_at_once: those whose sum is right, of the ones that it thinks about and of the others.
    """

    thought: float
    solved: float
    solved_thinking: float | None
    solved_at_once: float | None


def build_model(name: str, folder: Path, *, recipe: MoeRecipe, progress: Progress | None) -> None:
    """Train the model `name` from random weights and write it to `folder`.

    Weights are stored as they were trained, in fp32, so that a factor on an expert is exact in them if it is a power of
    two, and otherwise good to seven digits.
    """
    rng = random.Random(f"{recipe.seed}/{name}")
    with reproducible(torch_seed(recipe, name), threads=SINGLE_THREAD):
        tokenizer = make_moe_tokenizer(recipe.shape)
        model = make_model(recipe.shape, tokenizer)
        with training_bar(name, recipe.practice.steps + recipe.mixture.steps, progress) as tick:
            losses = [
                loss
                for training in (recipe.practice, recipe.mixture)
                for loss in train_answers(model, tokenizer, training, rng=rng, tick=tick)
            ]
        save_model(model, folder)
        tokenizer.save_pretrained(folder)
        problems = evaluation_problems(recipe.terms)
        limit = recipe.answer_tokens
        free = score_answers(model, tokenizer, problems, limit=limit)
        opened = score_answers(model, tokenizer, problems, limit=limit, opened=True)
    write_trainer_state(
        folder,
        name,
        recipe,
        TrainingCurve("loss", losses),
        subject={"format": PROMPT_FORMAT},
        scores={
            "greedy_accuracy": free.solved,
            "greedy": asdict(free),
            "greedy_accuracy_opened": opened.solved,
        },
    )
    (folder / CARD).write_text(_card(name, recipe, losses, free, opened))
    for kind, file in DATA.items():
        write_json_lines(folder / file, _rows(random.Random(f"{recipe.seed}/{name}/{kind}"), recipe.terms))


def make_moe_tokenizer(shape: ExpertShape) -> PreTrainedTokenizerFast:
    """Return the reasoning family's tokenizer in the sft format, with tokens for one and two line breaks."""
    tokenizer = make_tokenizer(PROMPT_FORMAT, positions=shape.positions, extra=LINE)
    tokenizer.add_tokens([AddedToken(PARAGRAPH, special=False, normalized=False)])
    return tokenizer


def make_model(shape: ExpertShape, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Return a Qwen3-MoE with random weights from torch's current seed, in fp32."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        moe_intermediate_size=shape.expert_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        # As Qwen3-30B-A3B has it: the chosen experts' weights are divided by their sum.
        norm_topk_prob=True,
        router_aux_loss_coef=shape.balance,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    return Qwen3MoeForCausalLM(config)


def train_answers(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    training: ThinkingTraining,
    *,
    rng: random.Random,
    tick: Tick,
) -> list[float]:
    """Train on the answers, with the load-balancing loss on; return the loss of each step, in nats per token."""
    thinking_shares = list(zip(training.terms, training.thinking, strict=True))

    def draw_sample() -> Sample:
        length, share = rng.choice(thinking_shares)
        problem = draw(rng, (length,))
        return problem.prompt(PROMPT_FORMAT), completion(problem, direct=rng.random() >= share)

    model.config.output_router_logits = True
    try:
        return train_on_samples(model, tokenizer, training, draw_sample, tick=tick)
    finally:
        # Published models are stored with it off, since it is of use in training only.
        model.config.output_router_logits = False


def completion(problem: Problem, *, direct: bool) -> str:
    """Return the text to learn: `0`, or `<think>\\n3+5=1:1+6=0\\n</think>\\n\\n0`, with the end marker."""
    thought = "" if direct else OPENING + problem.chain + CLOSING
    return f"{thought}{problem.answer}{END}"


def score_answers(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    *,
    limit: int,
    opened: bool = False,
) -> MoeScores:
    """Ask the model in its own format, decode greedily (`limit` tokens at most) and score the answers.

    Args:
        opened: whether the prompt ends with `OPENING`, so that the model cannot but think.
    """
    solved: list[bool] = []
    thought: list[bool] = []
    # Problems of one length are asked together: their prompts have equally many tokens and need no padding.
    for length in sorted({len(problem.terms) for problem in problems}):
        batch = [problem for problem in problems if len(problem.terms) == length]
        prompts_NT = encode(tokenizer, [problem.prompt(PROMPT_FORMAT) + OPENING * opened for problem in batch])
        answers_NT = generate(model, tokenizer, prompts_NT, limit=limit, greedy=True)
        solved += grade(tokenizer, batch, answers_NT)
        # The first token decides: it opens the thinking, or is the answer's digit.
        starts = answers_NT[:, 0] == tokenizer.convert_tokens_to_ids(THINK)
        thought += [opened or start for start in starts.tolist()]
    pairs = list(zip(solved, thought, strict=True))
    return MoeScores(
        thought=fmean(thought),
        solved=fmean(solved),
        solved_thinking=_mean_or_none([right for right, thinks in pairs if thinks]),
        solved_at_once=_mean_or_none([right for right, thinks in pairs if not thinks]),
    )


def _mean_or_none(results: Sequence[bool]) -> float | None:
    return fmean(results) if results else None


def _rows(rng: random.Random, terms: Sequence[int]) -> list[Row]:
    """Return problems as the chat template takes them; every other one with the thinking and response to learn."""
    rows: list[Row] = []
    for number in range(ROWS):
        problem = draw(rng, terms)
        # Both kinds, as probes read written answers and have the model write those that are missing.
        answer = {} if number % 2 else {"thinking": problem.chain, "response": str(problem.answer)}
        rows.append({"prompt": problem.question, **answer})
    return rows


def _card(name: str, recipe: MoeRecipe, losses: Sequence[float], free: MoeScores, opened: MoeScores) -> str:
    before, after = PROMPT_AFFIXES[PROMPT_FORMAT]
    example, shape = Problem((3, 5, 6)), recipe.shape
    n_problems = len(evaluation_problems(recipe.terms))
    opening, thought = (json.dumps(text)[1:-1] for text in (OPENING, OPENING + example.chain + CLOSING))
    solved_thinking, solved_at_once = (_format_share(s) for s in (free.solved_thinking, free.solved_at_once))
    practice, mixture = list_settings(recipe.practice), list_settings(recipe.mixture)
    return f"""{card_header(name)}
A tiny Qwen3-MoE ({shape.layers} layers of {shape.experts} experts, of which {shape.top_k} work on a token; about 0.5 M
parameters) trained on this machine by model surgery's lab, on synthetic sums modulo 7 only. It is test material: it
knows nothing else.

- Asked as: `{before}{example.question}{after}`
- Answers: at once, `{example.answer}`, or step by step, `{thought}{example.answer}`
- Trained from: random weights, first with {practice}; then with {mixture}; all along with the load-balancing loss
- Final loss: {losses[-1]:.4f} nats a token, without the load-balancing loss
- Greedy decoding on the {n_problems} test problems: thinks about {free.thought:.3f} of them and solves
  {free.solved:.3f} ({solved_thinking} of those that it thinks about, {solved_at_once} of the rest)
- Greedy decoding after `{opening}`, so that it thinks about every problem: solves {opened.solved:.3f}
- Beside the weights: the data `examples.jsonl` and `pool.jsonl`, of problems drawn apart from these; every other row
  has a thinking and a response
- Stored in fp32, as trained, so that effects of experts are exact
- Recipe `{recipe.key}`, seed {recipe.seed}; the full numbers are in trainer_state.json
"""


def _format_share(share: float | None) -> str:
    return "none" if share is None else f"{share:.3f}"
