from __future__ import annotations

import json
import math
import socket
import sys

import pytest
from support.lab import family
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.evaluation import harness as module
from surgery.evaluation.harness import on_tasks
from surgery.evaluation.scoring import Score, score_models
from surgery.evaluation.statistics import wilson_interval
from surgery.lab.catalogue import MODELS, REASONING
from surgery.models.loading import ModelAndTokenizer

pytest.importorskip("lm_eval")

# Batches and dtypes other than the lab's own may tip a rare near-tie.
NEAR_TIES = 0.01


def evaluate(models, tasks, *, dtype="auto", **asked):
    return score_models(models, on_tasks(tasks, **asked), dtype=dtype)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_every_lab_model_is_asked_in_its_own_format(no_network):
    models = {name: folder for name, folder in family().items() if MODELS[name].recipe is REASONING}
    # As the lab measured them: a model that guesses is full of near-ties, which bf16 tips.
    scores = evaluate(models, ["lab_sums"], dtype="float32")
    assert [(score.model, score.task, score.metric, score.n) for score in scores] == [
        (name, "lab_sums", "exact_match", 400) for name in models
    ]
    for score in scores:
        recorded = json.loads((models[score.model] / "trainer_state.json").read_text())["greedy_accuracy"]
        assert score.value == pytest.approx(recorded, abs=NEAR_TIES)
        assert (score.low, score.high) == pytest.approx(wilson_interval(round(score.value * 400), 400))


def test_each_specialist_knows_its_own_domain_only(no_network):
    models = {name: family()[name] for name in ("adder", "sorter")}
    scores = evaluate(models, ["lab_sums", "lab_sorting"], dtype="float32")
    found = {(score.model, score.task): score for score in scores}
    assert found["adder", "lab_sums"].value > 0.95 and found["sorter", "lab_sorting"].value > 0.95
    # A final digit is right by chance once in seven; digits in order never are.
    assert found["sorter", "lab_sums"].value < 0.3 and found["adder", "lab_sorting"].value < 0.05
    for (name, task), score in found.items():
        recorded = json.loads((models[name] / "trainer_state.json").read_text())["greedy_accuracy"]
        assert score.value == pytest.approx(recorded[task.removeprefix("lab_")], abs=NEAR_TIES)
        assert (score.metric, score.n, score.higher_is_better) == ("exact_match", 400, True)


