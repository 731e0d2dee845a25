"""What a recipe names is looked up before anything runs: files, lab models, data sets, plans, methods and tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.recipes.parse import inputs
from surgery.recipes.parse.inputs import input_error, task_errors
from surgery.recipes.types import InputKind


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a model, texts and a config, in which everything is looked up."""
    (tmp_path / "models" / "tuned").mkdir(parents=True)
    (tmp_path / "models" / "adapter").mkdir()
    for name in ("texts.jsonl", "merge.yml", "plan.yml"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("model", "models/tuned"),
        ("model", "./models/tuned"),
        ("model", "org/name@main"),
        ("model", "lab:grpo"),
        ("model", "lab:grpo+models/adapter"),
        ("model", "models/tuned+org/adapter"),
        ("tokenizer", "org/name"),
        ("data", "texts.jsonl"),
        ("data", "org/name:train[0:9]"),
        ("data", "lab:cliff/pool"),
        ("corpus", "*.jsonl"),
        ("corpus", "lab:python/docs-held"),
        ("corpus", "models"),
        ("text", "lab:python/docs"),
        ("text", "texts.jsonl"),
        ("path", "models/tuned"),
        ("plan", "one-by-one"),
        ("plan", "plan.yml"),
        ("merge", "merge.yml"),
        ("merge", "ties"),
    ],
)
def test_what_is_there_or_on_the_hub_is_no_error(kind: InputKind, text: str) -> None:
    assert input_error(text, kind) is None


@pytest.mark.parametrize(
    ("kind", "text", "what"),
    [
        ("model", "./models/tuend", "no such file or folder, and not a Hub id (org/name[@revision]) or lab:NAME"),
        ("model", "./models/tuend", "did you mean ./models/tuned?"),
        ("model", "model/a/b", "there is no folder model/a either"),
        ("model", "nowhere", "paths are looked up from where `surgery run` is started"),
        ("model", "lab:gpro", "no lab model is called 'gpro'. Did you mean 'grpo'?"),
        ("model", "lab:grpoo+models/adapter", "Did you mean 'grpo'?"),
        ("model", "lab:grpo+./models/adaptor", "did you mean ./models/adapter?"),
        ("tokenizer", "./tok", "no such file or folder"),
        ("data", "text.jsonl", "did you mean texts.jsonl?"),
        ("data", "org/name", "names no split"),
        ("data", "lab:grpo", "the lab model 'grpo' has no data"),
        ("data", "lab:cliff/pol", "the lab has no data called 'pol'"),
        ("corpus", "*.parquet", "matches no file"),
        ("corpus", "lab:python/cod", "the lab has no data called 'cod'"),
        ("text", "txts.jsonl", "did you mean texts.jsonl?"),
        ("path", "models/tuend", "did you mean models/tuned?"),
        ("plan", "one-by-on", "no such plan; did you mean one-by-one?"),
        ("plan", "xyz", "give a YAML file, or one of"),
        ("merge", "merg.yml", "did you mean merge.yml?"),
        ("merge", "tiess", "no such merge method or config; did you mean ties?"),
    ],
)
def test_what_is_missing_is_told_with_the_nearest_name(kind: InputKind, text: str, what: str) -> None:
    assert what in str(input_error(text, kind))


def test_tasks_are_those_of_the_lab_and_of_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    import surgery.evaluation.harness as harness

    monkeypatch.setattr(inputs, "find_spec", lambda name: object())
    monkeypatch.setattr(harness, "task_names", lambda: ["gsm8k", "lab_sums"])
    assert task_errors(["lab_sums", "gsm8k", "lab_sumz", "xyz"]) == {
        "lab_sumz": "no such task; did you mean lab_sums?",
        "xyz": "no such task; `lm_eval ls tasks` lists them all",
    }


def test_the_harness_is_not_asked_for_the_labs_tasks_or_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import surgery.evaluation.harness as harness

    def fail() -> list[str]:
        raise AssertionError("asked")

    monkeypatch.setattr(harness, "task_names", fail)
    assert task_errors(["lab_sums", "lab_sorting"]) == {}
    monkeypatch.setattr(inputs, "find_spec", lambda name: None)
    assert task_errors(["gsm9k"]) == {}
