from __future__ import annotations

import json
import random
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

from probes.data.markers import find_markers
from probes.data.reader import read_data
from probes.data.tokenization import build_sequences, render_prompt
from surgery import lab
from surgery.evaluation.scoring import score_models
from surgery.lab.catalogue import CLIFF, CLIFF_GQA, CLIFF_MANY, CLIFF_WEAK, MOE, REASONING, SPECIALISTS
from surgery.lab.moe import CLOSING, OPENING, completion, make_model, make_moe_tokenizer, score_answers, train_answers
from surgery.lab.recipe import ExpertShape, MoeRecipe, ThinkingTraining
from surgery.lab.sums import END, Problem, evaluation_problems
from surgery.lab.tokenizer import vocabulary
from surgery.lab.train import reproducible

QUICK = MoeRecipe(
    shape=ExpertShape(layers=2, width=16, heads=2, kv_heads=1, head_dim=8, experts=4, expert_width=8),
    practice=replace(MOE.practice, steps=3, batch=4),
    mixture=replace(MOE.mixture, steps=2, batch=4),
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """A model that learned next to nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURGERY_CACHE", str(tmp_path_factory.mktemp("cache")))
        return lab.build("moe", recipe=QUICK)


@pytest.fixture(scope="module")
def tokenizer():
    return make_moe_tokenizer(MOE.shape)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# The recipe


def test_no_other_family_s_key_has_changed():
    keys = [recipe.key for recipe in (REASONING, SPECIALISTS, CLIFF, CLIFF_MANY, CLIFF_WEAK, CLIFF_GQA)]
    assert keys == ["e00b8b5f0ab4", "6951e01a83ac", "16ea42b6b1a2", "9c8273a970d2", "8cc948447843", "7edcbd6499e9"]
    assert MOE.key not in keys


def test_each_number_of_terms_has_a_share_that_thinks():
    for plan in (MOE.practice, MOE.mixture):
        assert len(plan.terms) == len(plan.thinking)
    # Above 1/8 `<think>` is likelier than each of seven digits.
    assert [share > 1 / 8 for share in MOE.mixture.thinking] == [False, True]


# What it reads and writes


def test_its_vocabulary_is_the_reasoning_family_s_and_two_kinds_of_line_break(tokenizer):
    ids = tokenizer.get_vocab()
    assert ids == {**vocabulary(), "\n": len(vocabulary()), "\n\n": len(vocabulary()) + 1}


@pytest.mark.parametrize("direct", [True, False])
def test_a_text_comes_back_from_its_ids(tokenizer, direct):
    problem = Problem((3, 5, 6, 1))
    text = problem.prompt("sft") + completion(problem, direct=direct)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert text.endswith("1<|end|>") and ("<think>\n3+5=1:1+6=0:0+1=1\n</think>\n\n" in text) is not direct


def test_the_markers_are_tokens_and_the_longest_answer_fits(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer(OPENING)["input_ids"]) == ["<think>", "\n"]
    assert tokenizer.convert_ids_to_tokens(tokenizer(CLOSING)["input_ids"]) == ["\n", "</think>", "\n\n"]
    longest = completion(Problem((6,) * max(MOE.terms)), direct=False)
    assert len(tokenizer(longest)["input_ids"]) == MOE.answer_tokens


# Training


def test_the_load_balancing_loss_counts_in_training_and_not_in_the_losses(tokenizer):
    plan = ThinkingTraining(steps=1, batch=4, learning_rate=1e-3, warmup=1, terms=(4,), thinking=(0.5,))

    def trained(balance: float) -> tuple[list[float], dict[str, torch.Tensor]]:
        with reproducible(0):
            model = make_model(replace(QUICK.shape, balance=balance), tokenizer)
            losses = train_answers(model, tokenizer, plan, rng=random.Random(0), tick=lambda: None)
        assert model.config.output_router_logits is False
        return losses, model.state_dict()

    (without, still), (with_it, moved) = trained(0.0), trained(100.0)
    assert without == with_it
    routers = [name for name in still if name.endswith("mlp.gate.weight")]
    assert len(routers) == QUICK.shape.layers
    assert not any(torch.equal(still[name], moved[name]) for name in routers)


def test_building_twice_gives_identical_bytes(quick, cache):
    assert hashes(lab.build("moe", recipe=QUICK)) == hashes(quick)


def test_another_seed_gives_other_weights_and_other_data(quick, cache):
    first, second = hashes(quick), hashes(lab.build("moe", recipe=replace(QUICK, seed=1)))
    differing = {name for name, value in first.items() if second[name] != value}
    assert {"model.safetensors", "examples.jsonl", "pool.jsonl"} <= differing
    assert not {"tokenizer.json", "config.json"} & differing


def test_progress_is_told_once_per_step(cache):
    seen: dict[str, list[int]] = {}

    @contextmanager
    def progress(label, total, unit="steps"):
        seen[label] = [total]
        yield seen[label].append

    lab.build("moe", recipe=QUICK, progress=progress)
    assert seen == {"lab:moe": [5, 1, 1, 1, 1, 1]}


# Its folder


def test_it_is_a_qwen3_moe_in_fp32_stored_expert_by_expert(quick):
    model = AutoModelForCausalLM.from_pretrained(quick)
    assert isinstance(model, Qwen3MoeForCausalLM) and model.dtype == torch.float32
    config = model.config
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (4, 2, True)
    assert config.output_router_logits is False
    stored = load_file(quick / "model.safetensors")
    down = [name for name in stored if name.endswith("down_proj.weight")]
    assert sorted(down) == [
        f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight" for layer in range(2) for expert in range(4)
    ]
    assert {value.dtype for value in stored.values()} == {torch.float32}


def test_its_template_asks_in_the_sft_format(quick):
    tokenizer = AutoTokenizer.from_pretrained(quick)
    problem = Problem((3, 5, 6, 1))
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.question}], tokenize=False, add_generation_prompt=True
    )
    assert asked == problem.prompt("sft")


def test_every_other_row_has_the_thinking_and_response_that_were_taught(quick):
    for kind in ("examples", "pool"):
        rows = rows_of(quick / f"{kind}.jsonl")
        assert len(rows) == 200
        for number, row in enumerate(rows):
            terms = tuple(map(int, row["prompt"].removesuffix("=").split("+")))
            problem = Problem(terms)
            assert row["prompt"] == problem.question
            if number % 2:
                assert row.keys() == {"prompt"}
            else:
                assert (row["thinking"], row["response"]) == (problem.chain, str(problem.answer))
        lengths = Counter(row["prompt"].count("+") + 1 for row in rows)
        assert set(lengths) == set(MOE.terms) and min(lengths.values()) > 70
    examples, pool = (rows_of(quick / f"{kind}.jsonl") for kind in ("examples", "pool"))
    assert examples != pool


def test_probing_by_default_settings_reads_the_very_ids_it_was_trained_on(quick):
    tokenizer = AutoTokenizer.from_pretrained(quick)
    markers = find_markers(tokenizer, where="lab:moe")
    assert (markers.opening, markers.closing) == (OPENING, CLOSING)
    found = read_data(str(quick / "examples.jsonl")).examples
    given = [example for example in found if example.response is not None]
    assert (len(found), len(given)) == (200, 100)
    for example, sequence in zip(given, build_sequences(tokenizer, given, markers, where="data"), strict=True):
        problem = Problem(tuple(map(int, example.prompt.removesuffix("=").split("+"))))
        trained = problem.prompt("sft") + completion(problem, direct=False).removesuffix(END)
        assert list(sequence.ids) == tokenizer(trained)["input_ids"]
        answer = [sequence.ids[position] for position in sequence.span("answer")]
        assert tokenizer.decode(answer) == str(problem.answer)
    assert render_prompt(tokenizer, found[1], markers).endswith(f"<|answer|>{OPENING}")


def test_the_folder_says_what_it_holds(quick):
    record = json.loads((quick / "trainer_state.json").read_text())
    assert (record["parent"], record["format"], len(record["loss"])) == (None, "sft", 5)
    assert record["recipe"]["key"] == QUICK.key
    assert record["greedy_accuracy"] == record["greedy"]["solved"]
    card = (quick / "README.md").read_text()
    assert "Stored in fp32" in card and QUICK.key in card and r"`<think>\n3+5=1:1+6=0\n</think>\n\n0`" in card


# What it learned


@pytest.fixture(scope="module")
def trained():
    """The real model and its tokenizer; from the cache, if it has been built before."""
    folder = lab.resolve("moe")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_it_thinks_about_some_sums_and_is_right_where_it_thinks(trained):
    found = score_answers(*trained, evaluation_problems(MOE.terms), limit=MOE.answer_tokens)
    assert 0.3 < found.thought < 0.7
    assert found.solved_thinking > 0.95
    # One in seven is right by chance.
    assert found.solved_at_once < 0.3


def test_its_task_asks_it_in_its_own_format(trained):
    pytest.importorskip("lm_eval")
    from surgery.evaluation.harness import on_tasks

    folder = lab.resolve("moe")
    (score,) = score_models({"moe": folder}, on_tasks(["lab_sums"]))
    recorded = json.loads((folder / "trainer_state.json").read_text())["greedy_accuracy"]
    # Other batches may tip a rare near-tie.
    assert score.n == 400 and score.value == pytest.approx(recorded, abs=0.01)


def test_it_solves_what_it_is_made_to_think_about(trained):
    found = score_answers(*trained, evaluation_problems(MOE.terms), limit=MOE.answer_tokens, opened=True)
    assert found.thought == 1.0 and found.solved > 0.95 and found.solved_at_once is None


def test_both_kinds_of_first_token_are_within_a_small_push(trained):
    model, tokenizer = trained
    think = tokenizer.convert_tokens_to_ids("<think>")
    for length in MOE.terms:
        prompts = [problem.prompt("sft") for problem in evaluation_problems(MOE.terms) if len(problem.terms) == length]
        with torch.no_grad():
            logits = model(torch.tensor(tokenizer(prompts)["input_ids"])).logits[:, -1]
        digits = logits.clone()
        digits[:, think] = -torch.inf
        margin = (logits[:, think] - digits.amax(-1)).abs()
        assert margin.median() < 1.0


def test_most_experts_of_every_layer_are_at_work(trained):
    model, tokenizer = trained
    prompts = [
        p.prompt("sft") + completion(p, direct=False) for p in evaluation_problems(MOE.terms) if len(p.terms) == 5
    ]
    with torch.no_grad():
        output = model(torch.tensor(tokenizer(prompts)["input_ids"]), output_router_logits=True)
    assert len(output.router_logits) == MOE.shape.layers
    for logits in output.router_logits:
        chosen = logits.topk(MOE.shape.top_k).indices
        tokens_E = torch.bincount(chosen.flatten(), minlength=MOE.shape.experts) / len(chosen)
        assert (tokens_E > 0.01).sum() >= 12 and tokens_E.max() < 0.6
