"""The plan of a growth: what it may say, and how its stages follow from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.errors import SurgeryError
from surgery.growth.plan import GrowthPlan, Plateau, StageTraining, plan_names, read_plan

PLAN = """
embed: EMB
corpus: text.txt
sequence: 8
batch: 4
training: {learning_rate: 1e-2}
stages:
  - {times: 2, tokens: 100}
  - {add: 2, at: middle, init: random, train: [new, lora], tokens: 33, plateau: {tokens: 10}, training: {clip: 2}}
cache: {disk: 1.5 MB}
"""


@pytest.fixture
def plan(tmp_path: Path) -> GrowthPlan:
    (tmp_path / "plan.yml").write_text(PLAN)
    return read_plan(str(tmp_path / "plan.yml"))[0]


def faults_of(text: str, tmp_path: Path) -> str:
    (tmp_path / "p.yml").write_text(text)
    with pytest.raises(SurgeryError) as caught:
        read_plan(str(tmp_path / "p.yml"))
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_stages_are_repeated_and_learn_as_the_plan_or_they_say(plan: GrowthPlan) -> None:
    assert [(stage.add, stage.at, stage.init) for stage in plan.expanded] == [
        (1, "top", "identity"),
        (1, "top", "identity"),
        (2, "middle", "random"),
    ]
    assert [stage.training for stage in plan.expanded] == [
        StageTraining(learning_rate=0.01),
        StageTraining(learning_rate=0.01),
        StageTraining(clip=2),
    ]
    assert plan.expanded[2].plateau == Plateau(tokens=10)
    assert plan.corpus == ("text.txt",) and plan.cache.disk == 1_500_000


def test_lists_of_one_need_no_brackets(tmp_path: Path) -> None:
    (tmp_path / "plan.yml").write_text("stages: [{tokens: 5, train: head}]\nevaluate: {texts: a.txt, tasks: piqa}")
    plan, _ = read_plan(str(tmp_path / "plan.yml"))
    assert (plan.stages[0].train, plan.evaluate.texts, plan.evaluate.tasks) == (("head",), ("a.txt",), ("piqa",))


def test_a_stage_takes_the_fewest_steps_that_see_its_tokens(plan: GrowthPlan) -> None:
    assert plan.steps_of == (4, 4, 2)


def test_the_papers_schedules_ship_with_the_tool() -> None:
    assert plan_names() == ["one-by-one", "small", "three-by-three"]
    one, three = (read_plan(name)[0] for name in ("one-by-one", "three-by-three"))
    assert [stage.add for stage in one.expanded] == [1] * 6
    assert [stage.add for stage in three.expanded] == [3] * 3
    assert {stage.init for plan in (one, three) for stage in plan.expanded} == {"random"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: []", "p.yml:1: stages: holds no stage"),
        ("stages: [{tokens: 5, at: -1}]", "stages[0].at: got -1, expected top, middle, or the number of a layer"),
        ("stages: [{tokens: 5, at: medium}]", "got 'medium', expected top, middle, or the number of a layer"),
        ("stages: [{tokens: 5, train: []}]", "stages[0].train: nothing trains; name new, head,"),
        ("stages: [{tokens: 5, train: [heads]}]", "did you mean head?"),
        ("stages: [{tokens: 5, add: 0, train: [new]}]", "stages[0]: trains new layers, but adds none"),
        ("stages: [{tokens: 5, train: [all, lora]}]", "stages[0].train: got lora beside all, which trains the layers"),
        (
            "stages: [{tokens: 5}]\ntraining: {betas: [0.9, 1]}",
            "p.yml:2: training.betas[1]: got 1, expected less than 1",
        ),
        (
            "stages: [{tokens: 5}]\ncache: {disk: inf GB}",
            "p.yml:2: cache.disk: got 'inf GB', expected a number of bytes",
        ),
        (
            "stages: [{tokens: 5, times: 9223372036854775808}]",
            "stages: holds more than 1,000 stages, repetitions counted",
        ),
        ("stages: [{tokens: 5, add: 1001}]", "stages[0].add: got 1001, expected less than or equal to 1000"),
        ("stages: [{token: 5}]", "p.yml:1: stages[0].token: is not known here; did you mean tokens?"),
        ("stages: [{tokens: 0}]", "stages[0].tokens: got 0, expected greater than 0"),
        ("stages: [{tokens: 5}]\ncache: {disk: 5 XB}", "p.yml:2: cache.disk: got '5 XB', expected a number of bytes"),
        ("stages: [{tokens: 5}]\nseqence: 5", "p.yml:2: seqence: is not known here; did you mean sequence?"),
    ],
)
def test_a_plan_with_a_fault_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    assert message in faults_of(text, tmp_path)


def test_a_plan_that_is_not_there_names_those_that_ship(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"no-plan: no such plan. Give a YAML file, or one of one-by-one"):
        read_plan("no-plan")