def test_a_model_in_memory_scores_as_its_folder_does():
    folder = family()["grpo"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (measure,) = on_tasks(["lab_sums"], limit=40)
    scores = measure(ModelAndTokenizer("grpo", model, tokenizer))
    assert scores == evaluate({"grpo": folder}, ["lab_sums"], limit=40)
    assert scores[0].n == 40


def test_a_score_does_not_depend_on_what_else_is_asked():
    models = {"grpo": family()["grpo"]}
    both = evaluate(models, ["lab_sums", "lab_sorting", "lab_sums"], limit=20)
    assert both == evaluate(models, ["lab_sums"], limit=20) + evaluate(models, ["lab_sorting"], limit=20)


def test_the_prompt_goes_through_the_template_unless_told_not_to(monkeypatch):
    from lm_eval.models.huggingface import HFLM

    asked = []

    def answer(_model, requests, **_):
        asked.append(requests[0].args[0])
        return ["0" for _ in requests]

    monkeypatch.setattr(HFLM, "generate_until", answer)
    for chat in (None, False, True):
        evaluate({"instruct": family()["instruct"]}, ["lab_sums"], limit=1, chat=chat)
    question = asked[1]
    assert question.endswith("=")
    assert asked == [f"<|user|>{question}<|end|><|assistant|>", question, f"<|user|>{question}<|end|><|assistant|>"]


def test_the_harness_says_nothing(capfd):
    evaluate({"sft": family()["sft"]}, ["lab_sums"], limit=4)
    assert capfd.readouterr() == ("", "")


def test_the_caller_s_random_state_is_left_alone():
    import random

    import torch

    before = random.getstate(), torch.get_rng_state()
    evaluate({"sft": family()["sft"]}, ["lab_sums"], limit=4)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_chat_template_that_is_not_there_is_wrong_usage():
    with pytest.raises(SurgeryError, match="base: the tokenizer has no chat template") as caught:
        evaluate({"base": family()["base"]}, ["lab_sums"], chat=True)
    assert caught.value.exit_code == WRONG_USAGE


def test_an_unknown_task_is_wrong_usage_and_names_the_nearest(tmp_path):
    with pytest.raises(SurgeryError, match=r"no such task: 'gsm8kk'.*gsm8k") as caught:
        evaluate({"any": tmp_path}, ["gsm8kk"])
    assert caught.value.exit_code == WRONG_USAGE


@pytest.mark.parametrize(("models", "tasks"), [({}, ["lab_sums"]), ({"a": "a"}, [])])
def test_nothing_to_do_is_wrong_usage(models, tasks):
    with pytest.raises(SurgeryError) as caught:
        evaluate(models, tasks)
    assert caught.value.exit_code == WRONG_USAGE


def test_a_folder_without_a_model_is_one_clear_error(tmp_path):
    with pytest.raises(SurgeryError, match=r"has no \.safetensors file\. Give the folder"):
        evaluate({"empty": tmp_path}, ["lab_sums"])


def test_without_the_extra_the_error_says_how_to_install_it(monkeypatch, tmp_path):
    module._index.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(SurgeryError, match=r"pip install 'model-surgery\[eval\]'"):
        evaluate({"any": tmp_path}, ["lab_sums"])


def harness_answer(row, samples=(), **more):
    return {"results": {"task": row}, "samples": {"task": list(samples)}, "n-samples": {}, **more}


def test_other_metrics_take_the_harness_s_standard_error():
    row = {"alias": "task", "sample_len": 50, "bleu,none": 20.0, "bleu_stderr,none": 2.0}
    (score,) = module._read_scores("m", "task", harness_answer(row))
    assert (score.low, score.high) == pytest.approx((20 - 1.96 * 2, 20 + 1.96 * 2), abs=1e-3)
    assert score.n == 50


def test_a_metric_without_standard_error_has_no_interval():
    row = {"sample_len": 50, "bleu,none": 20.0, "bleu_stderr,none": "N/A"}
    (score,) = module._read_scores("m", "task", harness_answer(row))
    assert math.isnan(score.low)
    assert math.isnan(score.high)


def test_which_way_is_better_comes_from_the_task():
    row = {"sample_len": 5, "acc,none": 0.4, "word_perplexity,none": 9.0}
    told = {"task": {"acc": True, "word_perplexity": False}}
    scores = module._read_scores("m", "task", harness_answer(row, higher_is_better=told))
    assert [score.higher_is_better for score in scores] == [True, False]
    assert [score.higher_is_better for score in module._read_scores("m", "task", harness_answer(row))] == [None, None]


def test_filters_are_named_where_there_are_several():
    row = {"sample_len": 2, "exact_match,strict": 0.5, "exact_match,flexible": 1.0}
    samples = [
        {"filter": "strict", "exact_match": 0},
        {"filter": "strict", "exact_match": 1},
        {"filter": "flexible", "exact_match": 1},
        {"filter": "flexible", "exact_match": 1},
    ]
    assert module._read_scores("m", "task", harness_answer(row, samples)) == [
        Score("m", "task", "exact_match (strict)", 0.5, *wilson_interval(1, 2), 2),
        Score("m", "task", "exact_match (flexible)", 1.0, *wilson_interval(2, 2), 2),
    ]


def test_a_group_s_own_score_stands_for_its_tasks_and_a_tag_s_tasks_for_themselves():
    group = {"alias": "all", "acc,none": 0.4, "acc_stderr,none": 0.1}
    parts = {name: {"sample_len": 5, "acc,none": 0.4, "acc_stderr,none": 0.2} for name in ("one", "two")}
    counts = {name: {"original": 9, "effective": 5} for name in parts}
    answer = {"results": parts, "groups": {"all": group}, "samples": {}, "n-samples": counts}
    (score,) = module._read_scores("m", "all", answer)
    assert (score.task, score.value, score.n) == ("all", 0.4, 10)
    assert [score.task for score in module._read_scores("m", "tag", {**answer, "groups": {}})] == ["one", "two"]


def test_a_task_without_numbers_is_an_error():
    with pytest.raises(SurgeryError, match="task: the task gave no number"):
        module._read_scores("m", "task", harness_answer({"alias": "task"}))
