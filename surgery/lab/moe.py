"""Makes the lab's mixture of experts: a model that thinks about some sums and answers others at once.

In comes its recipe, out goes its folder, which holds, beside weights and tokenizer, data to find its experts with
(`examples.jsonl`, `pool.jsonl`). The model writes line breaks around its thinking, as most published models do:
`<think>\\n3+5=1:1+6=0\\n</think>\\n\\n0`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from surgery.lab.builder import DATA, MEMBERS
from surgery.lab.reasoning import DIGITS, bar, card_head, save, seed_of
from surgery.lab.recipe import ExpertShape, MoeRecipe, ThinkingTraining
from surgery.lab.sums import END, SURFACES, THINK, THOUGHT, Format, Problem, draw, test_problems
from surgery.lab.tokenizer import make_tokenizer
from surgery.lab.train import Tick, Written, encode, generate, judge, reproducible, train_on_samples
from surgery.runtime.progress import Progress

FORM: Format = "sft"
LINE, PARAGRAPH = "\n", "\n\n"
OPENING, CLOSING = THINK + LINE, LINE + THOUGHT + PARAGRAPH

# Two processes' models train faster side by side than on two threads each.
THREADS = 1
# Problems in each data file; every other one comes with thinking and response.
ROWS = 200

Row = dict[str, str]


@dataclass(frozen=True)
class MoeScores:
    """What greedy decoding makes of problems, as shares of them; None stands for a share of none.

    thought: those that it thinks about. solved: those whose sum is right. solved_thinking, solved_at_once: those whose
    sum is right, of the ones that it thinks about and of the others.
    """

    thought: float
    solved: float
    solved_thinking: float | None
    solved_at_once: float | None


def make(name: str, folder: Path, *, recipe: MoeRecipe, progress: Progress | None) -> None:
    """Trains the model `name` from random weights and writes it to `folder`.

    Weights are stored as they were trained, in fp32, so that a factor on an expert is exact in them if it is a power of
    two, and otherwise good to seven digits.
    """
    rng = random.Random(f"{recipe.seed}/{name}")
    with reproducible(seed_of(recipe, name)):
        torch.set_num_threads(THREADS)
        tokenizer = tokenizer_of(recipe.shape)
        model = make_model(recipe.shape, tokenizer)
        with bar(name, recipe.practice.steps + recipe.mixture.steps, progress) as tick:
            losses = [
                loss
                for plan in (recipe.practice, recipe.mixture)
                for loss in train_answers(model, tokenizer, plan, rng=rng, tick=tick)
            ]
        save(model, folder)
        tokenizer.save_pretrained(folder)
        problems = test_problems(recipe.terms)
        limit = recipe.answer_tokens
        asked = score_answers(model, tokenizer, problems, limit=limit)
        opened = score_answers(model, tokenizer, problems, limit=limit, opened=True)
    record = {
        "schema": 1,
        "name": name,
        "parent": MEMBERS[name].parent,
        "format": FORM,
        "recipe": {"key": recipe.key, **asdict(recipe)},
        "greedy_accuracy": asked.solved,
        "greedy": asdict(asked),
        "greedy_accuracy_opened": opened.solved,
        "loss": [round(value, DIGITS) for value in losses],
    }
    (folder / "trainer_state.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "README.md").write_text(_card(name, recipe, losses, asked, opened))
    for kind, file in DATA.items():
        rows = _rows(random.Random(f"{recipe.seed}/{name}/{kind}"), recipe.terms)
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def tokenizer_of(shape: ExpertShape) -> PreTrainedTokenizerFast:
    """The reasoning family's tokenizer in the sft format, which also reads one and two line breaks as a token each."""
    tokenizer = make_tokenizer(FORM, positions=shape.positions, more=LINE)
    tokenizer.add_tokens([AddedToken(PARAGRAPH, special=False, normalized=False)])
    return tokenizer


