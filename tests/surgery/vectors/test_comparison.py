"""Models and vectors held against each other, checked against float64 by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import build, sibling

from surgery.engine.options import ExecutionOptions
from surgery.errors import SurgeryError
from surgery.vectors.comparison import compare, diff
from surgery.vectors.extraction import extract


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = build("qwen2", tmp_path / "base")
    return base, sibling(base, tmp_path / "tuned", seed=1)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_differences_are_those_of_float64(pair: tuple[Path, Path]) -> None:
    report = diff(*map(str, pair))
    a, b = weights(pair[0]), weights(pair[1])
    assert [row.name for row in report.tensors] == sorted(a)
    for row in report.tensors:
        x, y = a[row.name].double().flatten(), b[row.name].double().flatten()
        assert row.relative == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-4)
        assert row.norm == pytest.approx(float((x - y).norm()), rel=1e-4)
        assert row.cosine == pytest.approx(float(x @ y / (x.norm() * y.norm())), abs=1e-5)
        assert row.changed == float((x != y).double().mean())
    assert sum(group.elements for group in report.groups) == report.whole.elements


def test_a_model_does_not_differ_from_itself(pair: tuple[Path, Path]) -> None:
    report = diff(str(pair[0]), str(pair[0]))
    assert all((row.relative, row.changed, row.norm) == (0, 0, 0) for row in report.tensors)
    assert report.whole.cosine == pytest.approx(1.0, abs=1e-6)


def test_threads_change_nothing(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.checkpoint.reader.SEGMENT", 100)
    monkeypatch.setattr("surgery.engine.reduce.BLOCK", 13)
    assert diff(*map(str, pair), options=ExecutionOptions(threads=1)) == diff(
        *map(str, pair), options=ExecutionOptions(threads=4)
    )


def test_what_cannot_be_compared_is_listed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = weights(pair[1])
    tensors["extra"] = tensors.pop("lm_head.weight")
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, tmp_path / "odd.safetensors")
    report = diff(str(pair[0]), str(tmp_path / "odd.safetensors"))
    assert (report.only_a, report.only_b, report.reshaped) == (["lm_head.weight"], ["extra"], ["model.norm.weight"])
    assert "model.norm.weight" in report.tables()[-1].to_markdown()


def test_nothing_in_common_is_an_error(pair: tuple[Path, Path], tmp_path: Path) -> None:
    save_file({"other": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(SurgeryError, match=r"no tensor of .*other.safetensors has the name and shape"):
        diff(str(pair[0]), str(tmp_path / "other.safetensors"))


def test_integers_and_zeros_have_differences_too(tmp_path: Path) -> None:
    a = {"i": torch.tensor([1, 2, 3]), "z": torch.zeros(3), "e": torch.empty(0), "f": torch.zeros(2)}
    b = {"i": torch.tensor([1, 9, 3]), "z": torch.zeros(3), "e": torch.empty(0), "f": torch.ones(2)}
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    rows = {row.name: row for row in diff(str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")).tensors}
    assert rows["i"].changed == 1 / 3
    assert (rows["z"].relative, rows["e"].relative, rows["f"].relative) == (0, 0, math.inf)
    assert math.isnan(rows["z"].cosine)


def test_vectors_are_compared_by_cosine_and_norm(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    other = sibling(base, tmp_path / "other", seed=5)
    extract(str(tuned), str(base), tmp_path / "v1")
    extract(str(other), str(base), tmp_path / "v2")
    extract(str(tuned), str(base), tmp_path / "v3", include=["*.mlp.*"])
    report = compare([str(tmp_path / name) for name in ("v1", "v2", "v3")])
    flat = []
    for name in ("v1", "v2", "v3"):
        held = load_file(tmp_path / name / "vector.safetensors")
        flat.append(
            torch.cat([held.get(n, torch.zeros_like(t)).double().flatten() for n, t in sorted(weights(base).items())])
        )
    for (i, j), cosine in report.whole.cosines.items():
        assert cosine == pytest.approx(float(flat[i] @ flat[j] / (flat[i].norm() * flat[j].norm())), abs=1e-5)
    assert report.whole.norms == pytest.approx([float(v.norm()) for v in flat], rel=1e-5)
    assert [group.name for group in report.groups] == [
        "embed",
        "layer 0",
        "layer 1",
        "layer 2",
        "final norm",
        "lm_head",
    ]
    assert math.isnan(report.groups[0].cosines[0, 2]) and "–" not in report.table().to_markdown()


def test_one_vector_is_not_compared(pair: tuple[Path, Path]) -> None:
    with pytest.raises(SurgeryError, match="got 1 vector, expected two or more"):
        compare([str(pair[0])])
