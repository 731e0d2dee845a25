"""A recipe from somebody else: what it reads, writes, runs and pushes is shown, and nothing leaves without consent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.audit import tree, watch_files
from support.cli import Surgery, commands_in
from support.hub_server import HubServer
from support.recipe_runs import make_models

from cli import console

LOOT = "stranger/loot"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "project").mkdir()
    return tmp_path / "project"


@pytest.fixture
def surgery(
    folder: Path,
    server: HubServer,
    writable: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Surgery:
    run = commands_in(folder, monkeypatch, capsys, columns=400)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(console, "can_ask", lambda: False)
    server.namespaces = {"lab", "stranger"}
    return run


def recipe(folder: Path, steps: dict[str, Any], push: object = None, **variables: object) -> None:
    entry = {"vars": variables, "steps": steps} | ({"push": push} if push is not None else {})
    (folder / "recipes.yaml").write_text(yaml.safe_dump({"recipes": {"r": entry}}, sort_keys=False))


def vector(tuned: object, base: object = "$base") -> dict[str, Any]:
    return {"run": "vector extract", "with": {"tuned": str(tuned), "base": str(base)}}


def private_model(server: HubServer, models: dict[str, Path]) -> None:
    server.add("me/private", models["tuned"], private=True)


# The attack as it was run


def test_a_stranger_s_recipe_pushes_nothing_without_consent(
    server: HubServer, surgery: Surgery, folder: Path, models: dict[str, Path]
) -> None:
    private_model(server, models)
    recipe(folder, {"v": vector("me/private", models["base"])}, {"from": "$v", "to": LOOT, "pr": True})
    said = surgery("run", "r", "-o", "run")
    assert (said.code, said.out.count(LOOT)) == (2, 1)
    assert said.err.strip().splitlines()[-1] == (
        "error: recipe: the file, and not the command line, says: push the output of v to stranger/loot, as a pull "
        "request (new, private), so this needs your consent. If you agree, add --allow-push stranger/loot to the "
        "command."
    )
    assert not (folder / "run/steps").exists(), "a step ran before the question"
    assert not server.asked(method="POST") and not server.asked(method="PUT")


def test_the_dry_run_shows_destinations_reads_and_commands(
    server: HubServer, surgery: Surgery, folder: Path, models: dict[str, Path]
) -> None:
    private_model(server, models)
    commit = server.repos["me/private"].revisions["main"]
    push = {"from": "$v", "to": LOOT, "pr": True, "revision": None}
    recipe(folder, {"v": vector("me/private", models["base"])}, {k: v for k, v in push.items() if v is not None})
    said = surgery("run", "r", "-o", "run", "--dry-run")
    assert said.code == 0, said.err
    table = " ".join(said.out.split())
    assert f"{LOOT}, as a pull request" in table and "needs --allow-push" in table and "new, private" in table
    assert f"me/private@{commit}" in table
    assert str(models["base"].resolve()) in table and "outside the recipe's folder" in table
    assert f"surgery vector extract me/private {models['base']} --out run/steps/v/out" in table
    assert not (folder / "run").exists()
    found = surgery("run", "r", "-o", "run", "--dry-run", "--json").json
    assert found["publishes"] == [
        {
            "to": LOOT,
            "revision": None,
            "pull_request": True,
            "step": "v",
            "inside": "",
            "visibility": "new, private",
            "needs_consent": True,
        }
    ]
    assert {each["place"]: each["is_outside"] for each in found["reads"]} == {
        f"me/private@{commit}": False,
        str(models["base"].resolve()): True,
    }
    assert found["steps"]["v"]["line"].startswith("surgery vector extract me/private")
    assert found["writes"][0]["path"] == "run"


def test_a_private_input_makes_a_private_repository_and_never_a_public_one(
    server: HubServer, surgery: Surgery, folder: Path, models: dict[str, Path]
) -> None:
    private_model(server, models)
    server.add("org/open", models["base"])
    steps = {"v": vector("me/private", "org/open")}
    recipe(folder, steps, {"from": "$v", "to": "lab/loot", "public": True})
    said = surgery("run", "r", "-o", "run", "--allow-push", "lab/loot", "--public")
    assert said.code == 2 and "would be public, but it was made from what is private" in said.err
    assert "me/private" in said.err and not (folder / "run/steps").exists()
    # A repository of the stranger's that is there, and public.
    server.add(LOOT, models["base"])
    recipe(folder, steps, {"from": "$v", "to": LOOT, "pr": True})
    said = surgery("run", "r", "-o", "run", "--allow-push", LOOT, "--public")
    assert said.code == 2 and "would be public, but it was made from what is private" in said.err
    recipe(folder, steps, {"from": "$v", "to": "lab/loot"})
    said = surgery("run", "r", "-o", "run", "--allow-push", "lab/loot")
    assert said.code == 0, said.err
    assert server.repos["lab/loot"].private


def test_a_recipe_alone_makes_nothing_public_that_is_from_this_machine(
    server: HubServer, surgery: Surgery, folder: Path, models: dict[str, Path]
) -> None:
    recipe(folder, {"v": vector(models["tuned"], models["base"])}, {"from": "$v", "to": "lab/loot", "public": True})
    said = surgery("run", "r", "-o", "run", "--allow-push", "lab/loot")
    assert said.code == 2 and "Give --public if everybody may have it" in said.err
    assert not (folder / "run/steps").exists()


# What is consent


@pytest.mark.parametrize(
    ("push", "settings", "agreed"),
    [
        ({"to": "$repo"}, ["repo=lab/mine"], True),
        ({"to": "$repo"}, [], False),  # the file's own value
        ({"to": "lab/mine"}, ["other=lab/mine"], False),
        ({"to": "$org/loot"}, ["org=lab"], False),  # half of it is the file's
        ({"to": "$target"}, ["target=lab/mine"], False),  # set to be read, and not to be pushed to
    ],
)
def test_only_a_variable_for_nothing_else_names_a_repository_on_the_command_line(
    surgery: Surgery, folder: Path, models: dict[str, Path], push: dict[str, str], settings: list[str], agreed: bool
) -> None:
    steps = {"v": vector(models["tuned"], models["base"])}
    steps["w"] = {"run": "diff", "with": {"a": "$target", "b": "$v"}}
    steps["x"] = {"run": "diff", "with": {"a": "$target", "b": "$other"}}
    variables = {"repo": "lab/theirs", "org": "lab", "target": str(models["base"]), "other": str(models["base"])}
    used = {
        name: value
        for name, value in variables.items()
        if name in (*push.values(), "target", "other") or f"${name}" in push["to"]
    }
    recipe(folder, steps, {"from": "$v", **push}, **used)
    options = [word for each in settings for word in ("--set", each) if each.partition("=")[0] in used]
    found = surgery("run", "r", *options, "--dry-run", "--json")
    assert found.code == 0, found.err
    assert [each["needs_consent"] for each in found.json["publishes"]] == [not agreed]


def test_a_terminal_is_asked_and_no_is_no(
    server: HubServer, surgery: Surgery, folder: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(console, "can_ask", lambda: True)
    monkeypatch.setattr(console, "ask", lambda question: bool(asked.append(question)))
    recipe(
        folder,
        {"v": vector(models["tuned"], models["base"])},
        [{"from": "$v", "to": LOOT, "revision": "b"}, {"from": "$v", "to": "lab/b"}],
    )
    said = surgery("run", "r", "-o", "run")
    assert said.code == 2 and "not agreed to, so nothing was done" in said.err
    assert asked == ["push the output of v to stranger/loot@b (new, private)?"]
    assert not (folder / "run/steps").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [("stranger", "expected org/name"), ("lab/other", "this recipe pushes to stranger/loot"), ("--x", "expected org")],
)
def test_consent_is_to_a_repository_that_the_recipe_pushes_to(
    surgery: Surgery, folder: Path, models: dict[str, Path], option: str, message: str
) -> None:
    recipe(folder, {"v": vector(models["tuned"], models["base"])}, {"from": "$v", "to": LOOT})
    said = surgery("run", "r", f"--allow-push={option}")
    assert said.code == 2 and message in said.err


def test_every_destination_needs_its_own(surgery: Surgery, folder: Path, models: dict[str, Path]) -> None:
    recipe(
        folder,
        {"v": vector(models["tuned"], models["base"])},
        [{"from": "$v", "to": LOOT}, {"from": "$v", "to": "stranger/more"}, {"from": "$v", "to": "lab/a"}],
    )
    said = surgery("run", "r", "--allow-push", "lab/a")
    assert said.code == 2 and "add --allow-push stranger/loot --allow-push stranger/more to the command" in said.err


@pytest.mark.parametrize("to", ["org/name@main", "../x", "-o/x", "org/name --public", "https://x/y", "org/n\nx"])
def test_what_is_no_repository_is_refused(surgery: Surgery, folder: Path, models: dict[str, Path], to: str) -> None:
    recipe(folder, {"v": vector(models["tuned"], models["base"])}, {"from": "$v", "to": to})
    assert surgery("run", "r", "--dry-run").code == 2


# What is read


def test_reading_outside_is_told_also_at_the_start_of_a_run(
    surgery: Surgery, folder: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    recipe(folder, {"v": {"run": "verify", "with": {"model": str(models["base"])}}})
    said = surgery("run", "r", "-o", "run")
    assert said.code == 0 and "outside the recipe's folder" in said.out
    recipe(folder, {"v": {"run": "verify", "with": {"model": "$model"}}}, model=None)
    said = surgery("run", "r", "-o", "run", "--set", f"model={models['base']}")
    assert said.code == 0 and "outside the recipe's folder" not in said.out


def test_paths_are_outside_wherever_they_lead_there(
    surgery: Surgery, folder: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    (folder / "link").symlink_to(models["base"])
    (folder / "own.txt").write_text("x")
    steps = {
        "a": {"run": "diff", "with": {"a": "link", "b": f"../project/../../{models['base'].parent.name}/../nothing"}},
        "b": {"run": "eval", "with": {"models": ["link"], "perplexity": ["own.txt", "/etc/hostname"]}},
    }
    steps["a"]["with"]["b"] = "link"
    recipe(folder, steps)
    found = surgery("run", "r", "--dry-run", "--json").json["reads"]
    assert {each["place"]: each["is_outside"] for each in found} == {
        str(models["base"].resolve()): True,
        str(folder.resolve() / "own.txt"): False,
        "/etc/hostname": True,
    }


def test_what_configs_plans_and_adapters_name_is_listed_too(
    surgery: Surgery, folder: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "diary.txt").write_text("dear diary")
    config = {"merge_method": "linear", "models": [{"model": str(models["tuned"]), "parameters": {"weight": 1}}]}
    (folder / "merge.yml").write_text(yaml.safe_dump(config))
    plan = {
        "start": str(models["base"]),
        "corpus": [f"{secret}/*.txt"],
        "evaluate": {"texts": [f"{secret}/diary.txt"]},
        "cache": {"folder": str(secret / "cache")},
        "stages": [{"tokens": 100}],
    }
    (folder / "plan.yml").write_text(yaml.safe_dump(plan))
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(models["target"])}))
    steps = {
        "merged": {"run": "merge weights", "with": {"what": "merge.yml"}},
        "grown": {"run": "grow run", "with": {"plan": "plan.yml"}},
        "seen": {"run": "inspect", "with": {"model": "adapter"}},
    }
    recipe(folder, steps)
    found = surgery("run", "r", "--dry-run", "--json")
    assert found.code == 0, found.err
    reads = {each["place"]: (each["through"], each["is_outside"]) for each in found.json["reads"]}
    assert reads[str(models["tuned"].resolve())] == ("merge.yml", True)
    assert reads[str(models["base"].resolve())] == ("plan.yml", True)
    assert reads[str(models["target"].resolve())] == ("adapter", True)
    assert reads[f"{secret}/*.txt"] == ("plan.yml", True)
    assert reads[str(secret.resolve() / "diary.txt")] == ("plan.yml", True)
    assert {"path": str(secret / "cache"), "needs_consent": True} in [
        {key: each[key] for key in ("path", "needs_consent")} for each in found.json["writes"]
    ]


# What is written


def test_a_plan_s_cache_outside_of_the_run_needs_consent(
    surgery: Surgery, folder: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    plan = {
        "start": str(models["base"]),
        "corpus": ["own.txt"],
        "stages": [{"tokens": 100}],
        "cache": {"folder": str(tmp_path / "elsewhere")},
    }
    (folder / "own.txt").write_text("x")
    (folder / "plan.yml").write_text(yaml.safe_dump(plan))
    recipe(folder, {"grown": {"run": "grow run", "with": {"plan": "plan.yml"}}})
    said = surgery("run", "r", "-o", "run")
    assert said.code == 2 and f"add --allow-write {tmp_path}/elsewhere to the command" in said.err
    assert not (folder / "run/steps").exists() and not (tmp_path / "elsewhere").exists()


def test_scores_go_into_no_card_outside_of_the_run(
    surgery: Surgery, folder: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    three = [models[name] for name in ("tuned", "base", "target")]
    assert surgery("vector", "transfer", *three, "-o", tmp_path / "mine").code == 0
    (folder / "own.txt").write_text("some words to be predicted")
    before = tree(tmp_path / "mine")
    inside = {"run": "vector transfer", "with": {name: str(models[name]) for name in ("tuned", "base", "target")}}
    scores = {"run": "eval", "with": {"models": [str(tmp_path / "mine"), "$inside"], "perplexity": ["own.txt"]}}
    recipe(folder, {"inside": inside, "scores": scores})
    said = surgery("run", "r", "-o", "run")
    assert said.code == 0, said.err
    assert tree(tmp_path / "mine") == before
    assert (folder / "run/steps/inside/out/scores.json").is_file()


def test_a_link_in_the_run_s_folder_leads_nowhere(
    surgery: Surgery, folder: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    recipe(folder, {"v": {"run": "verify", "with": {"model": str(models["base"])}}})
    assert surgery("run", "r", "-o", "run").code == 0
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/kept.txt").write_text("kept")
    (folder / "run/steps").rename(folder / "run/moved")
    (folder / "run/steps").symlink_to(tmp_path / "victim")
    said = surgery("run", "r", "-o", "run", "--from", "v")
    assert said.code == 2 and "is a link, expected a folder of the run" in said.err
    assert tree(tmp_path / "victim") == {"kept.txt": b"kept"}


def test_a_record_of_a_run_reads_nothing_outside_of_it(
    surgery: Surgery, folder: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    recipe(folder, {"v": {"run": "verify", "with": {"model": str(models["base"])}}})
    assert surgery("run", "r", "-o", "run").code == 0
    record = json.loads((folder / "run/run.json").read_text())
    record["steps"]["v"]["files"] |= {"../../../../secret.txt": "0", "/etc/hostname": "0"}
    (folder / "run/run.json").write_text(json.dumps(record))
    (tmp_path / "secret.txt").write_text("x")
    with watch_files() as watched:
        found = surgery("run", "r", "-o", "run", "--dry-run")
    assert "to do" in found.out
    assert not {tmp_path / "secret.txt", Path("/etc/hostname").resolve()} & watched.read


# The file itself


def test_a_matrix_of_a_billion_steps_is_refused_at_once(surgery: Surgery, folder: Path) -> None:
    axes = {f"a{n}": list(range(100)) for n in range(6)}
    step = {"run": "inspect", "with": {"model": "$a0"}, "matrix": axes}
    recipe(folder, {"s": step})
    said = surgery("run", "r", "--dry-run")
    assert said.code == 2 and "stands for 1,000,000,000,000 steps" in said.err


@pytest.mark.parametrize("name", ["../x", "..", "/x", "a/b", ".hidden", "-o", "a\nb", ""])
def test_names_of_steps_are_no_paths(surgery: Surgery, folder: Path, name: str) -> None:
    recipe(folder, {name: {"run": "inspect", "with": {"model": "lab:sft"}}})
    assert surgery("run", "r", "--dry-run").code == 2
    recipe(folder, {"s": {"run": "inspect", "with": {"model": f"$s/{name}/.."}}})
    assert surgery("run", "r", "--dry-run").code == 2


@pytest.mark.parametrize("option", ["out", "plot", "cards-in", "overwrite", "json", "dry-run", "cards_in", "-o"])
def test_no_step_says_where_anything_is_written(surgery: Surgery, folder: Path, option: str) -> None:
    recipe(folder, {"s": {"run": "eval", "with": {"models": ["lab:sft"], "task": "lab_sums", option: "/nowhere"}}})
    said = surgery("run", "r", "--dry-run")
    assert said.code == 2 and ("is not for a recipe to say" in said.err or "is no option" in said.err)
