"""Recipes as texts, made on the spot, for commands that are made up: a few parameters of every kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from surgery.errors import SurgeryError
from surgery.recipes.parse.graph import build_pipeline
from surgery.recipes.types import Command, CommandParameter, Pipeline

Read = Callable[..., Pipeline]


RECIPE = """recipes:
  r:
    about: One line.
    needs: {disk: 10 MB}
    vars: {tuned: lab:grpo, base: lab:sft, target: lab:instruct, task: lab_sums, measure: true, repo: }
    steps:
      scores:
        run: eval
        with: {models: [$target, $moved], task: [$task], limit: 200}
        when: {measure: true}
      vector:
        run: vector extract
        with: {tuned: $tuned, base: $base}
        memory: 2 GB
      moved:
        run: vector apply
        with: {vector: $vector, target: $target, scale: $scale}
        matrix: {scale: [0.5, 1.0]}
    push: {from: $vector/sub, to: $repo, private: true}
"""


def _command(
    name: str, *parameters: CommandParameter, writes: str | None = "out", changes: str | None = None, suffix: str = ""
) -> Command:
    by_name = {one.name: one for one in parameters}
    return Command(name, f"What {name} does.", by_name, writes, changes, suffix=suffix)


def _argument(name: str, *, many: bool = False) -> CommandParameter:
    return CommandParameter(name, "text", f"The {name}.", required=True, many=many)


COMMANDS = {
    command.name: command
    for command in (
        _command(
            "vector extract",
            _argument("tuned"),
            _argument("base"),
            CommandParameter("rank", "whole", "Of the adapter.", "--rank", least=1),
            CommandParameter(
                "dtype", "text", "To store.", "--dtype", choices=("float32", "bfloat16"), default="float32"
            ),
        ),
        _command(
            "vector apply",
            _argument("vector"),
            _argument("target"),
            CommandParameter("scale", "number", "α.", "--scale", default=1.0, least=-10, most=10),
            CommandParameter("scale-for", "text", "GLOB=α.", "--scale-for", many=True),
            CommandParameter("rescale", "flag", "Keep the norm.", "--rescale", off="--no-rescale"),
            CommandParameter("config", "path", "A file.", "--config"),
        ),
        _command(
            "eval",
            _argument("models", many=True),
            CommandParameter("task", "text", "May be repeated.", "--task", many=True),
            CommandParameter("limit", "whole", "Examples.", "--limit", least=1),
            writes=None,
        ),
        _command(
            "probe heads",
            CommandParameter("from", "path", "A run.", "--from", required=True),
            changes="from",
            writes=None,
        ),
        _command("list", suffix=".jsonl"),
        _command("note", CommandParameter("of", "text", "Anything.", "--of", many=True)),
    )
}


def read_text(folder: Path, text: str, **settings: str) -> Pipeline:
    file = folder / "recipes.yaml"
    file.write_text(text, encoding="utf-8")
    return build_pipeline(file, "r", commands=COMMANDS, settings=settings)


def steps_of(steps: Mapping[str, Any], **more: Any) -> str:
    """The text of a file with one recipe."""
    return str(yaml.safe_dump({"recipes": {"r": {"steps": steps, **more}}}, sort_keys=False, allow_unicode=True))


def note(*of: object, **more: Any) -> dict[str, Any]:
    return {"run": "note", "with": {"of": list(of)}, **more}


def faults_of(read: Read, text: str, **settings: str) -> list[str]:
    """The lines of the error, without the file."""
    with pytest.raises(SurgeryError) as caught:
        read(text, **settings)
    assert caught.value.exit_code == 2
    return [line.partition("recipes.yaml:")[2].strip() for line in str(caught.value).split("\n")]


def only_fault(read: Read, text: str, **settings: str) -> str:
    (fault,) = faults_of(read, text, **settings)
    return fault
