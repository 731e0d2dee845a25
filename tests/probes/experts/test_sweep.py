"""Promises of probes.experts.sweep: β is chosen on samples that it is not tested on, beside controls that match."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import add_tokenizer, build
from support.models import hook_count
from support.moe import AT_M, AT_THINK, COLLAPSING, Asked, logits_of, make_thinker, stub_tasks
from support.moe_families import EXPERTS

from probes.data.preparation import open_model
from probes.data.records import IntervalRecord
from probes.experts.findings import ExpertRecord, SweepRecord
from probes.experts.report import _sweep_sentence
from probes.experts.sweep import CHOICE, NEAREST, TEST, BetaGrid, check_tasks, matched_controls, parse_betas, sweep_beta
from probes.model.routers import find_routers
from surgery.checkpoint.selectors import Expert
from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.evaluation.harness import on_tasks
from surgery.models.loaded_model import LoadedModel
from surgery.models.loading import ModelAndTokenizer, load_model

IDS = torch.tensor([[2, 4, 20, 21, 22, 3, 5, 6, 8]])


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return open_model(make_thinker(tmp_path_factory.mktemp("sweep") / "m"))


def record(expert: Expert, rank: int | None, rate: float = 0.1) -> ExpertRecord:
    return ExpertRecord(
        layer=expert.layer,
        expert=expert.index,
        npmi=0.5,
        by_marker=[0.5],
        smoothed=IntervalRecord(value=0.4),
        difference=0.3,
        fires=100,
        at_marker=20,
        rate=rate,
        q=0.01,
        rank=rank,
        rank_low=None,
        rank_high=None,
        published_rank=1,
        why=None if rank else "hardly ever fires",
    )


RANKED = [record(AT_THINK, 1), record(AT_M, 2)]
EVERY = [
    *RANKED,
    *(
        record(Expert(layer, number), None, rate=0.1 + 0.01 * number)
        for layer in (0, 1)
        for number in range(EXPERTS)
        if Expert(layer, number) not in (AT_THINK, AT_M)
    ),
]


def run(live: LoadedModel, grid: BetaGrid, **how: Any) -> SweepRecord:
    return sweep_beta(live, find_routers(live), RANKED, EVERY, how.pop("prompts", ()), grid, **how)


def by_table(choice: dict[float, float], test: dict[float, float]):
    def score(asked: Asked) -> float:
        (beta,) = set(asked.scales.values())
        return (choice if asked.part == CHOICE else test)[beta]

    return score


# The choice


def test_the_best_of_one_half_is_tested_on_the_other(live: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    choice, test = {1.0: 0.5, 2.0: 0.6, 4.0: 0.8, 8.0: 0.7}, {1.0: 0.4, 4.0: 0.3}
    asked = stub_tasks(monkeypatch, by_table(choice, test))
    before, plain = hook_count(live), logits_of(live, IDS)
    found = run(live, BetaGrid([2, 4, 8], ["t"], controls=3))
    assert found.best == 4 and found.experts == [str(AT_THINK), str(AT_M)]
    main = [(p.part, p.beta, p.scores["t"].value) for p in found.points if p.control is None]
    assert main == [*(("choice", beta, value) for beta, value in choice.items()), ("test", 1, 0.4), ("test", 4, 0.3)]
    controls = [p for p in found.points if p.control is not None]
    assert [(p.part, p.beta, p.control) for p in controls] == [("test", 4, number) for number in range(3)]
    for point in controls:
        layers = [Expert.parse(name) for name in point.experts]
        assert [expert.layer for expert in layers] == [1, 1] and not {AT_THINK, AT_M} & set(layers)
        assert len(set(layers)) == 2
    # No sample of the choice is among those of the test.
    assert {a.part for a in asked} == {CHOICE, TEST}
    assert [a.part for a in asked] == [CHOICE] * 4 + [TEST] * 5
    assert hook_count(live) == before and torch.equal(logits_of(live, IDS), plain)
    assert found == run(live, BetaGrid([2, 4, 8], ["t"], controls=3))  # by its seed
    assert "β = 4, chosen on one half of t, takes the other from 40.0%" in _sweep_sentence(found)


def test_of_equally_good_ones_the_nearest_to_1_is_chosen(live: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_tasks(monkeypatch, by_table({0.0: 0.9, 1.0: 0.5, 2.0: 0.9, 0.25: 0.9, 8.0: 0.9}, {1.0: 0.5, 2.0: 0.5}))
    assert run(live, BetaGrid([0, 8, 0.25, 2], ["t"], controls=0)).best == 2


def test_where_nothing_is_better_the_strongest_shows_what_random_experts_do(
    live: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_tasks(monkeypatch, by_table({1.0: 0.5, 2.0: 0.5, 4.0: 0.1}, {1.0: 0.6, 4.0: 0.2}))
    found = run(live, BetaGrid([2, 4], ["t"], controls=2))
    assert found.best == 1
    assert [(p.beta, p.control) for p in found.points if p.part == "test"] == [(1, None), (4, None), (4, 0), (4, 1)]
    said = _sweep_sentence(found)
    assert "No β of the grid is better than leaving t as it is (60.0%" in said
    assert "β = 4 gives 20.0%" in said and "random experts of the same layers give 20.0% to 20.0%" in said


def test_the_mean_over_tasks_chooses(live: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {("a", 1.0): 0.5, ("b", 1.0): 0.5, ("a", 2.0): 0.9, ("b", 2.0): 0.0, ("a", 4.0): 0.6, ("b", 4.0): 0.6}

    def score(asked: Asked) -> float:
        return values[asked.task, next(iter(asked.scales.values()))]

    stub_tasks(monkeypatch, score, known=("a", "b"))
    found = run(live, BetaGrid([1, 2, 4], ["a", "b"], top=1, controls=1))
    assert found.best == 4 and found.experts == [str(AT_THINK)] and set(found.points[0].scores) == {"a", "b"}


def test_answers_that_collapse_are_counted_at_each_beta(live: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_tasks(monkeypatch, lambda asked: 0.5)
    prompts = [tuple(IDS[0].tolist()), (2, 4, 30, 31, 3, 5, 6, 8)]
    found = run(live, BetaGrid([COLLAPSING], ["t"], controls=1), prompts=prompts, max_new_tokens=40)
    collapsed = [(p.beta, p.part, p.control, p.collapsed and p.collapsed.value) for p in found.points]
    assert collapsed == [
        (1, "choice", None, 0.0),
        (COLLAPSING, "choice", None, 1.0),
        (1, "test", None, None),
        (COLLAPSING, "test", None, None),
        (COLLAPSING, "test", 0, None),
    ]


def test_the_phase_generated_cannot_choose_by_what_is_scored_in_one_pass(
    live: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_tasks(monkeypatch, lambda asked: 0.5)
    before = hook_count(live)
    with pytest.raises(SurgeryError, match="t: no token was generated one by one, so that --phase generated"):
        run(live, BetaGrid([2], ["t"], phase="generated"))
    assert hook_count(live) == before


def test_a_metric_that_is_better_when_lower_is_refused(live: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from probes.experts import sweep as expert_sweep

    stub_tasks(monkeypatch, lambda asked: 0.5)
    plain = expert_sweep.on_tasks

    def lower(tasks: list[str], **how: Any) -> list[Any]:
        def measure(loaded: ModelAndTokenizer) -> list[Any]:
            (score,) = plain(tasks, **how)[0](loaded)
            return [type(score)(**{**vars(score), "higher_is_better": False})]

        return [measure]

    monkeypatch.setattr(expert_sweep, "on_tasks", lower)
    with pytest.raises(SurgeryError, match="the first metric of t, accuracy, is better when it is lower"):
        run(live, BetaGrid([2], ["t"]))


def test_more_experts_than_are_ranked_are_refused(live: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stub_tasks(monkeypatch, lambda asked: 0.5)
    with pytest.raises(SurgeryError, match="--top: 2 experts have evidence enough to be ranked, 3") as caught:
        run(live, BetaGrid([2], ["t"], top=3))
    assert caught.value.exit_code == WRONG_USAGE and not asked


# The controls


def test_controls_are_of_the_same_layer_and_among_the_nearest_in_firing_rate() -> None:
    drawn = [matched_controls([AT_THINK, AT_M], EVERY, random.Random(seed)) for seed in range(60)]
    for controls in drawn:
        assert len(set(controls)) == 2 and all(expert.layer == 1 for expert in controls)
        assert not {AT_THINK, AT_M} & set(controls)
    # The rates of layer 1 rise with the number: the four nearest to 0.1 are the first four others.
    assert {first.index for first, _ in drawn} == {0, 1, 2, 4} and NEAREST == 4
    assert {second.index for _, second in drawn} == {0, 1, 2, 4, 5}


def test_a_layer_without_another_expert_has_no_control() -> None:
    every = [record(Expert(0, number), None) for number in range(3)]
    with pytest.raises(SurgeryError, match="layer 0 has no other expert left to be the control of L0E1"):
        matched_controls([Expert(0, 0), Expert(0, 1)], every, random.Random(0))


# Bad input


@pytest.mark.parametrize(
    ("text", "betas"),
    [
        ("1,2,4", [1, 2, 4]),
        ("1,2,4,…,512", [2**power for power in range(10)]),
        ("1,2,...,8", [1, 2, 4, 8]),
        ("1, 4, …, 100", [1, 4, 16, 64, 100]),
        ("0,0.5,1", [0, 0.5, 1]),
        ("2,2,2", [2]),
        ("64", [64]),
        ("1,1.5,…,3.375", [1, 1.5, 2.25, 3.375]),
    ],
)
def test_a_grid_is_a_list_that_may_go_on_by_its_ratio(text: str, betas: list[float]) -> None:
    assert parse_betas(text) == pytest.approx(betas)


@pytest.mark.parametrize("text", ["", "a", "1,,2", "1,…,8", "…", "1,2,…", "1,2,…,x", "-1", "nan", "1,inf", "0,2,…,8"])
def test_a_grid_that_is_none_is_told(text: str) -> None:
    with pytest.raises(SurgeryError, match="--sweep: got ") as caught:
        parse_betas(text)
    assert caught.value.exit_code == WRONG_USAGE


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"top": 0}, "--top: got 0, expected 1 or more"),
        ({"controls": -1}, "--controls: got -1"),
        ({"betas": []}, "give both --sweep and --task"),
        ({"tasks": []}, "give both --sweep and --task"),
        ({"betas": [0, 2], "way": "logit"}, "--sweep: got β = 0, which has no logarithm"),
        ({"betas": [-1]}, "got β = -1"),
        ({"way": "loud"}, "--way: got 'loud'"),
        ({"phase": "never"}, "--phase: got 'never'"),
    ],
)
def test_a_grid_out_of_range_is_told_before_anything_runs(given: dict[str, Any], text: str) -> None:
    with pytest.raises(SurgeryError, match=text) as caught:
        BetaGrid(**{"betas": [1, 2], "tasks": ["t"], **given})
    assert caught.value.exit_code == WRONG_USAGE


# Real tasks


def test_an_unknown_task_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_tasks(monkeypatch, lambda asked: 0.5)
    check_tasks(BetaGrid([2], ["t"]))
    with pytest.raises(SurgeryError, match="no such task: x"):
        check_tasks(BetaGrid([2], ["t", "x"]))


def test_the_halves_of_a_task_share_no_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    loaded = load_model(add_tokenizer(build("llama", tmp_path / "m")), "m")
    seen: list[list[Any]] = []

    def answer(_model: Any, requests: list[Any], **_: Any) -> list[str]:
        seen.append([request.doc for request in requests])
        return ["0" for _ in requests]

    monkeypatch.setattr(HFLM, "generate_until", answer)
    for part, limit in ((None, None), (CHOICE, None), (TEST, None), (CHOICE, 9), (TEST, 9)):
        (measure,) = on_tasks(["lab_sums"], part=part, limit=limit)
        assert measure(loaded)[0].n == len(seen[-1])
    whole, choice, test, few, fewer = seen
    assert len(whole) == 400 and choice == whole[::2] and test == whole[1::2]
    assert few == whole[:9:2] and fewer == whole[1:9:2]
    with pytest.raises(SurgeryError, match="lab_sums: has 1 samples, too few for 2 parts"):
        on_tasks(["lab_sums"], part=TEST, limit=1)[0](loaded)
