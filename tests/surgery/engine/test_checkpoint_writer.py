"""Every command's output is checked, validated and described in the same way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.card import CardContent
from surgery.engine.checkpoint_writer import OutputDescription, check_destination, write_checkpoint
from surgery.engine.manifest import command_record
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, copy_tensor, plan_files
from surgery.engine.preflight import Preflight
from surgery.engine.result import ExecutionResult
from surgery.errors import SurgeryError

OPTIONS = ExecutionOptions(threads=1)


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    (tmp_path / "model").mkdir()
    save_file({"a": torch.arange(6.0), "b": torch.ones(2, 3)}, tmp_path / "model" / "model.safetensors")
    return open_checkpoint(str(tmp_path / "model"))


def plan_copy(model: Checkpoint) -> Plan:
    planned = [copy_tensor(tensor) for tensor in model.tensors.values()]
    return Plan(command_record("test copy", [model.ref]), {"model": model}, plan_files(planned, like=model))


def describe(folder: Path, result: ExecutionResult) -> OutputDescription[str]:
    (folder / "beside.txt").write_text("beside")
    return OutputDescription(
        "the report",
        {"tensors": len(result.hashes)},
        CardContent("A copy", "Copied."),
        kind="vector",
        versions={"extra": "1.0"},
        fields={"more": [1], "inputs": {}},
    )


def test_weights_manifest_card_and_further_files_are_committed_together(model: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert write_checkpoint(plan_copy(model), out, OPTIONS, describe=describe, preflight=Preflight()) == "the report"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "beside.txt",
        "model.safetensors",
        "surgery.json",
    ]
    assert load_file(out / "model.safetensors")["a"].tolist() == [0, 1, 2, 3, 4, 5]
    manifest = json.loads((out / "surgery.json").read_text())
    assert manifest["kind"] == "vector" and manifest["report"] == {"tensors": 2} and manifest["more"] == [1]
    assert manifest["inputs"] == {} and manifest["versions"]["extra"] == "1.0"
    card = (out / "README.md").read_text()
    assert "# A copy\n\nCopied." in card and "extra 1.0" in card


def test_a_dry_run_checks_the_disk_and_writes_nothing(model: Checkpoint, tmp_path: Path) -> None:
    preflight = Preflight()
    before = sorted(tmp_path.iterdir())
    report = write_checkpoint(
        plan_copy(model), tmp_path / "out", OPTIONS, describe=describe, preflight=preflight, dry_run_report="preview"
    )
    assert report == "preview" and "needed" in preflight.facts["disk"]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("dry_run_report", [None, "preview"])
def test_errors_found_before_are_raised_under_the_commands_name(
    model: Checkpoint, tmp_path: Path, dry_run_report: str | None
) -> None:
    preflight = Preflight()
    preflight.errors.add("one does not fit.")
    preflight.errors.add("nor does the other.")
    with pytest.raises(SurgeryError) as caught:
        write_checkpoint(
            plan_copy(model),
            tmp_path / "out",
            OPTIONS,
            describe=describe,
            preflight=preflight,
            dry_run_report=dry_run_report,
        )
    assert str(caught.value) == "test copy: one does not fit.\n  nor does the other."
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_that_validation_rejects_leave_nothing(model: Checkpoint, tmp_path: Path) -> None:
    seen = []

    def validate(folder: Path, result: ExecutionResult) -> None:
        seen.append((sorted(path.name for path in folder.glob("*.safetensors")), sorted(result.hashes)))
        raise SurgeryError("not good enough")

    with pytest.raises(SurgeryError, match="not good enough"):
        write_checkpoint(plan_copy(model), tmp_path / "out", OPTIONS, describe=describe, validate=validate)
    assert seen == [(["model.safetensors"], ["a", "b"])]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failing_description_keeps_the_weights_for_the_next_run(model: Checkpoint, tmp_path: Path) -> None:
    def fail(folder: Path, result: ExecutionResult) -> OutputDescription[str]:
        raise SurgeryError("the source is gone")

    with pytest.raises(SurgeryError, match="the source is gone"):
        write_checkpoint(plan_copy(model), tmp_path / "out", OPTIONS, describe=fail)
    assert (tmp_path / "out.partial" / "model.safetensors").is_file()

    def resumed(folder: Path, result: ExecutionResult) -> OutputDescription[int]:
        return OutputDescription(result.resumed_bytes, {}, CardContent("", ""))

    assert write_checkpoint(plan_copy(model), tmp_path / "out", OPTIONS, describe=resumed) == 12 * 4


def test_a_destination_inside_a_source_or_taken_is_refused(model: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="lies inside the model"):
        check_destination(tmp_path / "model" / "out", {"model": model}, OPTIONS, dry_run=True)
    (tmp_path / "taken").mkdir()
    check_destination(tmp_path / "taken", {"model": model}, OPTIONS, dry_run=True)
    with pytest.raises(SurgeryError, match="exists already"):
        check_destination(tmp_path / "taken", {"model": model}, OPTIONS, dry_run=False)


@pytest.mark.parametrize(
    ("shard", "writes"),
    [
        ("undo/undo.safetensors", "undo/undo.safetensors"),
        ("Undo/UNDO.safetensors", "undo/undo.safetensors"),
        ("undo/undo.safetensors/a.safetensors", "undo/undo.safetensors"),
        ("notes.safetensors", "notes.safetensors/1.json"),
        ("README.md/a.safetensors", None),
        ("surgery.json/a.safetensors", None),
        ("scores.json/a.safetensors", None),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_shard_with_the_name_of_a_file_that_the_command_writes_is_refused_before_anything_is_written(
    model: Checkpoint, tmp_path: Path, shard: str, writes: str | None, dry_run: bool
) -> None:
    plan = plan_copy(model)
    plan = replace(plan, files=(replace(plan.files[0], name=shard),))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        SurgeryError, match=rf'OUT: "{shard}" of the model has the name of a file that is written there'
    ):
        write_checkpoint(
            plan,
            tmp_path / "out",
            OPTIONS,
            describe=describe,
            dry_run_report="preview" if dry_run else None,
            writes=() if writes is None else (writes,),
        )
    assert sorted(tmp_path.rglob("*")) == before
    # Beside such a file it is no harm.
    plan_copy(model).check_names(["undo/undo.safetensors"])
    replace(plan, files=(replace(plan.files[0], name="undo/other.safetensors"),)).check_names(["undo/undo.safetensors"])
