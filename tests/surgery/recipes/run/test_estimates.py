"""Promises of recipes.run.estimates: what a step takes is told from headers alone, and what is not known is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.architectures import build
from support.recipe_runs import node, real

from surgery.checkpoint.resolve import open_checkpoint
from surgery.errors import SurgeryError
from surgery.recipes.run.content_hashes import FileHashCache
from surgery.recipes.run.estimates import (
    GB,
    LOADED,
    PROGRAM,
    TRAINED,
    WEIGHT_JOB,
    ResourceEstimate,
    check_disk,
    estimate,
    free_memory,
)
from surgery.recipes.run.inputs import LAB_BYTES, InputResolver
from surgery.recipes.types import Given, StepOutput


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("m") / "model", max_shard_size="20KB")


def of(
    command: str, given: dict[str, Given], memory: int | None = None, **before: ResourceEstimate
) -> ResourceEstimate:
    step = node("x", given, command=real(command), memory=memory)
    return estimate(step, before, InputResolver(FileHashCache()))


def test_a_vector_in_float32_takes_four_bytes_for_every_value(model: Path) -> None:
    seen = of("vector extract", {"tuned": str(model), "base": str(model)})
    n = open_checkpoint(model).n_parameters
    assert (seen.disk, seen.memory) == (4 * n, WEIGHT_JOB)
    assert of("vector extract", {"tuned": str(model), "base": str(model), "dtype": "bfloat16"}).disk == 2 * n


def test_an_edited_model_takes_what_its_original_takes(model: Path) -> None:
    size = open_checkpoint(model).n_bytes
    before = ResourceEstimate(0, 999_999_999, 5)
    assert of("vector apply", {"vector": StepOutput("v"), "target": str(model)}, v=before).disk == size
    assert of("edit heads", {"model": str(model), "no-measure": True}).disk == size


def test_an_ensemble_takes_what_its_members_take_together(model: Path) -> None:
    size = open_checkpoint(model).n_bytes
    assert of("merge logits", {"models": (str(model), str(model))}).disk == 2 * size
    assert of("merge weights", {"what": "linear", "models": (str(model), str(model))}).disk == size


@pytest.mark.parametrize("command", ["eval", "probe refusal", "edit heads"])
def test_a_command_that_loads_models_takes_the_largest_and_more(model: Path, command: str) -> None:
    given: dict[str, Given] = {"model": str(model)} if command != "eval" else {"models": (str(model), StepOutput("m"))}
    seen = of(command, given, m=ResourceEstimate(0, 3 * GB, GB))
    largest = 3 * GB if command == "eval" else open_checkpoint(model).n_bytes
    assert seen.memory == PROGRAM + round(LOADED * largest)


def test_an_edit_that_measures_nothing_loads_nothing(model: Path) -> None:
    assert of("edit heads", {"model": str(model), "no-measure": True}).memory == WEIGHT_JOB


def test_a_growth_takes_sixteen_bytes_for_every_parameter(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yml"
    plan.write_text("corpus: [x]\nmodel: {hidden: 64}\nstages: [{add: 1, tokens: 10, times: 3}]\n")
    seen = of("grow run", {"plan": str(plan), "embed": StepOutput("emb")}, emb=ResourceEstimate(0, 400, 100))
    assert seen.memory == PROGRAM + TRAINED * (100 + 3 * 12 * 64 * 64)


def test_what_the_recipe_says_counts(model: Path) -> None:
    assert of("eval", {"models": (str(model),)}, memory=7 * GB).memory == 7 * GB


def test_a_lab_model_that_is_not_built_counts_as_a_constant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    seen = of("eval", {"models": ("lab:grpo",)})
    assert seen.memory == PROGRAM + round(LOADED * LAB_BYTES)
    assert seen.notes == ("lab:grpo is trained first",)


def test_a_model_whose_size_cannot_be_seen_is_said_to_be_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    seen = of("eval", {"models": ("org/surely-not-cached",)})
    assert any("how large its models are is not known" in note for note in seen.notes)
    assert any("offline mode is on" in note or "no complete copy" in note for note in seen.notes)


def test_too_small_a_disk_is_told_with_both_numbers() -> None:
    with pytest.raises(SurgeryError, match=r"write about 2 GB, and 1 GB are free"):
        check_disk(Path("run"), 2 * GB, 1 * GB)
    check_disk(Path("run"), 1 * GB, 1 * GB)


def test_the_machine_says_how_much_memory_is_free() -> None:
    assert free_memory() > 0
