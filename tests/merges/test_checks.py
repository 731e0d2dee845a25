"""What is found in models before they are merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merges.checks import check_finite, check_vocabularies
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.options import ExecutionOptions
from surgery.engine.preflight import Preflight
from surgery.errors import ErrorList, SurgeryError


def model(folder: Path, *tokens: str) -> Checkpoint:
    folder.mkdir()
    save_file({"w": torch.zeros(2, 2)}, folder / "model.safetensors")
    if tokens:
        (folder / "vocab.json").write_text(json.dumps({token: row for row, token in enumerate(tokens)}))
    return open_checkpoint(folder)


def compared(*checkpoints: Checkpoint) -> Preflight:
    preflight = Preflight()
    check_vocabularies(preflight, checkpoints)
    return preflight


def test_an_error_that_tensors_share_is_one_sentence() -> None:
    errors = ErrorList()
    for i in range(5):
        errors.add_tensor(f"w{i}", "too wide", "Cut it.")
    errors.add_tensor("v", "too tall", "Cut it.")
    assert list(errors) == [
        '5 tensors: "w0", "w1", "w2" and 2 more: too wide. Cut it.',
        '"v": too tall. Cut it.',
    ]


def test_equal_vocabularies_are_a_fact(tmp_path: Path) -> None:
    found = compared(model(tmp_path / "a", "x", "y"), model(tmp_path / "b", "x", "y"))
    assert found.facts == {"vocabulary": "the same 2 tokens in all models"}
    assert not found.errors and not found.warnings


def test_rows_that_hold_different_tokens_are_a_fault(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", "x", "y", "z"), model(tmp_path / "b", "y", "x", "z")
    (fault,) = compared(a, b).errors
    assert fault == (
        f"the vocabularies of {a.ref} and {b.ref} differ: 2 rows hold different tokens (row 0: 'x' / 'y', "
        "row 1: 'y' / 'x'). Say `tokenizer_source: union`, `base` or a model: rows are then aligned by token."
    )


def test_tokens_that_only_some_have_are_a_warning(tmp_path: Path) -> None:
    found = compared(model(tmp_path / "a", "x", "y"), model(tmp_path / "b", "x", "y", "z"))
    assert found.warnings == ["1 tokens are not in all models ('z'); their rows are merged as they lie."]
    assert not found.errors


def test_models_without_tokenizers_are_named(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", "x"), model(tmp_path / "b")
    assert compared(a, b).facts == {"vocabulary": f"not compared: no tokenizer files in {b.ref}"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_counted_by_tensor_and_model(
    dtype: torch.dtype, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.checkpoint.reader.SEGMENT", 64)
    ill = torch.ones(300, dtype=dtype)
    ill[[0, 70, 299]] = value
    tensors = {"ill": ill, "well": torch.ones(300, dtype=dtype), "count": torch.ones(3, dtype=torch.int64)}
    save_file(tensors, tmp_path / "m.safetensors")
    stored = list(open_checkpoint(tmp_path / "m.safetensors").tensors.values())
    check_finite({"org/m": [tensor for tensor in stored if tensor.name != "ill"]}, ExecutionOptions(threads=2))
    with pytest.raises(SurgeryError) as caught:
        check_finite({"org/m": stored}, ExecutionOptions(threads=2))
    assert str(caught.value) == (
        'sources: NaN or infinite values: 3 in "ill" of org/m. They would spread through the merge. '
        "--allow-nonfinite merges them all the same."
    )