def make_model(shape: ExpertShape, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE with random weights from torch's current seed, in fp32."""
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
    plan: ThinkingTraining,
    *,
    rng: random.Random,
    tick: Tick,
) -> list[float]:
    """Next-token training on the answers, with the load-balancing loss on. Returns the loss of each step, in nats."""
    kinds = list(zip(plan.terms, plan.thinking, strict=True))

    def write() -> Written:
        length, share = rng.choice(kinds)
        problem = draw(rng, (length,))
        return problem.prompt(FORM), completion(problem, direct=rng.random() >= share)

    model.config.output_router_logits = True
    try:
        return train_on_samples(model, tokenizer, plan, write, tick=tick)
    finally:
        # Published models are stored without: it is of no use but in training.
        model.config.output_router_logits = False


def completion(problem: Problem, *, direct: bool) -> str:
    """`0`, or `<think>\\n3+5=1:1+6=0\\n</think>\\n\\n0`, and the end marker."""
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
    """Asks the model in its own format, and decodes greedily, `limit` tokens at most.

    Args:
        opened: whether the prompt ends with `OPENING`, so that the model cannot but think.
    """
    solved: list[bool] = []
    thought: list[bool] = []
    for length in sorted({len(problem.terms) for problem in problems}):
        equal = [problem for problem in problems if len(problem.terms) == length]
        prompts_NT = encode(tokenizer, [problem.prompt(FORM) + OPENING * opened for problem in equal])
        answers_NT = generate(model, tokenizer, prompts_NT, limit=limit, greedy=True)
        solved += judge(tokenizer, equal, answers_NT)
        starts = answers_NT[:, 0] == tokenizer.convert_tokens_to_ids(THINK)
        thought += [opened or start for start in starts.tolist()]
    both = list(zip(solved, thought, strict=True))
    return MoeScores(
        thought=fmean(thought),
        solved=fmean(solved),
        solved_thinking=_share(right for right, thinks in both if thinks),
        solved_at_once=_share(right for right, thinks in both if not thinks),
    )


def _share(found: Iterable[bool]) -> float | None:
    listed = list(found)
    return fmean(listed) if listed else None


def _rows(rng: random.Random, terms: Sequence[int]) -> list[Row]:
    """Problems as the chat template takes them; every other one with what was taught to be written about it."""
    rows: list[Row] = []
    for number in range(ROWS):
        problem = draw(rng, terms)
        written = {} if number % 2 else {"thinking": problem.chain, "response": str(problem.answer)}
        rows.append({"prompt": problem.question, **written})
    return rows


def _card(name: str, recipe: MoeRecipe, losses: Sequence[float], asked: MoeScores, opened: MoeScores) -> str:
    before, after = SURFACES[FORM]
    example, shape = Problem((3, 5, 6)), recipe.shape
    n_problems = len(test_problems(recipe.terms))
    opening, thought = (json.dumps(text)[1:-1] for text in (OPENING, OPENING + example.chain + CLOSING))
    known = [_said(share) for share in (asked.solved_thinking, asked.solved_at_once)]
    practice, mixture = (
        ", ".join(f"{key} {value}" for key, value in asdict(plan).items()) for plan in (recipe.practice, recipe.mixture)
    )
    return f"""{card_head(name)}
A tiny Qwen3-MoE ({shape.layers} layers of {shape.experts} experts, of which {shape.top_k} work on a token; about 0.5 M
parameters) trained on this machine by model surgery's lab, on synthetic sums modulo 7 only. It is test material: it
knows nothing else.

- Asked as: `{before}{example.question}{after}`
- Answers: at once, `{example.answer}`, or step by step, `{thought}{example.answer}`
- Trained from: random weights, first with {practice}; then with {mixture}; all along with the load-balancing loss
- Final loss: {losses[-1]:.4f} nats a token, without the load-balancing loss
- Greedy decoding on the {n_problems} test problems: thinks about {asked.thought:.3f} of them and solves
  {asked.solved:.3f} ({known[0]} of those that it thinks about, {known[1]} of the rest)
- Greedy decoding after `{opening}`, so that it thinks about every problem: solves {opened.solved:.3f}
- Beside the weights: the data `examples.jsonl` and `pool.jsonl`, of problems drawn apart from these; every other row
  has a thinking and a response
- Stored in fp32, as trained, so that effects of experts are exact
- Recipe `{recipe.key}`, seed {recipe.seed}; the full numbers are in trainer_state.json
"""


def _said(share: float | None) -> str:
    return "none" if share is None else f"{share:.3f}"
