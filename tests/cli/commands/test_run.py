"""Promises of `surgery run`: recipes of the file are listed, checked, shown, run, and told as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.cli import Surgery, commands_in
from support.recipe_runs import make_models, write_recipe

from cli.commands import run as recipes
from surgery.recipes.parse.file import RecipeSummary, recipes_in
from surgery.recipes.parse.graph import build_pipeline

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_recipe(folder, make_models(folder))
    return folder


@pytest.fixture
def surgery(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Surgery:
    return commands_in(folder, monkeypatch, capsys)


def test_without_a_name_the_recipes_are_listed(surgery: Surgery) -> None:
    said = surgery("run")
    assert said.code == 0
    assert "reasoning" in said.out and "A vector, moved in two strengths, and merged." in said.out
    assert surgery("run", "--json").json["recipes"][0]["name"] == "reasoning"


def test_a_dry_run_shows_every_step_and_does_nothing(surgery: Surgery, folder: Path) -> None:
    said = surgery("run", "reasoning", "--dry-run", "-o", "dry")
    assert said.code == 0
    for name in ("vector", "moved.scale=0.5", "moved.scale=1.0", "merged", "distance"):
        assert name in said.out
    assert said.out.count("to do") == 5
    assert "Nothing done (--dry-run)." in said.err
    assert not (folder / "dry").exists()


def test_a_run_says_as_json_what_it_did_and_the_next_does_nothing(surgery: Surgery, folder: Path) -> None:
    first = surgery("run", "reasoning", "-o", "run", "--json", "--jobs", 2)
    assert first.code == 0, first.err
    steps = first.json["steps"]
    assert {step["state"] for step in steps.values()} == {"done"}
    assert (folder / "run" / "steps" / "merged" / "out" / "surgery.json").is_file()
    page = (folder / first.json["report"]).read_text(encoding="utf-8")
    assert "merge weights linear" in page.replace("surgery merge weights", "merge weights")
    again = surgery("run", "reasoning", "-o", "run", "--json").json["steps"]
    assert {step["state"] for step in again.values()} == {"unchanged"}
    assert {n: s["output"] for n, s in again.items()} == {n: s["output"] for n, s in steps.items()}


def test_a_setting_reaches_the_steps_that_use_it(surgery: Surgery, folder: Path) -> None:
    assert surgery("run", "reasoning", "-o", "run").code == 0
    said = surgery("run", "reasoning", "-o", "run", "--set", "seed=2", "--json").json["steps"]
    assert {name for name, step in said.items() if step["state"] == "done"} == {"merged", "distance"}
    record = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))
    assert "--seed 2" in record["steps"]["merged"]["line"]


@pytest.mark.parametrize("text", ["seed", "=1", ""])
def test_a_setting_without_a_name_or_value_is_wrong_usage(surgery: Surgery, text: str) -> None:
    said = surgery("run", "reasoning", "--set", text)
    assert (said.code, "expected KEY=VALUE" in said.err) == (2, True)


def test_an_unknown_recipe_step_or_variable_names_the_nearest(surgery: Surgery) -> None:
    assert "reasoning" in surgery("run", "reasonin").err
    assert "Did you mean merged?" in surgery("run", "reasoning", "--from", "mergd", "--dry-run").err
    assert "seed" in surgery("run", "reasoning", "--set", "sed=1").err


def test_a_failing_step_is_told_with_its_log_and_exit_code_1(surgery: Surgery, folder: Path) -> None:
    said = surgery("run", "reasoning", "-o", "bad", "--set", f"target={folder / 'recipes.yaml'}", "--from", "moved")
    assert said.code == 1
    assert "step moved.scale=0.5 failed:" in said.err
    assert "bad/steps/moved.scale=0.5/log.txt" in said.err
    assert "Left out, because they need it: merged" in said.err
    assert said.err.rstrip().endswith("The same command without --from goes on from there.")


def test_the_schema_is_one_json_object_that_knows_every_command(surgery: Surgery) -> None:
    text = surgery("run", "--schema").out
    assert json.loads(text)
    for name in recipes.commands():
        assert f'"{name}"' in text


@pytest.mark.parametrize("each", recipes_in(ROOT / "recipes.yaml"), ids=lambda each: each.name)
def test_every_recipe_of_the_project_can_be_run_as_it_stands(each: RecipeSummary) -> None:
    read = build_pipeline(ROOT / "recipes.yaml", each.name, commands=recipes.commands())
    assert read.nodes and not read.pushes and each.about
    assert set(each.needs) == {"disk", "memory", "gpu", "downloads", "time"}
    pushed = build_pipeline(
        ROOT / "recipes.yaml", each.name, commands=recipes.commands(), settings={"repo": "org/name"}
    )
    assert [push.repo_id for push in pushed.pushes] == ["org/name"]


def test_the_example_of_the_documentation_is_a_recipe(tmp_path: Path) -> None:
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    [each] = recipes_in(tmp_path / "r.yaml")
    read = build_pipeline(tmp_path / "r.yaml", each.name, commands=recipes.commands(), settings={"repo": "org/name"})
    assert {node.step for node in read.nodes} == {"vector", "moved", "check", "scores"} and len(read.pushes) == 1


def test_commands_come_from_the_functions_of_the_command_line() -> None:
    known = recipes.commands()
    assert not recipes.NO_STEPS & set(known)
    assert set(recipes.CHANGING) <= set(known) and set(recipes.FILLING) <= set(known)
    apply = known["vector apply"]
    assert apply.writes == "out" and apply.changes is None
    assert (apply.parameters["scale"].kind, apply.parameters["scale"].default) == ("number", 1.0)
    assert apply.parameters["scale-for"].flag == "--scale-for" and apply.parameters["scale-for"].many
    assert apply.parameters["vector"].flag is None and apply.parameters["vector"].required
    assert not {"out", "json", "overwrite", "dry-run"} & set(apply.parameters)
    assert known["eval"].writes is None and known["eval"].plots == "--plot"
    assert known["eval"].parameters["limit"].least == 1
    assert known["merge weights"].parameters["rescale"].off == "--no-rescale"
    assert (known["probe heads"].writes, known["probe heads"].changes) == ("from", "from")
    assert (known["grow baseline"].changes, known["grow baseline"].goes_on) == ("out", True)
    assert known["probe judge"].suffix == ".jsonl"
