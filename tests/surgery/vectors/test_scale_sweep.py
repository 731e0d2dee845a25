"""The sweep, on the lab's real models: the effect of the vector, its controls and intervals, through the engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.architectures import add_tokenizer, build, sibling
from support.lab import family
from transformers import AutoModelForCausalLM

from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.preflight import Preflight
from surgery.errors import SurgeryError
from surgery.vectors.align import VectorSettings, align_tensors, aligned_model
from surgery.vectors.application import apply
from surgery.vectors.extraction import extract
from surgery.vectors.scale_sweep import SweepReport, _EditedModel, matched_noise, parse_grid, sweep
from surgery.vectors.selection import TensorSelection
from surgery.vectors.task_vector import open_vector

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def vector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = family()
    out = tmp_path_factory.mktemp("sweep") / "reasoning"
    extract(str(models["grpo"]), str(models["sft"]), out)
    return out


@pytest.fixture(scope="module")
def report(vector: Path) -> SweepReport:
    return sweep(
        str(vector), "lab:instruct", scales=[-1, 0, 0.5, 1], tasks=["lab_sums"], controls=2, out=vector.parent / "run"
    )


def test_the_vector_makes_its_sibling_reason_and_its_controls_do_not(report: SweepReport) -> None:
    (scores,) = ({point.scale: point.scores[0] for point in report.points},)
    chance = 1 / 7
    assert scores[1].low > 0.7 and scores[0.5].low > 0.7
    for guesser in (scores[0], scores[-1], *(point.scores[0] for point in report.controls)):
        assert guesser.low < chance + 0.05 and guesser.high < 0.3
        assert guesser.high < scores[1].low
    assert all(score.low <= score.value <= score.high and score.n == 400 for score in scores.values())
    assert [point.scale for point in report.controls] == [max(scores, key=lambda a: scores[a].value)] * 2


def test_the_run_folder_has_numbers_a_picture_and_a_page(report: SweepReport, vector: Path) -> None:
    run = vector.parent / "run"
    results = json.loads((run / "results.json").read_text())
    assert [point["scale"] for point in results["points"]] == [-1, 0, 0.5, 1]
    assert results["points"][3]["scores"][0]["value"] == report.points[3].scores[0].value
    assert (run / "lab_sums.png").read_bytes().startswith(b"\x89PNG")
    page = (run / "report.html").read_text()
    assert "random" in page and "data:image/png;base64," in page


def test_the_model_in_memory_is_the_one_that_apply_writes(vector: Path, tmp_path: Path) -> None:
    scale_for = {"*.layers.1.*": 0.5}
    apply(str(vector), "lab:instruct", tmp_path / "out", scale=0.6, exclude=["*norm*"], scale_for={"*.layers.1.*": 0.3})
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    selection = TensorSelection(1.0, exclude=("*norm*",), scale_for=scale_for)
    opened = open_vector(vector)
    model = open_checkpoint("lab:instruct")
    fitted = align_tensors(
        Preflight(),
        aligned_model(model),
        [opened.model],
        VectorSettings(selection),
        zero=opened.zero,
    ).inputs
    with _EditedModel(model, {name: inputs[0] for name, inputs in fitted.items()}, selection, "cpu") as edited:
        edited.set_scale(-2.0)  # what came before leaves no trace
        edited.set_scale(0.6)
        live = edited.loaded.model.state_dict()
    assert live.keys() == written.keys()
    assert all(torch.equal(live[name], written[name]) for name in live)


def test_random_controls_have_the_norm_of_the_vector_and_come_back_by_seed() -> None:
    update = torch.randn(7, 30)
    noise = matched_noise(update, "a", 0)
    assert noise.norm().item() == pytest.approx(update.norm().item(), rel=1e-5)
    assert torch.equal(noise, matched_noise(update, "a", 0))
    assert not torch.equal(noise, matched_noise(update, "b", 0))
    assert not torch.equal(noise, matched_noise(update, "a", 1))
    assert not matched_noise(torch.zeros(3), "a", 0).any()


def test_a_model_whose_tensors_are_fused_in_memory_is_refused(tmp_path: Path) -> None:
    base = add_tokenizer(build("mixtral", tmp_path / "base"))
    tuned = add_tokenizer(sibling(base, tmp_path / "tuned", seed=1))
    extract(str(tuned), str(base), tmp_path / "v")
    with pytest.raises(SurgeryError, match="in memory under another name or shape") as caught:
        sweep(str(tmp_path / "v"), str(base), scales=[1.0], tasks=["lab_sums"])
    assert "surgery vector apply" in str(caught.value)


@pytest.mark.parametrize(("text", "grid"), [("-1,0,0.5", [-1, 0, 0.5]), ("1", [1]), ("1,1,2", [1, 2])])
def test_grids_are_read(text: str, grid: list[float]) -> None:
    assert parse_grid(text) == grid


@pytest.mark.parametrize("text", ["", "a", "1,,2", "nan", "1,inf"])
def test_bad_grids_are_refused(text: str) -> None:
    with pytest.raises(SurgeryError, match=r"--scale: got .*, expected"):
        parse_grid(text)
