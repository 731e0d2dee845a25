"""Closed choices are one type: the parser, recipes and their schema refuse anything else before a step runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cli import run_command

from cli.commands.run import commands
from surgery.errors import SurgeryError
from surgery.recipes.parse.graph import build_pipeline
from surgery.recipes.parse.schema import json_schema
from surgery.recipes.types import Command, CommandParameter

COMMANDS = commands()
CHOICES = [(command, one) for command in COMMANDS.values() for one in command.parameters.values() if one.choices]
IDS = [f"{command.name} {one.name}" for command, one in CHOICES]
EXPECTED = {
    *("vocab", "mode", "kind", "init", "budget", "embedding", "engine", "cells", "attribution", "ablate", "style"),
    *("way", "phase", "dtype", "tune-what", "compat", "special-tokens"),
}


def test_every_closed_choice_is_known_to_recipes() -> None:
    assert {one.name for _, one in CHOICES} == EXPECTED


def misspelt(value: str) -> str:
    return f"{value}q"


def needed(command: Command) -> dict[str, Any]:
    """Values for what a command needs, which exist everywhere."""
    values = {"data": "lab:cliff", "from": ".", "embed": ".", "what": "ties", "plan": "small", "vector": "."}
    values |= {"task": "lab_sums", "corpus": "lab:python/code", "vocab": 300, "out": ".", "top": "5%", "token": "x"}
    return {name: values.get(name, "lab:grpo") for name, one in command.parameters.items() if one.required}


def errors_of(folder: Path, *steps: tuple[Command, dict[str, Any]]) -> list[str]:
    """The lines of the error of a recipe with these steps, without the file's name; none where it is right."""
    file = folder / "recipes.yaml"
    entries = {f"s{i}": {"run": command.name, "with": given} for i, (command, given) in enumerate(steps)}
    file.write_text(yaml.safe_dump({"recipes": {"r": {"steps": entries}}}, sort_keys=False), encoding="utf-8")
    try:
        build_pipeline(file, "r", commands=COMMANDS)
    except SurgeryError as error:
        assert error.exit_code == 2
        return [line.removeprefix(f"{file}:") for line in str(error).splitlines()]
    return []


@pytest.mark.parametrize(("command", "parameter"), CHOICES, ids=IDS)
def test_a_misspelt_choice_in_a_recipe_is_refused_with_the_nearest(
    command: Command, parameter: CommandParameter, tmp_path: Path
) -> None:
    good = needed(command)
    assert errors_of(tmp_path, *((command, {**good, parameter.name: value}) for value in parameter.choices)) == []
    value = parameter.choices[-1]
    (error,) = errors_of(tmp_path, (command, {**good, parameter.name: misspelt(value)}))
    assert (
        f"recipes.r.steps.s0.with.{parameter.name}: got {misspelt(value)!r}, expected {parameter.choices[0]}" in error
    )
    assert error.endswith(f"did you mean {value}?")


@pytest.mark.parametrize(("command", "parameter"), CHOICES, ids=IDS)
def test_a_misspelt_choice_on_the_command_line_is_refused_with_the_nearest(
    command: Command, parameter: CommandParameter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    value = parameter.choices[-1]
    assert run_command(monkeypatch, *command.name.split(), "x", f"{parameter.flag}={misspelt(value)}") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {parameter.flag}: got {misspelt(value)!r}, expected {parameter.choices[0]}")
    assert said.endswith(f"Did you mean {value}?\n")


@pytest.mark.parametrize(("command", "parameter"), CHOICES, ids=IDS)
def test_the_schema_lists_the_choices(command: Command, parameter: CommandParameter) -> None:
    rules = json_schema(COMMANDS)["$defs"]["StepEntry"]["allOf"]
    options = {rule["if"]["properties"]["run"]["const"]: rule["then"]["properties"]["with"] for rule in rules}
    option = options[command.name]["properties"][parameter.name]
    assert {"enum": list(parameter.choices)} in option["anyOf"]


def test_every_path_that_a_step_takes_is_looked_up() -> None:
    paths = [(c.name, p.name, p.names) for c in COMMANDS.values() for p in c.parameters.values() if p.kind == "path"]
    assert [(command, name) for command, name, names in paths if names is None] == [("grow baseline", "out")]


def test_everything_that_is_missing_is_told_at_once_with_line_and_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    extract, refusal, merge = (COMMANDS[name] for name in ("vector extract", "probe refusal", "merge weights"))
    lines = errors_of(
        tmp_path,
        (extract, {"tuned": "lab:gpro", "base": "./nowhere", "vocab": "strikt"}),
        (refusal, {"model": "lab:cliff", "data": "no.jsonl", "engine": "vlm", "attribution": "exat", "cells": "none"}),
        (merge, {"what": "tiess", "models": ["lab:sft", "./no/a", "$s0"], "base": "org/name"}),
    )
    assert [line.split(": ")[:3][1:] for line in lines] == [
        ["recipes.r.steps.s0.with.tuned", "got 'lab:gpro'"],
        ["recipes.r.steps.s0.with.base", "got './nowhere'"],
        [
            "recipes.r.steps.s0.with.vocab",
            "got 'strikt', expected strict, by-token or skip-embeddings; did you mean strict?",
        ],
        ["recipes.r.steps.s1.with.data", "got 'no.jsonl'"],
        ["recipes.r.steps.s1.with.engine", "got 'vlm', expected transformers or vllm; did you mean vllm?"],
        ["recipes.r.steps.s1.with.attribution", "got 'exat', expected exact or paper; did you mean exact?"],
        ["recipes.r.steps.s1.with.cells", "got 'none', expected all or paper"],
        ["recipes.r.steps.s2.with.what", "got 'tiess'"],
        ["recipes.r.steps.s2.with.models[1]", "got './no/a'"],
    ]


def test_what_a_step_that_is_left_out_names_need_not_be_there(tmp_path: Path) -> None:
    file = tmp_path / "recipes.yaml"
    steps = {"a": {"run": "verify", "with": {"model": "./no"}, "when": {"go": True}}}
    steps["b"] = {"run": "verify", "with": {"model": "lab:sft"}}
    file.write_text(yaml.safe_dump({"recipes": {"r": {"vars": {"go": False}, "steps": steps}}}), encoding="utf-8")
    assert [node.name for node in build_pipeline(file, "r", commands=COMMANDS).nodes] == ["b"]
    with pytest.raises(SurgeryError, match="no such file or folder"):
        build_pipeline(file, "r", commands=COMMANDS, settings={"go": "true"})
